"""Bounds on what files and programs of others may take: bytes, time and memory."""

import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment
from transformers import PreTrainedTokenizerBase


try:
    import resource
except ImportError:
    # Windows has none, and no /proc either.
    pass

# What a file may unpack to: so many bytes, and so many times its size. Text shrinks to a tenth at most.
FREE_BYTES, MAX_RATIO = 2**27, 50
# Seconds of the processor and bytes of memory that a program of the model's maker may take, such as a chat template.
MAX_SECONDS, MAX_MEMORY = 5.0, 2**29
# Characters that a chat template may write around the messages.
MAX_TEMPLATE_TEXT = 1_000_000


def most_bytes(path: Path) -> int:
    """Return how many bytes a file may unpack to. One with holes takes fewer bytes on the disk than it has."""
    status = path.stat()
    blocks = getattr(status, "st_blocks", 0) * 512
    # Windows counts no blocks, and some network file systems do not either.
    return FREE_BYTES + MAX_RATIO * (min(status.st_size, blocks) if blocks or _is_hole(path) else status.st_size)


def _is_hole(path: Path) -> bool:
    """Return whether a file is known to have nothing but a hole."""
    if not hasattr(os, "SEEK_DATA"):
        return False
    with open(path, "rb") as stream:
        try:
            os.lseek(stream.fileno(), 0, os.SEEK_DATA)
        except OSError as error:
            return error.errno == errno.ENXIO
    return False


def check_unpacked(size: int, most: int) -> None:
    """
    Refuse a file that unpacks to too many bytes.

    Raises:
        `ValueError`: If `size` is larger than `most`.
    """
    if size > most:
        raise ValueError(
            f"it unpacks to over {most // 2**20} MiB, many times its size on the disk; if you trust it, unpack it and "
            "pass that"
        )


@contextmanager
def bounded() -> Iterator[None]:
    """
    Stop a `with` block of Python code that takes over [`MAX_SECONDS`] of the processor or [`MAX_MEMORY`] bytes.

    In the main thread of Linux and macOS, the operating system keeps the bounds, which are those of the process.
    Elsewhere, a thread watches the block, and interrupts it between two operations of Python. Bounds on memory need
    Linux.

    Raises:
        `TimeoutError`: If the block takes too long.
        `MemoryError`: If it takes too much memory.
    """
    is_main = (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
    )
    try:
        with _bounded_process() if is_main else _watched():
            yield
    except MemoryError:
        raise MemoryError(f"it takes over {MAX_MEMORY // 2**20} MiB of memory") from None


@contextmanager
def _bounded_process() -> Iterator[None]:
    used = _address_space()
    soft, hard = (0, 0) if used is None else resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGVTALRM, _stop)
    try:
        # It rings again, because Python ignores what is raised while an object is destroyed.
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS, MAX_SECONDS)
        if used is not None:
            bound = used + MAX_MEMORY if soft == resource.RLIM_INFINITY else min(used + MAX_MEMORY, soft)
            resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
        yield
    finally:
        try:
            # It may ring here still.
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        finally:
            if used is not None:
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def _stop(*_: Any) -> None:
    raise _TookTooLong


class _TookTooLong(TimeoutError):
    def __init__(self) -> None:
        super().__init__(f"it takes over {MAX_SECONDS:.0f} seconds")


@contextmanager
def _watched() -> Iterator[None]:
    thread, done = threading.get_ident(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(thread, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        try:
            done.set()
        finally:
            # It may be interrupted here still, but not twice.
            done.set()
            watcher.join()
            _interrupt(thread, None)


def _watch(thread: int, done: threading.Event) -> None:
    """Interrupt a thread that takes too long, or after which the process takes too much memory, until it is done."""
    used, end = _address_space(), time.process_time() + MAX_SECONDS
    while not done.wait(0.05):
        is_large = used is not None and (_address_space() or 0) > used + MAX_MEMORY
        if is_large or time.process_time() > end:
            _interrupt(thread, MemoryError if is_large else _TookTooLong)
            # Again after a while, as above.
            done.wait(1)


def _interrupt(thread: int, error: type[Exception] | None) -> None:
    """Let a thread raise an error before its next operation, or withdraw one that it has not raised yet."""
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def _address_space() -> int | None:
    """Return the bytes of memory that this process has reserved, or `None` where nobody knows."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def apply_template(messages: list[dict], tokenizer: PreTrainedTokenizerBase, name: str, **options: Any) -> str:
    """Render a chat. The template is a program of the model's maker, so `name` is what it refuses with any error."""
    try:
        # The rows contain no thoughts. Without this switch, the templates of thinking models leave room for thoughts.
        # Other templates ignore it.
        with bounded():
            _check_operators(tokenizer.get_chat_template())
            text: Any = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)
        if len(text) > MAX_TEMPLATE_TEXT + 10 * sum(len(str(message["content"])) for message in messages):
            raise ValueError(f"it writes {len(text):,} characters")
    except Exception as error:
        raise ValueError(
            f"{name} is refused by the tokenizer's chat template ({error}). Change it, or pass prompt and completion, "
            "and a tokenizer without a template."
        ) from error
    return text


@lru_cache
def _check_operators(template: str) -> None:
    """Refuse powers in a chat template, which needs none: a single one can take hours, and nothing can stop it."""
    tokens = [(kind, value) for _, kind, value in Environment().lex(template) if kind != "whitespace"]
    for (_, before), (kind, value) in pairwise(tokens):
        # After a bracket or a comma, it unpacks arguments.
        if kind == "operator" and value == "**" and before not in "(,":
            raise ValueError("it computes a power")
