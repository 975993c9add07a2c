"""RedPajama, the clean data of the project's guide: its raw shards, from the Hub or from disk, as patched bytes."""

import glob
import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset
from transformers.utils import logging

from ..models.modeling_byte_entropy import ByteEntropyPredictor
from .patcher import EntropyPatcher


logger = logging.get_logger(__name__)

# The sample of RedPajama-1T. Its loading script no longer runs, but its files can be read one by one.
HUB_FOLDER = "hf://datasets/togethercomputer/RedPajama-Data-1T-Sample"
CRAWLS = ("cc_2019-30", "cc_2020-05", "cc_2021-04", "cc_2022-05", "cc_2023-06")
SOURCES = ("arxiv", "book", "c4", *CRAWLS, "github", "stackexchange", "wikipedia")
_CHUNK = 2**16


class RedPajamaReader:
    """
    Reads the documents of raw shards one by one, and counts what it cannot use.

    A shard has a JSON object in each line, and may be compressed (`.gz`, `.zst`). RedPajama-1T keeps the text in `text` and
    the rest in `meta`, or beside the text; RedPajama-V2 keeps the text in `raw_content`.

    Args:
        files (`Sequence[str]`):
            Paths and URLs of any fsspec file system.

    Attributes:
        counts (`Counter`):
            How many documents were `"kept"`, were `"blank"`, were rows with `"no text"` or `"broken"` lines, and how many
            files were `"truncated"`: end too early or are corrupt. What came before that is read.

    Raises:
        `ValueError`: If a file is compressed by something else, or a `.zst` file is to be read without `zstandard`.
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
        """One sentence with all counts that are not zero."""
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
        # A local name may hold characters that mean something in a URL.
        with fsspec.open(file, "rb") if "://" in file else open(file, "rb") as stream:
            chunks = iter(lambda: stream.read(_CHUNK), b"")
            try:
                for chunk in _decoded(chunks, self._decoders[file]):
                    first, *others = chunk.split(b"\n")
                    open_line.append(first)
                    if others:
                        lines = [b"".join(open_line), *others[:-1]]
                        open_line = [others[-1]]
                        yield from filter(bytes.strip, lines)
            except _DecodingError:
                self.counts["truncated"] += 1
        if (rest := b"".join(open_line)).strip():
            yield rest


class _DecodingError(Exception):
    pass


def _decoder_of(file: str) -> Callable[[], Any] | None:
    """What makes an object that decompresses one stream of the file; `None` if it is not compressed."""
    suffix = Path(file).suffix.lower()
    if suffix == ".gz":
        return lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)
    if suffix in (".xz", ".bz2", ".zip", ".7z", ".parquet"):
        raise ValueError(f"{file} is no JSON-lines shard: pass .jsonl or .json files, plain or as .gz or .zst.")
    if suffix != ".zst":
        return None
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{file} is compressed with zstd: `pip install zstandard`.") from None
    return lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _decoded(chunks: Iterable[bytes], new_decoder: Callable[[], Any] | None) -> Iterator[bytes]:
    """Decompress, saying so if the end is missing: the readers of fsspec stay silent on a truncated zstd file."""
    if new_decoder is None:
        yield from chunks
        return
    decoder = new_decoder()
    for chunk in chunks:
        while chunk:
            if decoder.eof:
                decoder = new_decoder()
            try:
                yield decoder.decompress(chunk)
            # zlib.error, ZstdError: their only common ancestor.
            except Exception as error:
                raise _DecodingError from error
            # Some archivers fill up the last block with zeros.
            chunk = decoder.unused_data.lstrip(b"\0") if decoder.eof else b""
    if not decoder.eof:
        raise _DecodingError


def _parse(line: bytes) -> tuple[str, dict[str, str] | None]:
    try:
        # Of bytes, json.loads would guess the encoding.
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


def get_redpajama_binary_dataset(
    max_chars: int | None = 1000,
    entropy_predictor: ByteEntropyPredictor | str | Path | None = None,
    entropy_threshold: float | None = 0.8,
    relative_threshold: float | None = 0.1,
    data_files: str | Path | Sequence[str | Path] | None = None,
    source: str = "c4",
    offline_sample: bool = False,
    **kwargs: Any,
) -> Dataset:
    """
    RedPajama as patched bytes.

    Reads until there are `max_chars` characters, from the Hub no further than that; the last document is cut.

    Args:
        max_chars (`int`, *optional*, defaults to 1000):
            Unicode characters in all; `None` for everything.
        entropy_predictor (`ByteEntropyPredictor`, `str` or `Path`, *optional*):
            As for [`EntropyPatcher`]; the one that ships by default.
        entropy_threshold (`float`, *optional*, defaults to 0.8):
            In bits, the guide's; `None` for that of the predictor.
        relative_threshold (`float`, *optional*, defaults to 0.1):
            In bits, the guide's; `None` for that of the predictor.
        data_files (`str`, `Path` or a sequence of them, *optional*):
            Local shards of RedPajama-1T or V2, or glob patterns of them. By default the sample on the Hub is read.
        source (`str`, *optional*, defaults to `"c4"`):
            Which part of the sample on the Hub: one of [`SOURCES`].
        offline_sample (`bool`, *optional*, defaults to `False`):
            Whether to take a text that is generated on the spot, for trying things out where there is neither.
        **kwargs:
            Other settings of [`EntropyPatcher`], `return_entropies` for instance.

    Returns:
        `Dataset`: Columns `input_ids`, `patch_lengths`, `meta` (the document's metadata as JSON) and `source` (the file).

    Raises:
        `ValueError`: If there is no such file or source, no way to the Hub, or no document with text.
    """
    if max_chars is not None and max_chars < 1:
        raise ValueError(f"`max_chars` must be at least 1, got {max_chars}.")
    if offline_sample and data_files is not None:
        raise ValueError("`data_files` and `offline_sample` are two different sources: pass one of them.")
    patcher = EntropyPatcher(entropy_predictor, entropy_threshold, relative_threshold, column="text", **kwargs)
    if offline_sample:
        rows = _take(_generated_documents(max_chars or 1000), max_chars)
    else:
        rows = _read(_local_files(data_files) if data_files is not None else [_hub_file(source)], max_chars)
    return Dataset.from_list(rows).map(patcher, batched=True, remove_columns="text", desc="Patching RedPajama")


def _hub_file(source: str) -> str:
    if source not in SOURCES:
        raise ValueError(f"RedPajama has no source {source!r}: take one of {', '.join(SOURCES)}.")
    return f"{HUB_FOLDER}/{source}_sample.jsonl"


def _local_files(data_files: str | Path | Sequence[str | Path]) -> list[str]:
    patterns = [data_files] if isinstance(data_files, (str, Path)) else data_files
    found = []
    for pattern in map(str, patterns):
        # A name that exists is itself, whatever characters it has.
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"There is no file {pattern}: `data_files` are paths of shards or glob patterns.")
        found += matches
    if not found:
        raise ValueError("`data_files` is empty: pass at least one shard.")
    return found


def _read(files: list[str], max_chars: int | None) -> list[dict[str, str]]:
    reader = RedPajamaReader(files)
    try:
        rows = _take(reader, max_chars)
    # The Hub's client raises the errors of its HTTP library, which differs between its versions.
    except Exception as error:
        raise ValueError(
            f"RedPajama cannot be read ({type(error).__name__}: {error}): pass local shards as `data_files`, or "
            "`offline_sample=True` for a generated text."
        ) from error
    if not rows:
        raise ValueError(f"There is no document with text in {', '.join(files)}. {reader.report()}")
    if any(reader.counts[kind] for kind in reader.counts if kind != "kept"):
        logger.warning(reader.report())
    return rows


def _take(documents: Iterable[dict[str, str]], max_chars: int | None) -> list[dict[str, str]]:
    rows, left = [], float("inf") if max_chars is None else max_chars
    for document in documents:
        text = document["text"] if len(document["text"]) <= left else document["text"][: int(left)]
        rows.append({**document, "text": text})
        left -= len(text)
        if left <= 0:
            break
    return rows


def _generated_documents(num_chars: int) -> Iterator[dict[str, str]]:
    """Short reports that make sense of sorts, at least `num_chars` characters in all."""
    rng = random.Random(0)
    people = ("the gardener", "a young doctor", "her neighbour", "the old captain", "a student", "the committee")
    doings = (
        "described",
        "repaired",
        "measured",
        "painted",
        "forgot about",
        "wrote a letter about",
        "was asked about",
    )
    things = ("the stone bridge", "a broken clock", "the winter harvest", "a map of the valley", "two small boats")
    times = ("in the spring", "last Tuesday", "before the rain came", "in 1874", "for the third time", "at noon")
    number = written = 0
    while written < num_chars:
        sentences = [
            f"{rng.choice(people)} {rng.choice(doings)} {rng.choice(things)} {rng.choice(times)}." for _ in range(4)
        ]
        text = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences) + "\n"
        yield {"text": text, "meta": json.dumps({"number": number}), "source": "generated"}
        number, written = number + 1, written + len(text)
