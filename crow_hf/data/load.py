"""Loads a dataset from a file, a folder or the Hub."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, TextIO

import pandas
import pyarrow
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pyarrow import parquet

from ..files import check_regular
from .bounds import check_unpacked, most_bytes


# Rows are converted to a table so many at a time.
_BATCH = 1_000
# Compressed files are read in parts of so many bytes.
_PART = 2**20
# The first bytes of files that are compressed with gzip, zstd, xz, bzip2 or zip.
_PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zX", b"BZh", b"PK\x03\x04")
# Each column is filled up for all rows.
_MAX_COLUMNS = 1_000
# The end of the name of a file of the Hub, which holds a part of a split.
_SHARD = re.compile(r"-\d+-of-(\d+)(-[0-9a-f]+)?$")
# The errors of the libraries that read broken files. The JSON of a file can be nested more deeply than Python reads.
_BROKEN = (ValueError, TypeError, OverflowError, OSError, EOFError, RecursionError, zlib.error, pyarrow.ArrowException)


def load_rows(path: str, split: str = "train") -> Dataset:
    """
    Load a dataset from a file, a folder or the Hub.

    A file is read into memory, as it is now and without a cache. Text stays as it stands in the file: a date is no
    point in time, and numbers become text. Only a `.parquet` file says itself what is a number.

    Args:
        path (`str`):
            A `.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet` or `.txt` file (texts also with `.gz` at the end), a folder
            written by `save_to_disk`, a folder with such a file of each split (also in its folder `data`, and in
            shards, as the Hub has them), or the name of a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a folder or of a dataset on the Hub.

    Returns:
        `Dataset`

    Raises:
        `ValueError`: If the dataset does not exist, is empty, or cannot be read.
    """
    location = Path(path)
    if location.is_file():
        return _load_file(location)
    if location.is_dir():
        return _load_folder(location, split)
    check_regular(location)
    if _reader(location):
        raise ValueError(f"There is no file {path} here.")
    try:
        return load_dataset(path, split=split)
    except (DatasetGenerationError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}.") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"There is no file {path} here, and no dataset of that name could be read on the Hub. Check the spelling "
            "and the connection."
        ) from error


def _load_file(path: Path) -> Dataset:
    reader = _reader(path)
    if reader is None:
        raise ValueError(f"{path} is no dataset. Pass a {', '.join(_READERS)} file or a folder of rows.")
    try:
        dataset = Dataset(reader(path))
    except _BROKEN as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not len(dataset):
        raise ValueError(f"{path} is empty: pass at least one row.")
    return dataset


def _load_folder(path: Path, split: str) -> Dataset:
    files: dict[str, list[Path]] = {}
    for file in sorted([*path.iterdir(), *path.glob("data/*")]):
        if file.is_file() and _reader(file):
            files.setdefault(_SHARD.sub("", _stem(file)), []).append(file)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        for file in path.rglob("*"):
            check_regular(file)
        # In memory, so that nothing is written into the folder.
        try:
            saved: Any = load_from_disk(str(path), keep_in_memory=True)
        except Exception as error:  # The library checks nothing of what stands in such a folder.
            raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}. Save it again.") from error
        if not isinstance(saved, DatasetDict):
            return saved
        splits = [str(name) for name in saved]
        if split in splits:
            return saved[split]
    elif split in files:
        return _load_shards(files[split])
    else:
        splits = list(files)
    if splits:
        raise ValueError(f"{path} has no split {split!r}, but {', '.join(splits)}: choose one of them with `split`.")
    raise ValueError(
        f"{path} is no dataset: pass a {', '.join(_READERS)} file, or a folder that has one of each split at its top "
        "or in `data`."
    )


def _load_shards(files: list[Path]) -> Dataset:
    """Load the file of a split, or all of its shards in their order."""
    names = {_stem(file) for file in files}
    shard = _SHARD.search(_stem(files[0]))
    if not len(names) == len(files) == (int(shard[1]) if shard else 1):
        raise ValueError(
            f"{', '.join(map(str, files))} are not one split: keep one file of it, or every shard, in the folder."
        )
    return concatenate_datasets([_load_file(file) for file in files])


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _reader(path: Path) -> Callable[[Path], pyarrow.Table] | None:
    name = path.name.lower().removesuffix(".gz")
    return _READERS.get(Path(name).suffix)


def _open(path: Path) -> TextIO:
    """Open a text, which may be compressed and may begin with a byte order mark."""
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    most, size = most_bytes(path), path.stat().st_size
    with opener(path, "rb") as stream:
        if opener is open:
            if stream.peek(4).startswith(_PACKED):
                raise ValueError("it is compressed: unpack it, or put .gz at the end of its name if it is a gzip")
            if size > most:
                raise ValueError(
                    f"it has over {most // 2**20} MiB, but most of them are holes: write it anew without them"
                )
        else:
            for number in count(1):
                check_unpacked(number * _PART, most)
                if len(stream.read(_PART)) < _PART:
                    break
    return opener(path, "rt", encoding="utf-8-sig")


def _read_json(path: Path) -> pyarrow.Table:
    """Read JSON lines, or one JSON document with a list of rows, with rows under a key, or with columns."""
    with _open(path) as file:
        lines = (line for line in file if line.strip())
        try:
            is_document = not isinstance(_parse(next(lines, "")), dict)
        except ValueError:
            is_document = True
        # A single object may be a row, or hold the rows.
        is_lines = path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        is_document |= not is_lines and next(lines, None) is None
        file.seek(0)
        return _table(_rows_of_document(file.read()) if is_document else _rows_of_lines(file))


def _parse(text: str) -> Any:
    """Parse JSON, in which a number with a fraction stays as it is written."""
    return json.loads(text.strip().removesuffix(","), parse_float=str)


def _rows_of_lines(lines: Iterable[str]) -> Iterator[dict]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _parse(line)
            except ValueError as error:
                raise ValueError(f"the JSON of line {number} is broken ({error})") from error


def _rows_of_document(text: str) -> list:
    text = text.strip()
    if text.endswith("]"):
        # A comma after the last row.
        text = f"{text[:-1].rstrip().removesuffix(',')}]"
    document = json.loads(text, parse_float=str) if text else []
    if isinstance(document, dict):
        lists = {key: value for key, value in document.items() if isinstance(value, list) and value}
        under = [
            value for value in lists.values() if all(isinstance(each, dict) and "role" not in each for each in value)
        ]
        if len(under) == 1:
            document = under[0]
        elif lists and len(lists) == len(document) and all(isinstance(v[0], (str, list)) for v in lists.values()):
            document = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        else:
            document = [document]
    if not isinstance(document, list):
        raise ValueError(f"it holds {text[:20]!r} and no rows")
    return document


def _table(rows: Iterable[Any]) -> pyarrow.Table:
    """Make a table of rows, in which numbers are text unless they are inside of lists, such as token ids."""
    tables = []
    names: set[str] = set()
    rows = iter(rows)
    while batch := list(islice(rows, _BATCH)):
        examples = [row if isinstance(row, dict) else {"text": row} for row in batch]
        columns = dict.fromkeys(name for row in examples for name in row)
        names |= columns.keys()
        if len(names) > _MAX_COLUMNS:
            raise ValueError(f"its rows have over {_MAX_COLUMNS} columns")
        tables.append(pyarrow.table({name: [_text_of_number(row.get(name)) for row in examples] for name in columns}))
    return pyarrow.concat_tables(tables, promote_options="permissive") if tables else pyarrow.table({})


def _text_of_number(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _read_csv(path: Path) -> pyarrow.Table:
    with _open(path) as file:
        header = file.readline()
        separator = max(",;\t", key=header.count)
        file.seek(0)
        # Everything is text, also "NA" and "007". The header is read as a row, because pandas would take the first
        # field of rows that are longer than a header for the name of the row.
        try:
            frame = pandas.read_csv(file, sep=separator, header=None, dtype=str, keep_default_na=False)
        except pandas.errors.ParserError as error:
            if "saw" not in str(error):
                raise
            raise ValueError(
                f"a row has more fields than the header, so put text with {separator!r} in quotes "
                f"({str(error).rpartition('C error: ')[2].strip()})"
            ) from error
        file.seek(0)
        frame.columns = pandas.read_csv(file, sep=separator, nrows=0).columns
        frame = frame[1:]
    return pyarrow.table({str(name): frame[name].tolist() for name in frame})


def _read_text(path: Path) -> pyarrow.Table:
    with _open(path) as file:
        return pyarrow.table({"text": [line.removesuffix("\n") for line in file]})


def _read_parquet(path: Path) -> pyarrow.Table:
    """Read a table in parts, because its few bytes can stand for many rows or for a long text."""
    most = most_bytes(path)
    with parquet.ParquetFile(path) as file:
        groups = range(file.num_row_groups)
        check_unpacked(sum(file.metadata.row_group(group).total_byte_size for group in groups), most)
        batches, size = [], 0
        for batch in file.iter_batches(_BATCH):
            batches.append(batch)
            size += batch.nbytes
            check_unpacked(size, most)
        return pyarrow.Table.from_batches(batches, file.schema_arrow)


_READERS: dict[str, Callable[[Path], pyarrow.Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
