"""Hashes of files: which ones a purification read, which ones it wrote, and whether they are still the same."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attacks.judges import CommandJudge, ModelJudge
from ..attacks.targets import BaseTarget
from ..data.bounds import check_regular
from ..files import write_text
from ..training.gguf import split_gguf
from ..training.hub import PUSHED
from .cost import folder_of_model


CHECKSUMS = "SHA256SUMS"
CARD = "README.md"


@dataclass(frozen=True)
class Changes:
    """
    How the files of a folder differ from its `SHA256SUMS`. All names are sorted.

    Attributes:
        same (`list[str]`):
            Files with the hashes that are written there.
        changed (`list[str]`):
            Files with other hashes.
        missing (`list[str]`):
            Files that are not there any more.
        added (`list[str]`):
            Files that are not listed.
    """

    same: list[str]
    changed: list[str]
    missing: list[str]
    added: list[str]

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.added)


def sha256_of(file: Path) -> str:
    """Return the SHA-256 hash of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksums_of_model(name: str, **options: Any) -> dict[str, str] | None:
    """
    Return the hashes of the files that a model or an adapter is loaded from, with those of its tokenizer. Its card is
    not among them.

    Args:
        name (`str`):
            A folder, or a name on the Hub, whose files are looked up in the cache.
        **options:
            The `revision` and the `cache_dir` that the model was loaded with.

    Returns:
        `dict[str, str]`: The hash of each file by its name. `None` if the files are not known.
    """
    folder = folder_of_model(name, **options)
    if folder is None:
        return None
    patterns = {*PUSHED, gguf} if (gguf := split_gguf(name)[1]) else PUSHED
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file() and file.name != CARD}
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in sorted(files)}


def checksums_of_judge(target: BaseTarget | None) -> dict[str, str] | None:
    """Return the hashes of the files of a judge: those of its model, or its program and the files that it is given."""
    if isinstance(target, ModelJudge):
        return checksums_of_model(target.model)
    return {str(file): sha256_of(file) for file in target.files} if isinstance(target, CommandJudge) else None


def write_checksums(folder: str | Path, known: Mapping[str, str] | None = None) -> None:
    """
    Write the `SHA256SUMS` of a folder, as `sha256sum --check` reads them.

    Checkpoints and the logs of trackers, which are folders, are left out.

    Args:
        folder (`str` or `Path`):
            The folder of a finished run.
        known (`Mapping[str, str]`, *optional*):
            Hashes of its files by name that are not computed again, as those of large weights take minutes.
    """
    known = known or {}
    lines = [f"{known.get(name) or sha256_of(Path(folder, name))}  {name}\n" for name in _files_in(Path(folder))]
    write_text(Path(folder) / CHECKSUMS, "".join(lines))


def compare_checksums(folder: str | Path) -> Changes:
    """
    Compare the files of a folder with its `SHA256SUMS`.

    Args:
        folder (`str` or `Path`):
            The output folder of a purification.

    Returns:
        [`Changes`]: It is true if there are any.

    Raises:
        `ValueError`: If the folder has no readable `SHA256SUMS`.
    """
    folder = Path(folder)
    check_regular(folder / CHECKSUMS)
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {CHECKSUMS}, which a purification writes last: wait until it is finished, or repeat it."
        ) from None
    except ValueError:
        raise ValueError(f"{folder / CHECKSUMS} is damaged: each line needs a hash, two spaces and a name.") from None
    outside = [name for name in listed if not Path(folder, name).resolve().is_relative_to(folder.resolve())]
    if outside:
        raise ValueError(f"{folder / CHECKSUMS} names {outside[0]!r}, outside of the folder: do not trust it.")
    there = {name: sha256_of(folder / name) for name in listed if (folder / name).is_file()}
    return Changes(
        same=sorted(name for name, digest in there.items() if digest == listed[name]),
        changed=sorted(name for name, digest in there.items() if digest != listed[name]),
        missing=sorted(listed.keys() - there.keys()),
        added=sorted(set(_files_in(folder)) - listed.keys()),
    )


def _files_in(folder: Path) -> Iterable[str]:
    files = {*folder.glob("*"), *(file for pattern in PUSHED for file in folder.glob(pattern))}
    names = (file.relative_to(folder).as_posix() for file in files if file.is_file())
    # The name of a lock begins with a dot.
    return sorted(name for name in names if name != CHECKSUMS and not name.startswith("."))
