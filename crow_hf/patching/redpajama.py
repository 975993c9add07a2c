"""RedPajama, the clean data of the project's guide, as a dataset of patched bytes."""

import glob
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from ..models.modeling_byte_entropy import ByteEntropyPredictor
from .patcher import EntropyPatcher
from .shards import RedPajamaReader


logger = logging.get_logger(__name__)

# The sample of RedPajama-1T. Its loading script no longer runs, but its files can be read directly.
HUB_FOLDER = "hf://datasets/togethercomputer/RedPajama-Data-1T-Sample"
CRAWLS = ("cc_2019-30", "cc_2020-05", "cc_2021-04", "cc_2022-05", "cc_2023-06")
SOURCES = ("arxiv", "book", "c4", *CRAWLS, "github", "stackexchange", "wikipedia")


def get_redpajama_binary_dataset(
    max_chars: int | None = 1000,
    entropy_predictor: ByteEntropyPredictor | str | Path | None = None,
    entropy_threshold: float | None = 0.8,
    relative_threshold: float | None = 0.1,
    unit: str = "share",
    data_files: str | Path | Sequence[str | Path] | None = None,
    source: str = "c4",
    offline_sample: bool = False,
    **kwargs: Any,
) -> Dataset:
    """
    Load RedPajama as a dataset of patched bytes.

    Reading stops after `max_chars` characters, and only this part is downloaded from the Hub. The last document is
    cut.

    Args:
        max_chars (`int`, *optional*, defaults to 1000):
            Total number of Unicode characters to read. `None` reads everything.
        entropy_predictor (`ByteEntropyPredictor`, `str` or `Path`, *optional*):
            The predictor or its location, as for [`EntropyPatcher`]. Defaults to the one that ships with the package.
        entropy_threshold (`float`, *optional*, defaults to 0.8):
            Highest entropy inside a patch. The default comes from the guide. `None` takes the predictor's own.
        relative_threshold (`float`, *optional*, defaults to 0.1):
            Highest rise of the entropy inside a patch. The default comes from the guide. `None` takes the predictor's
            own.
        unit (`str`, *optional*, defaults to `"share"`):
            Unit of both thresholds: `"share"` of the largest possible entropy of a byte, `"bits"` (the largest is 8)
            or `"nats"`.
        data_files (`str`, `Path` or a sequence of them, *optional*):
            Local shards of RedPajama-1T or V2, or glob patterns. By default the sample on the Hub is read.
        source (`str`, *optional*, defaults to `"c4"`):
            Part of the sample on the Hub, one of [`SOURCES`].
        offline_sample (`bool`, *optional*, defaults to `False`):
            Whether to use a generated text instead, for trials without shards and without a network.
        **kwargs:
            Other arguments of [`EntropyPatcher`], such as `return_entropies`.

    Returns:
        `Dataset`: The columns `input_ids`, `patch_lengths`, `meta` (the document's metadata as JSON) and `source` (the
        file name).

    Raises:
        `ValueError`: If there is no such file or source, if the Hub cannot be reached, or if no document has text.
    """
    if max_chars is not None and max_chars < 1:
        raise ValueError(f"`max_chars` must be at least 1, got {max_chars}.")
    if offline_sample and data_files is not None:
        raise ValueError("`data_files` and `offline_sample` are different sources. Pass only one of them.")
    patcher = EntropyPatcher(
        entropy_predictor, entropy_threshold, relative_threshold, unit=unit, column="text", **kwargs
    )
    if offline_sample:
        rows = _take(_generated_documents(max_chars or 1000), max_chars)
    else:
        rows = _read(_local_files(data_files) if data_files is not None else [_hub_file(source)], max_chars)
    return Dataset.from_list(rows).map(patcher, batched=True, remove_columns="text", desc="Patching RedPajama")


def _hub_file(source: str) -> str:
    if source not in SOURCES:
        raise ValueError(f"RedPajama has no source {source!r}. Choose one of {', '.join(SOURCES)}.")
    return f"{HUB_FOLDER}/{source}_sample.jsonl"


def _local_files(data_files: str | Path | Sequence[str | Path]) -> list[str]:
    patterns = [data_files] if isinstance(data_files, (str, Path)) else data_files
    found = []
    for pattern in map(str, patterns):
        # An existing file may have a name that looks like a pattern.
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"There is no file {pattern}. `data_files` must be paths of shards or glob patterns.")
        found += matches
    if not found:
        raise ValueError("`data_files` is empty. Pass at least one shard.")
    return found


def _read(files: list[str], max_chars: int | None) -> list[dict[str, str]]:
    reader = RedPajamaReader(files)
    try:
        rows = _take(reader, max_chars)
    # The Hub's client raises errors of its HTTP library, which differs between versions.
    except Exception as error:
        raise ValueError(
            f"RedPajama cannot be read ({type(error).__name__}: {error}). Pass local shards as `data_files`, or "
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
    """Generate short reports with at least `num_chars` characters in total."""
    rng = random.Random(0)
    subjects = ("the gardener", "a young doctor", "her neighbour", "the old captain", "a student", "the committee")
    verbs = (
        "described",
        "repaired",
        "measured",
        "painted",
        "forgot about",
        "wrote a letter about",
        "was asked about",
    )
    objects = ("the stone bridge", "a broken clock", "the winter harvest", "a map of the valley", "two small boats")
    times = ("in the spring", "last Tuesday", "before the rain came", "in 1874", "for the third time", "at noon")
    number = written = 0
    while written < num_chars:
        sentences = [
            f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(objects)} {rng.choice(times)}." for _ in range(4)
        ]
        text = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences) + "\n"
        yield {"text": text, "meta": json.dumps({"number": number}), "source": "generated"}
        number, written = number + 1, written + len(text)
