"""The reader of raw RedPajama shards: documents one by one, and counts of skipped rows."""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

from ..data.bounds import FREE_BYTES, MAX_RATIO
from ..files import check_regular


# Of a compressed file, a piece of the first size can unpack to some 30 MiB. A line of the second size is no document.
_CHUNK, _MAX_LINE = 2**10, 2**26


class RedPajamaReader:
    """
    Reads the documents of raw shards one by one, and counts the rows that it skips.

    A shard has one JSON object per line and may be compressed (`.gz`, `.zst`). RedPajama-1T stores the text in `text`,
    and the metadata in `meta` or beside the text. RedPajama-V2 stores the text in `raw_content`.

    Args:
        files (`Sequence[str]`):
            Paths and URLs of any fsspec file system.

    Attributes:
        counts (`Counter`):
            Number of documents that were `"kept"` or `"blank"`, of rows with `"no text"`, of `"broken"` lines, and of
            `"truncated"` files, which end too early or are corrupt. The rows before the damage are read.

    Raises:
        `ValueError`: If a file has an unsupported compression, if a `.zst` file is read without `zstandard`, or, while
            reading, if a file is a pipe or a device, has a line without end, or unpacks to many times its size.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = [str(file) for file in files]
        self.counts: Counter[str] = Counter()
        self._decoders = {file: _decoder_of(file) for file in self.files}

    def __iter__(self) -> Iterator[dict[str, str]]:
        for file in self.files:
            for line in self._lines(file):
                kind, document = _parse(line)
                self.counts[kind] += 1
                if document is not None:
                    yield {**document, "source": file.rsplit("/", 1)[-1]}

    def report(self) -> str:
        """Return one sentence with all counts that are not zero."""
        names = {
            "kept": "documents kept",
            "blank": "blank ones skipped",
            "no text": "rows without text skipped",
            "broken": "broken lines skipped",
            "truncated": "files truncated or corrupt",
        }
        counted = [f"{self.counts[kind]} {name}" for kind, name in names.items() if self.counts[kind]]
        return f"RedPajama: {', '.join(counted) or 'nothing found'}."

    def _lines(self, file: str) -> Iterator[bytes]:
        open_line: list[bytes] = []
        length = 0
        if "://" not in file:
            check_regular(file)
        # `fsspec.open` would interpret special characters in a local file name.
        with fsspec.open(file, "rb") if "://" in file else open(file, "rb") as stream:
            chunks = iter(lambda: stream.read(_CHUNK), b"")
            try:
                for chunk in _decoded(chunks, self._decoders[file], file):
                    first, *others = chunk.split(b"\n")
                    open_line.append(first)
                    length += len(first)
                    if others:
                        lines = [b"".join(open_line), *others[:-1]]
                        open_line = [others[-1]]
                        length = len(others[-1])
                        yield from filter(bytes.strip, lines)
                    elif length > _MAX_LINE:
                        raise ValueError(f"{file} has a line of over {_MAX_LINE // 2**20} MiB: it is no shard.")
            except _DecodingError:
                self.counts["truncated"] += 1
        if (rest := b"".join(open_line)).strip():
            yield rest


class _DecodingError(Exception):
    pass


def _decoder_of(file: str) -> Callable[[], Any] | None:
    """Return a factory of decompressors for the file, or `None` if it is not compressed."""
    suffix = Path(file).suffix.lower()
    if suffix == ".gz":
        return lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)
    if suffix in (".xz", ".bz2", ".zip", ".7z", ".parquet"):
        raise ValueError(f"{file} is not a JSON-lines shard. Pass .jsonl or .json files, plain or as .gz or .zst.")
    if suffix != ".zst":
        return None
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{file} is compressed with zstd. Run `pip install zstandard`.") from None
    return lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _decoded(chunks: Iterable[bytes], new_decoder: Callable[[], Any] | None, file: str) -> Iterator[bytes]:
    """Decompress chunks. Raise an error if the end is missing, which the readers of fsspec do not for zstd files."""
    if new_decoder is None:
        yield from chunks
        return
    decoder, packed, size = new_decoder(), 0, 0
    for chunk in chunks:
        packed += len(chunk)
        while chunk:
            if decoder.eof:
                decoder = new_decoder()
            try:
                piece = decoder.decompress(chunk)
            # The only common base class of zlib.error and ZstdError.
            except Exception as error:
                raise _DecodingError from error
            size += len(piece)
            if size > FREE_BYTES + MAX_RATIO * packed:
                raise ValueError(
                    f"{file} unpacks to over {size // 2**20} MiB, many times its size: if you trust it, unpack it and "
                    "pass that."
                )
            yield piece
            # Some archivers fill the last block with zeros.
            chunk = decoder.unused_data.lstrip(b"\0") if decoder.eof else b""
    if not decoder.eof:
        raise _DecodingError


def _parse(line: bytes) -> tuple[str, dict[str, str] | None]:
    try:
        # For bytes, json.loads would guess the encoding.
        row = json.loads(line.decode("utf-8-sig"))
        text = next((row[name] for name in ("text", "raw_content") if isinstance(row.get(name), str)), None)
    except AttributeError:
        return "no text", None
    except (ValueError, RecursionError):
        return "broken", None
    if text is None:
        return "no text", None
    if not text.strip():
        return "blank", None
    try:
        text.encode()
    except UnicodeEncodeError:
        return "broken", None
    rest = {name: value for name, value in row.items() if name not in ("text", "raw_content")}
    meta = row["meta"] if isinstance(row.get("meta"), dict) else rest
    return "kept", {"text": text, "meta": json.dumps(meta)}
