"""Files written whole or not at all, folders that are temporary or one run's at a time, and links and pipes."""

import atexit
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout


LOCK, UNFINISHED = ".lock", ".unfinished-"
# The files of a model that stand in a folder inside its own.
FURTHER_TEMPLATES = "additional_chat_templates/*"
# What the recipe or the command that runs has claimed, with the folders of the command around it, and what this
# process has claimed where none runs.
_claims: ContextVar[tuple[ExitStack, set[Path]]] = ContextVar("claims")
_claims_of_process: tuple[ExitStack, set[Path]] = (ExitStack(), set())
atexit.register(_claims_of_process[0].close)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, where a loss of power does not lose them."""
    try:
        # Windows flushes only what may be written.
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except PermissionError:
        # Windows opens no folders.
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """
    Write a text file in one step: a reader sees the old file or the new one, and never a part of it.

    Args:
        path (`Path`):
            The file. Its folder is created if it does not exist.
        text (`str`):
            The content, written as UTF-8.
    """
    with whole_files(path.parent) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")


@contextmanager
def whole_files(folder: str | Path) -> Iterator[Path]:
    """
    Move the files that the `with` block writes into a folder at its end, flushed to the disk and each in one step.

    After an error, or Ctrl-C, nothing of them is left.

    Args:
        folder (`str` or `Path`):
            The folder. It is created if it does not exist, and its files of the same names are replaced.

    Yields:
        `Path`: An empty folder to write into.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=UNFINISHED, dir=folder) as name:
        unfinished = Path(name)
        yield unfinished
        # Weights come last, because whoever finds them takes the model for complete.
        files = sorted((file.suffix == ".safetensors", file) for file in unfinished.rglob("*") if file.is_file())
        for _, file in files:
            flush(file)
        for _, file in files:
            place = folder / file.relative_to(unfinished)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    flush(folder)


@contextmanager
def temporary_folder() -> Iterator[str]:
    """
    Make a folder that is removed at the end of the `with` block.

    Raises:
        `OSError`: After any error on a full disk, which might be told as a fault of the model that is written there.
    """
    with TemporaryDirectory() as folder:
        try:
            yield folder
        except Exception as error:
            place = Path(folder).parent
            if shutil.disk_usage(place).free < 2**20 and "No space left" in str(error):
                raise OSError(
                    f"The folder for temporary files, {place}, is full: free some space, or set TMPDIR to another one."
                ) from error
            raise


@contextmanager
def own_claims() -> Iterator[None]:
    """Free the output folders that the `with` block or decorated function claims at its end, also after an error."""
    with ExitStack() as stack:
        _, around = _claims.get(_claims_of_process)
        token = _claims.set((stack, set(around)))
        try:
            yield
        finally:
            _claims.reset(token)


def claim(output_dir: str | Path) -> None:
    """
    Keep other runs out of an output folder, until the block of [`own_claims`] or this process ends.

    A recipe may claim the folder that its command has claimed. Of several processes of a run, the first claims it.

    Raises:
        `ValueError`: If another run has claimed it.
        `OSError`: If nothing can be written to it.
    """
    folder = Path(output_dir).resolve()
    stack, claimed = _claims.get(_claims_of_process)
    if folder in claimed or os.environ.get("RANK", "0") != "0":
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"Another run is writing to {output_dir}: choose another `output_dir`.") from None
    except OSError as error:
        raise OSError(f"{output_dir} is not writable ({error.strerror}). Choose another `output_dir`.") from error
    except NotImplementedError:
        # Some network file systems have no locks.
        pass
    claimed.add(folder)
    stack.callback(_free, lock, made)


def _free(lock: FileLock, made: list[Path]) -> None:
    """Leave neither the file of a lock behind, nor the folders that were made for it alone."""
    if os.name == "nt":
        # Windows removes no open file. Elsewhere, the file of a lock that is free may be another run's.
        lock.release()
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
    try:
        for folder in made:
            folder.rmdir()
    except OSError:
        return


def is_unused(folder: Path) -> bool:
    """Return whether a folder has no files, apart from a lock and what a killed run left unfinished."""
    files = folder.iterdir() if folder.exists() else ()
    return all(file.name == LOCK or file.name.startswith(UNFINISHED) for file in files)


def check_regular(path: str | Path) -> None:
    """
    Refuse a pipe or a device, which may never end.

    Raises:
        `ValueError`: If the path leads to something else than a file or a folder.
    """
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise ValueError(f"{path} is a pipe or a device: pass a file.")


def leads_outside(file: Path, folder: Path) -> bool:
    """
    Return whether a file of a model's folder is a link to a place outside of it, such as another's private file.

    Args:
        file (`Path`):
            The file.
        folder (`Path`):
            The folder. In the cache of the Hub, its files are links to the blobs of their repository.
    """
    place = folder.resolve()
    snapshots = (each for each in (place, *place.parents) if each.parent.name == "snapshots")
    places = [place, *(each.parents[1] / "blobs" for each in snapshots)]
    return not any(file.resolve().is_relative_to(place) for place in places)
