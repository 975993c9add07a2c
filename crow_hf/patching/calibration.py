"""patching.calibration"""

import math
from collections.abc import Iterable, Iterator, Mapping
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
from .patcher import EntropyPatcher, find_column, to_bytes


logger = logging.get_logger(__name__)
CALIBRATION_TOLERANCE = 0.02


@dataclass(frozen=True)
class Calibration:
    """
    What [`calibrate_threshold`] found.

    Attributes:
        threshold (`float`):
            In bits.
        relative_threshold (`float`):
            In bits.
        patch_size (`float`):
            Mean bytes of a patch that these thresholds give on the data.
        num_bytes (`int`):
            How many bytes it was measured on.
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
    Find the thresholds that give a mean patch of a certain size.

    Both thresholds are multiplied by one factor, found by bisection, so they keep the proportion they are given in. The
    predictor runs once over the data.

    Args:
        dataset (`Dataset`, `IterableDataset` or iterable of `str` or `bytes`):
            The data the size is wanted on.
        predictor (`ByteEntropyPredictor`, `str` or `Path`, *optional*):
            As for [`EntropyPatcher`].
        target_patch_size (`float`, *optional*, defaults to 4.5):
            Mean bytes of a patch, special tokens not counted.
        max_bytes (`int`, *optional*, defaults to 1000000):
            The rest of the data is not read.
        **kwargs:
            Settings of [`EntropyPatcher`]: `rule`, `column`, and the thresholds whose proportion is kept.

    Returns:
        `Calibration`: The thresholds nearest to the target, and what they achieve: data of few distinct entropies (all
        zeros, say) cannot be cut into patches of any size.

    Raises:
        `ValueError`: If there are no bytes, the target is below 1, the rule looks at no entropy, or `dataset` is a single
        text or a `DatasetDict`.
    """
    patcher = EntropyPatcher(predictor, add_special_tokens=False, **kwargs)
    if not patcher.rule.needs_entropies:
        raise ValueError(f"The rule {patcher.rule.rule!r} has no threshold to calibrate.")
    if target_patch_size < 1:
        raise ValueError(f"`target_patch_size` is in bytes and must be at least 1, got {target_patch_size}.")
    if isinstance(dataset, (str, bytes, Mapping)):
        raise ValueError("`dataset` must be rows or documents: pass one split of a DatasetDict, or a list of texts.")
    patcher._checked = True
    documents = patcher.patch(_take_bytes(dataset, patcher.column, max_bytes))
    num_bytes = sum(len(document.input_ids) for document in documents)
    if not num_bytes:
        raise ValueError("There are no bytes to calibrate on: pass at least one document that is not empty.")
    separator = np.array([BOS_TOKEN_ID], np.int16)
    ids = np.concatenate([part for document in documents for part in (separator, document.input_ids)])
    nothing = np.zeros(1, np.float32)
    entropies = np.concatenate([part for document in documents for part in (nothing, document.entropies)])
    ids, entropies = torch.from_numpy(ids)[None], torch.from_numpy(entropies)[None]

    def measure(factor: float) -> Calibration:
        settings = asdict(patcher.rule)
        settings |= {name: settings[name] * factor for name in ("threshold", "relative_threshold")}
        num_patches = patch_starts(ids, entropies, PatchRule(**settings)).sum().item() - len(documents)
        size = num_bytes / num_patches
        return Calibration(settings["threshold"], settings["relative_threshold"], size, num_bytes)

    low, high = math.log(1e-4), math.log(1e4)
    tried = [measure(math.exp(low)), measure(math.exp(high))]
    for _ in range(40):
        middle = (low + high) / 2
        tried.append(measure(math.exp(middle)))
        low, high = (middle, high) if tried[-1].patch_size < target_patch_size else (low, middle)
    found = min(tried, key=lambda found: abs(found.patch_size - target_patch_size))
    if abs(found.patch_size / target_patch_size - 1) > CALIBRATION_TOLERANCE:
        logger.warning(
            f"No thresholds give patches of {target_patch_size} bytes on these {num_bytes} bytes: the nearest are of "
            f"{found.patch_size:.2f}."
        )
    return found


def _take_bytes(dataset: Iterable, column: str | None, max_bytes: int) -> Iterator[bytes]:
    """Documents until there are enough bytes; the last one is cut."""
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
