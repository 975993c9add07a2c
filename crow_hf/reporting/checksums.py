"""Hashes of files: which ones a purification wrote, and whether they are still the same."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..files import FURTHER_TEMPLATES, check_regular, write_text


CHECKSUMS = "SHA256SUMS"


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
    files = [*folder.glob("*"), *folder.glob(FURTHER_TEMPLATES)]
    names = (file.relative_to(folder).as_posix() for file in files if file.is_file())
    # The name of a lock begins with a dot.
    return sorted(name for name in names if name != CHECKSUMS and not name.startswith("."))
