"""Shards of RedPajama: rows written as JSON lines, plain or compressed, and read again."""

import gzip
import json
import random
import re

import pytest

from crow_hf.patching.shards import RedPajamaReader


TEXTS = ["One document.\nTwo lines.", "Zwölf Boxkämpfer jagen Viktor", "数据 and 🦜🦜", "x"]


def to_jsonl(rows, **kwargs):
    """Return the rows as JSON lines. Rows that are bytes stay as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, **kwargs).encode() for row in rows]
    return b"".join(line + b"\n" for line in lines)


def rows_of(texts):
    return [{"text": text, "meta": {"number": number}} for number, text in enumerate(texts)]


def plain(data):
    return data


def zstandard_frame(data):
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


def streamed_frame(data):
    """Return a frame without a size, as `zstd` writes it from a pipe."""
    compressor = pytest.importorskip("zstandard").ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush()


COMPRESS = {
    "a.jsonl": plain,
    "a.json": plain,
    "a.jsonl.gz": gzip.compress,
    "a.json.gz": gzip.compress,
    "a.jsonl.zst": zstandard_frame,
    "b.jsonl.zst": streamed_frame,
}
ARCHIVES = ["a.jsonl.gz", "a.jsonl.zst"]


def write(path, rows, **kwargs):
    """Write rows to a file in the format of its name, and return the path."""
    path.write_bytes(COMPRESS[path.name](to_jsonl(rows, **kwargs)) if path.name in COMPRESS else to_jsonl(rows))
    return str(path)


def read(*files):
    reader = RedPajamaReader([str(file) for file in files])
    return list(reader), reader


def texts_of(rows):
    return [row["text"] for row in rows]


def numbers_in(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def incompressible(count=300):
    generator = random.Random(0)
    return [generator.randbytes(1000).hex() for _ in range(count)]
