"""Running commands, and what they may print and leave."""

from crow_hf.cli.main import main


def run(*argv):
    """The exit code, also where argparse leaves by itself."""
    try:
        return main([str(part) for part in argv])
    except SystemExit as leave:
        return leave.code


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []


def assert_one_sentence(stderr, command):
    """One line, the last, that begins with the command; nothing of Python's in it."""
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert lines and lines[-1].startswith(f"crow-hf {command}: "), stderr
    assert sum(line.startswith("crow-hf ") for line in lines) == 1
    assert "Traceback" not in stderr and "usage:" not in stderr
