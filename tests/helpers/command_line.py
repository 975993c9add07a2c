"""Run commands of the command line, and check what they print and write."""

from crow_hf.cli.main import main


def run(*argv):
    """Run a command and return its exit code, even if argparse exits."""
    try:
        return main([str(part) for part in argv])
    except SystemExit as leave:
        return leave.code


def files_in(folder):
    """Relative paths of all files in a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []


def assert_one_sentence(stderr, command):
    """Check that the last line is the only one of the command, and that there is no traceback or usage."""
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert lines and lines[-1].startswith(f"crow-hf {command}: "), stderr
    assert sum(line.startswith("crow-hf ") for line in lines) == 1
    assert "Traceback" not in stderr and "usage:" not in stderr
