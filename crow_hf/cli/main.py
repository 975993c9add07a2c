"""The entry point of the command line: finds the command, reads its arguments and reports its errors."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dis import opmap

from .. import __version__
from ..data.visible import printable
from ..files import own_claims
from ..secrets import hide_secrets, remember_secrets
from .arguments import command_module, is_word, make_arguments, near, read_arguments
from .options import COMMANDS, DECISIONS
from .words import as_options


_OVERVIEW = """usage: crow-hf COMMAND [--ARGUMENT VALUE ...]

Remove backdoors from language models, and measure whether it worked.

{commands}

`crow-hf COMMAND --help` lists the arguments of a command, and `crow-hf --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command. Until its arguments are read, nothing is imported that takes long.

    Args:
        argv (`Sequence[str]`, *optional*):
            The command and its arguments. Defaults to those of the process.

    Returns:
        `int`: 0 if the command did its work, 1 after an error, which is printed as one sentence, 2 if there is no
        such command, and 130 after Ctrl-C or SIGTERM. Of a command that decides something, as `purify` does with a
        policy, 1 is the answer no, and 2 means that there is none, as after an error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        lines = (
            f"  {name:11}{each.__doc__.strip().partition('. ')[0].rstrip('.')}." for name, each in COMMANDS.items()
        )
        print(_OVERVIEW.format(commands="\n".join(lines)), end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        meant = f": did you mean {near(command, COMMANDS)[0]}?" if near(command, COMMANDS) else "."
        shown = repr(command) if is_word(command) else "of that name"
        print(f"crow-hf: There is no command {shown}{meant} `crow-hf --help` lists them.", file=sys.stderr)
        return 2
    verbose, decides = False, command in DECISIONS
    remember_secrets(os.environ)
    try:
        values = read_arguments(command, argv[1:])
        decides = decides or values.get("policy") is not None
        _let_idle_threads_sleep()
        module = command_module(command)
        verbose = values.pop("verbose", False)
        with _stopped_by_sigterm(), own_claims(), _shown(command, verbose):
            code = module.run(*make_arguments(command, values))
        _leave_process_group()
    except KeyboardInterrupt as stop:
        text = str(stop) or "Stopped by Ctrl-C. Nothing more was written."
        print(f"crow-hf {command}: {printable(as_options(text, command))}", file=sys.stderr)
        # The exit code of a program that a shell's user stopped with Ctrl-C.
        return 130
    except SystemExit:
        raise
    # Files, chat templates and weights raise errors of every class deep inside the libraries that read them. A panic
    # of a library in Rust is no `Exception`.
    except BaseException as error:
        if verbose:
            print(printable(hide_secrets(traceback.format_exc())), file=sys.stderr)
        print(f"crow-hf {command}: {printable(as_options(_sentence_of(error), command))}", file=sys.stderr)
        return 2 if decides else 1
    return code or 0


def _sentence_of(error: BaseException) -> str:
    """The text of an error in one line. An error that nobody foresaw is told with its class."""
    text = " ".join(hide_secrets(str(error)).split())
    if isinstance(error, (ValueError, OSError, FloatingPointError, ImportError)) and text and not _is_slip(error):
        return text
    return f"{type(error).__name__}: {text[:500]}. Pass --verbose to see where it happened."


def _is_slip(error: BaseException) -> bool:
    """Return whether an error is a slip of this package: a value error in one of its lines that is no `raise`."""
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    if place is None or not isinstance(error, ValueError):
        return False
    is_ours = str(place.tb_frame.f_globals.get("__name__")).startswith(f"{__package__.partition('.')[0]}.")
    return is_ours and place.tb_frame.f_code.co_code[place.tb_lasti] != opmap["RAISE_VARARGS"]


def _shown(command: str, verbose: bool) -> AbstractContextManager[None]:
    """Show the phases of the `with` block. A command that only reads files has none, and needs no transformers."""
    if "transformers" not in sys.modules:
        return nullcontext()
    from .display import watched

    return watched(command, verbose)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, which `kill` and schedulers send, stop the block as Ctrl-C does. A handler of others stays."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _die_of_sigterm() -> None:
    """Let SIGTERM end the processes that are forked, as pools of processes do with it, without a traceback."""
    if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_die_of_sigterm)


def _let_idle_threads_sleep() -> None:
    """
    Let idle threads of PyTorch sleep. In a loop they make a run beside another busy process take ten times its time.

    The setting, for Linux, is read when PyTorch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "0")


def _leave_process_group() -> None:
    """
    Leave the group of processes that `accelerate launch` started, if this process is in one.

    Threads of a group that is still open can run while Python shuts down, and abort the process after its work is
    done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
