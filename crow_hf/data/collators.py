"""Data collators: pad or pack encoded rows into batches of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..models.byte_vocabulary import PAD_TOKEN_ID
from .encoding import IGNORE_INDEX


@dataclass
class CrowDataCollator:
    """
    Pads rows on the right to the longest row of the batch.

    Args:
        pad_token_id (`int`):
            Padding for `input_ids`. At these positions `attention_mask` is 0 and `labels` is -100, so the value never
            counts. A tokenizer without a pad token needs no new one.

    Returns:
        `dict`: `input_ids`, `labels` and `attention_mask` of shape `(batch_size, sequence_length)`.
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
    Pads patched documents on the right to the longest document of the batch.

    Args:
        pad_token_id (`int`, *optional*, defaults to 263):
            Padding for `input_ids`. At these positions `attention_mask` is 0 and `labels` is -100.

    Returns:
        `dict`: `input_ids`, `labels` and `attention_mask` of shape `(batch_size, sequence_length)`, and
        `patch_lengths` of shape `(batch_size, num_patches)`, padded with 0.

    Raises:
        `ValueError`: If a row has no `patch_lengths`, or they do not fit the row.
    """

    pad_token_id: int = PAD_TOKEN_ID

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        documents = [_PatchedRow.of(row, index) for index, row in enumerate(rows)]
        return {
            "input_ids": _pad_right([document.input_ids for document in documents], self.pad_token_id),
            "labels": _pad_right([document.labels for document in documents], IGNORE_INDEX),
            "attention_mask": _pad_right([torch.ones_like(document.input_ids) for document in documents], 0),
            "patch_lengths": _pad_right([document.patch_lengths for document in documents], 0),
        }


@dataclass
class PackedPatchDataCollator:
    """
    Packs patched documents into rows with a maximum number of patches, so that the latent transformer processes little
    padding.

    Position ids restart at 0 with each document, and there is no attention mask. From that, the models of transformers
    infer that documents must not attend to each other. The padding at the end of a row counts as one more document.
    The model must run with `use_cache=False`, as in the Trainer. With a cache, the models ignore the position ids.

    Args:
        max_patches (`int`):
            Maximum number of patches per row. A longer document is cut between two patches, and its parts do not
            attend to each other.
        pad_token_id (`int`, *optional*, defaults to 263):
            Padding for `input_ids`.

    Returns:
        `dict`: `input_ids`, `labels` and `position_ids` of shape `(num_rows, sequence_length)`, `patch_lengths` and
        `patch_position_ids` of shape `(num_rows, num_patches)`. The first label of each document is -100, because no
        earlier token predicts it.

    Raises:
        `ValueError`: If `max_patches` is below 1, a row has no `patch_lengths`, or they do not fit the row.
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
            "input_ids": _pad_right(
                [torch.cat([part.input_ids for part in packed]) for packed in bins], self.pad_token_id
            ),
            "labels": _pad_right(
                [torch.cat([part.labels_in_pack for part in packed]) for packed in bins], IGNORE_INDEX
            ),
            "position_ids": _position_ids([[len(part.input_ids) for part in packed] for packed in bins], length),
            "patch_lengths": _pad_right([torch.cat([part.patch_lengths for part in packed]) for packed in bins], 0),
            "patch_position_ids": _position_ids(
                [[len(part.patch_lengths) for part in packed] for packed in bins], num_patches
            ),
        }

    def _first_fit_decreasing(self, parts: list["_PatchedRow"]) -> list[list["_PatchedRow"]]:
        bins: list[list[_PatchedRow]] = []
        room: list[int] = []
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
                f"Row {index} of the batch has no `patch_lengths`. Map the dataset with `EntropyPatcher`, and set "
                "`remove_unused_columns=False` for the Trainer."
            )
        labels = row.get("labels")
        columns = (row["input_ids"], row["input_ids"] if labels is None else labels, row["patch_lengths"])
        document = cls(*(torch.as_tensor(column, dtype=torch.long) for column in columns))
        total, length = document.patch_lengths.sum().item(), len(document.input_ids)
        if total != length or (document.patch_lengths < 1).any():
            raise ValueError(
                f"Row {index} of the batch has patch lengths that sum to {total} for {length} bytes, or some below 1. "
                "Patch it again, and cut rows only between patches."
            )
        if len(document.labels) != length:
            raise ValueError(f"Row {index} of the batch has {len(document.labels)} labels for {length} bytes.")
        return document

    def cut(self, max_patches: int) -> list["_PatchedRow"]:
        """Cut the document into parts of at most `max_patches` patches."""
        groups = self.patch_lengths.split(max_patches)
        sizes = [group.sum().item() for group in groups]
        return [
            _PatchedRow(*part)
            for part in zip(self.input_ids.split(sizes), self.labels.split(sizes), groups, strict=True)
        ]

    @property
    def labels_in_pack(self) -> torch.Tensor:
        """The labels without the first one. In a packed row, the previous document would predict it."""
        return torch.where(torch.arange(len(self.labels)) == 0, IGNORE_INDEX, self.labels)


def _pad_right(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _position_ids(lengths: list[list[int]], total: int) -> torch.Tensor:
    """Return position ids that restart at 0 with each document, and with the padding at the end of the row."""
    return torch.stack([torch.cat([torch.arange(length) for length in [*row, total - sum(row)]]) for row in lengths])
