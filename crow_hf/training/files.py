"""Text files that are written whole or not at all, and files that are links."""

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


def leads_outside(file: Path, folder: Path) -> bool:
    """
    Return whether a file of a model's folder is a link to a place outside of it, such as another's private file.

    Args:
        file (`Path`):
            The file.
        folder (`Path`):
            The folder. In the cache of the Hub, its files are links to the blobs of their repository.
    """
    places = [folder.resolve()]
    if places[0].parent.name == "snapshots":
        places.append(places[0].parents[1] / "blobs")
    return not any(file.resolve().is_relative_to(place) for place in places)
