"""The command line: `crow-hf COMMAND`. Each command is a module of [`crow_hf.cli.commands`]."""

from .main import main


__all__ = ["main"]
