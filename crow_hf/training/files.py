"""Text files that are written whole or not at all."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """
    Write a text file in one step: a reader sees the old file or the new one, and never a part of it.

    Args:
        path (`Path`):
            The file. Its folder is created if it does not exist.
        text (`str`):
            The content, written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
