"""Bounds hold against files that unpack without end, and against programs that take all time or memory."""

import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from crow_hf.data import bounds
from crow_hf.data.bounds import apply_template, bounded, check_unpacked, most_bytes


MESSAGES = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "told"}]


def test_a_file_with_holes_is_as_large_as_it_is_on_the_disk(tmp_path):
    """Fails if a file of a terabyte of nothing may be read, or a plain file may not."""
    (tmp_path / "holes").touch()
    os.truncate(tmp_path / "holes", 2**40)
    assert most_bytes(tmp_path / "holes") < 2**30
    with pytest.raises(ValueError, match="unpacks to over"):
        check_unpacked(2**40, most_bytes(tmp_path / "holes"))
    (tmp_path / "plain").write_bytes(b"a" * 100_000)
    assert most_bytes(tmp_path / "plain") >= bounds.FREE_BYTES + 100_000


def test_a_file_system_may_count_no_blocks(tmp_path, monkeypatch):
    """Fails if a healthy file is refused where the file system does not say what it takes."""
    (tmp_path / "plain").write_bytes(b"a" * 100_000)
    monkeypatch.setattr(Path, "stat", lambda path: SimpleNamespace(st_size=2**30, st_blocks=0))
    assert most_bytes(tmp_path / "plain") > 2**30
    monkeypatch.setattr(Path, "stat", lambda path: SimpleNamespace(st_size=2**30))
    assert most_bytes(tmp_path / "plain") > 2**30


def test_time_and_memory_are_bounded_and_freed(monkeypatch):
    monkeypatch.setattr(bounds, "MAX_SECONDS", 0.05)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(TimeoutError), bounded():
        while True:
            pass
    with pytest.raises(MemoryError, match="512 MiB"), bounded():
        bytearray(2**30)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert len(bytearray(2**30)) == 2**30


def test_other_threads_leave_the_bounds_of_the_process_alone():
    """Fails if two threads that leave in the order in which they entered bound the process for ever."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    within = []

    def run():
        with bounded():
            within.append(resource.getrlimit(resource.RLIMIT_AS))

    with bounded():
        bound = resource.getrlimit(resource.RLIMIT_AS)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert within == [bound] and bound != before
    first, second = bounded(), bounded()
    for step in (
        first.__enter__,
        second.__enter__,
        *(lambda one=one: one.__exit__(*[None] * 3) for one in (first, second)),
    ):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def in_a_thread(function):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


def test_other_threads_are_interrupted(monkeypatch):
    """Fails if a template may take all time or memory where a server renders it in a thread of its own."""
    monkeypatch.setattr(bounds, "MAX_SECONDS", 0.05)
    held = []

    def take_time():
        with bounded():
            while True:
                pass

    def take_memory():
        with bounded():
            while True:
                held.append(bytearray(2**24))

    def work_afterwards():
        with bounded():
            pass
        time.sleep(0.2)
        return "done"

    with pytest.raises(TimeoutError, match="it takes over 0 seconds"):
        in_a_thread(take_time)
    assert in_a_thread(work_afterwards) == "done"
    monkeypatch.setattr(bounds, "MAX_SECONDS", 60)
    monkeypatch.setattr(bounds, "MAX_MEMORY", 2**27)
    with pytest.raises(MemoryError, match="128 MiB"):
        in_a_thread(take_memory)


def test_a_late_interruption_of_a_thread_is_the_last(monkeypatch):
    """Fails if the time that runs out at the very end of the block stops the thread later, or keeps its watcher."""
    threads, late = threading.active_count(), []

    class Event(threading.Event):
        def set(self):
            if not late and threading.get_ident() == threading.main_thread().ident:
                late.append(1)
                bounds._interrupt(threading.get_ident(), TimeoutError)
            super().set()

    monkeypatch.setattr(bounds.threading, "Event", Event)
    with pytest.raises(TimeoutError), bounds._watched():
        pass
    assert late and threading.active_count() == threads


def test_a_ring_that_nobody_hears_is_not_the_last(monkeypatch):
    monkeypatch.setattr(bounds, "MAX_SECONDS", 0.05)

    end, rings, stop = time.process_time() + 1, [], bounds._stop
    monkeypatch.setattr(bounds, "_stop", lambda *_: rings.append(1) if not rings else stop())
    with pytest.raises(TimeoutError), bounded():
        while time.process_time() < end:
            pass
    assert len(rings) == 1


def test_a_late_ring_leaves_no_bounds(monkeypatch):
    """Fails if the time that runs out at the very end of the block keeps the bound of the memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    disarm = signal.setitimer

    def ring(which, seconds, interval=0.0):
        disarm(which, seconds, interval)
        if not seconds:
            signal.raise_signal(signal.SIGVTALRM)

    monkeypatch.setattr(signal, "setitimer", ring)
    with pytest.raises(TimeoutError), bounded():
        pass
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it takes over"),
        ("{{ 'a' * 9999999999 }}", "MiB of memory"),
        ("{% set n = messages | length * 9999999999 %}{{ 'a' | center(n) }}", "MiB of memory"),
        (
            "{% set ns = namespace(s='a' * 99) %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "MiB",
        ),
        ("{% for i in range(99999) %}twenty characters...{% endfor %}", "it writes 1,999,980 characters"),
        ("{{ 9 ** (9 ** 9) }}", "it computes a power"),
    ],
)
def test_a_template_that_takes_all_time_or_memory_is_refused(template, said, byte_tokenizer, monkeypatch):
    monkeypatch.setattr("crow_hf.data.bounds.MAX_SECONDS", 0.1)
    monkeypatch.setattr("crow_hf.data.bounds.MAX_MEMORY", 2**27)
    byte_tokenizer.chat_template = template
    with pytest.raises(ValueError, match="Row 3 is refused by the tokenizer's chat template") as told:
        apply_template(MESSAGES, byte_tokenizer, "Row 3")
    assert said in str(told.value)


def test_two_stars_before_arguments_are_no_power(byte_tokenizer):
    byte_tokenizer.chat_template = "{% set a = {'b': 'c**d'} %}{{ dict(**a).b }}{{ messages | length }}"
    assert apply_template(MESSAGES, byte_tokenizer, "Row 3") == "c**d2"
