"""Calibration: find the thresholds that give patches of a certain mean size."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..models.boundaries import PatchRule, patch_starts
from ..models.byte_vocabulary import BOS_TOKEN_ID
from ..models.modeling_byte_entropy import ByteEntropyPredictor
from .documents import PatchedDocument, find_column, to_bytes
from .patcher import EntropyPatcher


logger = logging.get_logger(__name__)
CALIBRATION_TOLERANCE = 0.02
_BISECTIONS = 40


@dataclass(frozen=True)
class Calibration:
    """
    The result of [`calibrate_threshold`].

    Attributes:
        threshold (`float`):
            Highest entropy inside a patch, as a share of 8 bits.
        relative_threshold (`float`):
            Highest rise of the entropy inside a patch, as a share of 8 bits.
        patch_size (`float`):
            Mean patch size on the data with these thresholds, in bytes.
        num_bytes (`int`):
            Number of bytes that the size was measured on.
    """

    threshold: float
    relative_threshold: float
    patch_size: float
    num_bytes: int


def calibrate_threshold(
    dataset: Dataset | IterableDataset | Iterable[str | bytes],
    predictor: ByteEntropyPredictor | str | Path | None = None,
    target_patch_size: float = 4.5,
    max_bytes: int = 1_000_000,
    **kwargs: Any,
) -> Calibration:
    """
    Find the thresholds that give patches of a certain mean size.

    Both thresholds are multiplied by one factor, which bisection finds, so their proportion stays as it is given,
    unless one of them would exceed the largest possible entropy. The predictor runs once over the data.

    Args:
        dataset (`Dataset`, `IterableDataset` or iterable of `str` or `bytes`):
            The data to measure the patch size on.
        predictor (`ByteEntropyPredictor`, `str` or `Path`, *optional*):
            The predictor or its location, as for [`EntropyPatcher`].
        target_patch_size (`float`, *optional*, defaults to 4.5):
            Mean patch size in bytes, without special tokens.
        max_bytes (`int`, *optional*, defaults to 1000000):
            Maximum number of bytes to read.
        **kwargs:
            Arguments of [`EntropyPatcher`]: `rule`, `column`, and the thresholds whose proportion is kept.

    Returns:
        `Calibration`: The thresholds whose patch size is closest to the target, and this size. Data with few distinct
        entropies (such as all zeros) cannot be cut into patches of any size.

    Raises:
        `ValueError`: If there are no bytes, if the target is below 1, if the rule uses no entropies, or if `dataset`
        is a
            single text or a `DatasetDict`.
    """
    patcher = EntropyPatcher(predictor, add_special_tokens=False, **kwargs)
    if not patcher.rule.needs_entropies:
        raise ValueError(f"The rule {patcher.rule.rule!r} has no threshold to calibrate.")
    if target_patch_size < 1:
        raise ValueError(f"`target_patch_size` is in bytes and must be at least 1, got {target_patch_size}.")
    if isinstance(dataset, (str, bytes, Mapping)):
        raise ValueError("`dataset` must be rows or documents. Pass one split of a DatasetDict, or a list of texts.")
    # The patcher must not warn about the thresholds that this function replaces.
    patcher._checked = True
    documents = patcher.patch(_take_bytes(dataset, patcher.column, max_bytes))
    num_bytes = sum(len(document.input_ids) for document in documents)
    if not num_bytes:
        raise ValueError("There are no bytes to calibrate on. Pass at least one document that is not empty.")
    ids, entropies = _join(documents)

    def measure(factor: float) -> Calibration:
        settings = asdict(patcher.rule)
        settings |= {name: min(settings[name] * factor, 1.0) for name in ("threshold", "relative_threshold")}
        num_patches = patch_starts(ids, entropies, PatchRule(**settings)).sum().item() - len(documents)
        size = num_bytes / num_patches
        return Calibration(settings["threshold"], settings["relative_threshold"], size, num_bytes)

    found = _bisect(measure, target_patch_size)
    if abs(found.patch_size / target_patch_size - 1) > CALIBRATION_TOLERANCE:
        logger.warning(
            f"No thresholds give patches of {target_patch_size} bytes on these {num_bytes} bytes. "
            f"The closest mean size is {found.patch_size:.2f}."
        )
    return found


def _bisect(measure: Callable[[float], Calibration], target: float) -> Calibration:
    """Return the calibration closest to the target, for factors between 1e-4 and 1e4 on a logarithmic scale."""
    low, high = math.log(1e-4), math.log(1e4)
    tried = [measure(math.exp(low)), measure(math.exp(high))]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        tried.append(measure(math.exp(middle)))
        low, high = (middle, high) if tried[-1].patch_size < target else (low, middle)
    return min(tried, key=lambda calibration: abs(calibration.patch_size - target))


def _join(documents: Sequence[PatchedDocument]) -> tuple[torch.Tensor, torch.Tensor]:
    """Join ids and entropies of all documents into one row each, with a special token before each document."""
    token, no_entropy = np.array([BOS_TOKEN_ID], np.int16), np.zeros(1, np.float32)
    ids = np.concatenate([part for document in documents for part in (token, document.input_ids)])
    entropies = np.concatenate([part for document in documents for part in (no_entropy, document.entropies)])
    return torch.from_numpy(ids)[None], torch.from_numpy(entropies)[None]


def _take_bytes(dataset: Iterable, column: str | None, max_bytes: int) -> Iterator[bytes]:
    """Yield documents until there are enough bytes. The last document is cut."""
    if isinstance(dataset, (Dataset, IterableDataset)):
        dataset = dataset.with_format(None)
    for row in dataset:
        if isinstance(row, Mapping):
            row = row[find_column(row, column)]
        document = to_bytes(row)[:max_bytes]
        max_bytes -= len(document)
        yield document
        if max_bytes <= 0:
            return
