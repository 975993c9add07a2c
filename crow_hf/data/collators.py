"""data.collators"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..models.byte_vocabulary import PAD_TOKEN_ID
from .encoding import IGNORE_INDEX


@dataclass
class CrowDataCollator:
    """
    Pads rows on the right, to the longest of the batch.

    Args:
        pad_token_id (`int`):
            Fills `input_ids` where `attention_mask` is 0 and `labels` is -100, so its value never counts: a tokenizer
            without a pad token needs no new one.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "attention_mask": 0}
        rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
        length = max(len(row["input_ids"]) for row in rows)
        return {
            name: torch.tensor([list(row[name]) + [value] * (length - len(row[name])) for row in rows])
            for name, value in fill.items()
        }


@dataclass
class PatchDataCollator:
    """
    Pads patched documents on the right, to the longest of the batch.

    Args:
        pad_token_id (`int`, *optional*, defaults to 263):
            Fills `input_ids` where `attention_mask` is 0 and `labels` is -100.

    Returns:
        `dict`: `input_ids`, `labels` and `attention_mask` of shape `(batch_size, sequence_length)`, `patch_lengths` of shape
        `(batch_size, num_patches)`, filled up with 0.
    """

    pad_token_id: int = PAD_TOKEN_ID

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        documents = [_PatchedRow.of(row, index) for index, row in enumerate(rows)]
        return {
            "input_ids": _padded([document.input_ids for document in documents], self.pad_token_id),
            "labels": _padded([document.labels for document in documents], IGNORE_INDEX),
            "attention_mask": _padded([torch.ones_like(document.input_ids) for document in documents], 0),
            "patch_lengths": _padded([document.patch_lengths for document in documents], 0),
        }


@dataclass
class PackedPatchDataCollator:
    """
    Packs patched documents into rows of a bounded number of patches, so that the latent transformer sees little padding.

    Positions begin anew with each document. That and the absence of an attention mask is how the models of transformers know
    that documents must not see each other; the padding at a row's end is one more document. It takes `use_cache=False`, as
    the Trainer has it: with a cache they do not look at the positions.

    Args:
        max_patches (`int`):
            Patches of a row. A document with more is cut between two patches, and its parts no longer see each other.
        pad_token_id (`int`, *optional*, defaults to 263):
            Fills `input_ids`.

    Returns:
        `dict`: `input_ids`, `labels` and `position_ids` of shape `(num_rows, sequence_length)`, `patch_lengths` and
        `patch_position_ids` of shape `(num_rows, num_patches)`. The first label of each document is -100: nothing foretells
        it.
    """

    max_patches: int
    pad_token_id: int = PAD_TOKEN_ID

    def __post_init__(self) -> None:
        if self.max_patches < 1:
            raise ValueError(f"`max_patches` must be at least 1, got {self.max_patches}.")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        documents = [_PatchedRow.of(row, index) for index, row in enumerate(rows)]
        parts = [part for document in documents for part in document.cut(self.max_patches)]
        bins = self._first_fit_decreasing(parts)
        length = max(sum(len(part.input_ids) for part in packed) for packed in bins)
        num_patches = max(sum(len(part.patch_lengths) for part in packed) for packed in bins)
        return {
            "input_ids": _padded(
                [torch.cat([part.input_ids for part in packed]) for packed in bins], self.pad_token_id
            ),
            "labels": _padded([torch.cat([part.labels_alone for part in packed]) for packed in bins], IGNORE_INDEX),
            "position_ids": _positions([[len(part.input_ids) for part in packed] for packed in bins], length),
            "patch_lengths": _padded([torch.cat([part.patch_lengths for part in packed]) for packed in bins], 0),
            "patch_position_ids": _positions(
                [[len(part.patch_lengths) for part in packed] for packed in bins], num_patches
            ),
        }

    def _first_fit_decreasing(self, parts: list["_PatchedRow"]) -> list[list["_PatchedRow"]]:
        bins, room = [], []
        for part in sorted(parts, key=lambda part: len(part.patch_lengths), reverse=True):
            needed = len(part.patch_lengths)
            fitting = next((number for number, free in enumerate(room) if free >= needed), None)
            if fitting is None:
                fitting = len(bins)
                bins.append([])
                room.append(self.max_patches)
            bins[fitting].append(part)
            room[fitting] -= needed
        return bins


class _PatchedRow(NamedTuple):
    input_ids: torch.Tensor
    labels: torch.Tensor
    patch_lengths: torch.Tensor

    @classmethod
    def of(cls, row: Mapping[str, Any], index: int) -> "_PatchedRow":
        if "patch_lengths" not in row:
            raise ValueError(
                f"Row {index} of the batch has no `patch_lengths`: map the dataset with `EntropyPatcher`, and set the "
                "Trainer's `remove_unused_columns=False`."
            )
        labels = row.get("labels")
        columns = (row["input_ids"], row["input_ids"] if labels is None else labels, row["patch_lengths"])
        document = cls(*(torch.as_tensor(column, dtype=torch.long) for column in columns))
        total, length = document.patch_lengths.sum().item(), len(document.input_ids)
        if total != length or (document.patch_lengths < 1).any():
            raise ValueError(
                f"Row {index} of the batch has patch lengths that sum to {total} for {length} bytes, or some below 1: patch "
                "it again, and cut rows only between patches."
            )
        if len(document.labels) != length:
            raise ValueError(f"Row {index} of the batch has {len(document.labels)} labels for {length} bytes.")
        return document

    def cut(self, max_patches: int) -> list["_PatchedRow"]:
        """Parts of at most `max_patches` patches."""
        groups = self.patch_lengths.split(max_patches)
        sizes = [group.sum().item() for group in groups]
        return [
            _PatchedRow(*part)
            for part in zip(self.input_ids.split(sizes), self.labels.split(sizes), groups, strict=True)
        ]

    @property
    def labels_alone(self) -> torch.Tensor:
        """The labels, but for the first: in a packed row it would be learned from the document before."""
        return torch.where(torch.arange(len(self.labels)) == 0, IGNORE_INDEX, self.labels)


def _padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _positions(lengths: list[list[int]], total: int) -> torch.Tensor:
    """Positions that begin anew with each length, and with what is left of the row."""
    return torch.stack([torch.cat([torch.arange(length) for length in [*row, total - sum(row)]]) for row in lengths])
