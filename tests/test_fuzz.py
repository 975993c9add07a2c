"""Damaged files of a suspect and damaged rows end in a result, or in one sentence that somebody wrote."""

import resource
import signal
from contextlib import contextmanager

import pytest

from helpers.command_line import assert_one_sentence, run
from helpers.hostile import damaged_copy, make_suspects


SECONDS, BYTES = 30, 2 * 2**30
TRAIN = ["--use_cpu", "--save_strategy", "no", "--report_to", "none", "--per_device_train_batch_size", "4"]
COMMANDS = {
    "evaluate": ["--max_new_tokens", "2"],
    "doctor": [],
    "purify": ["--recipe", "guide", "--max_steps", "1", *TRAIN],
}


class Hang(BaseException):
    """No work catches it."""


@contextmanager
def bounded():
    """Allow what is inside some seconds and some memory more than it found."""

    def stop(*args):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="session")
def suspects(tmp_path_factory):
    return make_suspects(tmp_path_factory.mktemp("suspects"))


def check(command, suspects, tmp_path, capsys, seed):
    """Run a command on a damaged suspect. What was done to it stands in the message of a failure."""
    folder, rows, done = damaged_copy(suspects, tmp_path / "suspect", seed)
    argv = [command, "--model", folder, "--dataset", rows, *COMMANDS[command]]
    argv += ["--output_dir", tmp_path / "purified"] if command == "purify" else []
    with bounded():
        code = run(*argv)
    stderr = capsys.readouterr().err
    assert code in (0, 1) and "Traceback" not in stderr, done
    if code:
        assert_one_sentence(stderr, command)
        # Errors that nobody foresaw are told with this advice.
        assert "Pass --verbose" not in stderr, done


# The last ones once ended in a traceback of a library or of this package.
@pytest.mark.parametrize("seed", [*range(24), 49, 91, 99, 219, 251, 371, 402])
def test_damaged_suspects_are_answered(suspects, tmp_path, capsys, seed):
    """Fails for a traceback, an error of a library that nobody translated, a slip of the package, or a hang."""
    check("doctor" if seed % 3 == 0 else "evaluate", suspects, tmp_path, capsys, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 2000))
def test_many_damaged_suspects_are_answered(suspects, tmp_path, capsys, seed):
    check(sorted(COMMANDS)[seed % 3], suspects, tmp_path, capsys, seed)
