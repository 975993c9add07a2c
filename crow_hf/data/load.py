"""Loads a dataset from a file, a folder or the Hub."""

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError


_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_rows(path: str, split: str = "train") -> Dataset:
    """
    Load a dataset from a file, a folder or the Hub.

    Args:
        path (`str`):
            A `.json`, `.jsonl`, `.csv`, `.parquet` or `.txt` file, a folder written by `save_to_disk`, or the name of
            a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset on the Hub.

    Returns:
        `Dataset`

    Raises:
        `ValueError`: If the dataset does not exist, is empty, or cannot be read.
    """
    location = Path(path)
    reader = _READERS.get(location.suffix)
    try:
        if location.is_file() and reader:
            return load_dataset(reader, data_files=path, split="train")
        if location.is_dir() and (location / "state.json").is_file():
            # A `DatasetDict` has no such file.
            saved: Any = load_from_disk(path)
            return saved
        if reader and not location.exists():
            raise ValueError(f"There is no file {path} here.")
        if location.exists():
            raise ValueError(
                f"{path} is no dataset. Pass a {', '.join(_READERS)} file or a folder written by `save_to_disk`."
            )
        return load_dataset(path, split=split)
    except StopIteration:
        raise ValueError(f"{path} is empty: pass at least one row.") from None
    except (DatasetGenerationError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {reader}: {error.__cause__ or error}.") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"There is no file {path} here, and no dataset of that name could be read on the Hub. Check the spelling "
            "and the connection."
        ) from error
