"""The entry point of the command line: finds the command, parses its arguments and reports its errors."""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from .arguments import COMMANDS, command_module, parse_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv (`Sequence[str]`, *optional*):
            The command and its arguments. Defaults to those of the process.

    Returns:
        `int`: 0 if the command did its work, 1 after an error, which is printed as one sentence, and 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    overview = argparse.ArgumentParser(
        prog="crow-hf",
        description="Remove backdoors from language models, and measure whether it worked.",
        epilog="`crow-hf COMMAND --help` lists the arguments of a command.",
    )
    overview.add_argument("--version", action="version", version=__version__)
    overview.add_argument("command", choices=COMMANDS, help="the command to run")
    command = overview.parse_args(argv[:1]).command
    try:
        command_module(command).run(*parse_arguments(command, argv[1:]))
        _leave_process_group()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"crow-hf {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"crow-hf {command}: {str(stop) or 'Stopped by Ctrl-C. Nothing more was written.'}", file=sys.stderr)
        # The exit code of a program that a shell's user stopped with Ctrl-C.
        return 130
    return 0


def _leave_process_group() -> None:
    """
    Leave the group of processes that `accelerate launch` started, if this process is in one.

    Threads of a group that is still open can run while Python shuts down, and abort the process after its work is done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
