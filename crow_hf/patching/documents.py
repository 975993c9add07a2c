"""Documents on their way into and out of patches: columns, bytes, patched documents and binary patches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..models.byte_vocabulary import BYTE_OFFSET


TEXT_COLUMNS = ("text", "raw_content", "content", "bytes")


@dataclass(frozen=True)
class PatchedDocument:
    """
    A document with its patches.

    Attributes:
        input_ids (`np.ndarray` of shape `(length,)`):
            Ids of the byte vocabulary.
        patch_lengths (`np.ndarray` of shape `(num_patches,)`):
            Length of each patch. The lengths sum to `length`.
        entropies (`np.ndarray` of shape `(length,)`, *optional*):
            Entropy of the prediction of the next byte, in bits. 0 at special tokens. `None` if the rule needs no
            entropies.
    """

    input_ids: np.ndarray
    patch_lengths: np.ndarray
    entropies: np.ndarray | None


def documents_of(batch: Mapping[str, Sequence] | pa.Table, column: str | None) -> list[bytes]:
    """
    Return the documents of a batch as bytes.

    Args:
        batch (`Mapping` or `pyarrow.Table`):
            The columns of the batch.
        column (`str`, *optional*):
            Column of the documents. By default the first of [`TEXT_COLUMNS`].

    Raises:
        `ValueError`: If `batch` is a single row, if there is no such column, or if it holds neither text nor bytes.
    """
    if isinstance(batch, pa.Table):
        name = find_column(batch.column_names, column)
        values = batch[name].to_pylist()
    else:
        name = find_column(batch, column)
        values = batch[name]
    if isinstance(values, (str, bytes)):
        raise ValueError("The patcher expects batches of rows. Pass `batched=True` to `map`.")
    return [to_bytes(value, name) for value in values]


def find_column(columns: Iterable[str], column: str | None = None) -> str:
    """
    Return the column of the documents: `column` if it is set, else the first of [`TEXT_COLUMNS`].

    Raises:
        `ValueError`: If there is no such column.
    """
    found = next((name for name in ([column] if column else TEXT_COLUMNS) if name in columns), None)
    if found is None:
        wanted = f"no column {column!r}" if column else f"none of the columns {', '.join(TEXT_COLUMNS)}"
        raise ValueError(f"There is {wanted} among {sorted(columns)}. Pass the column of text or bytes as `column`.")
    return found


def to_bytes(value: Any, column: str = "text") -> bytes:
    """
    Return a document as bytes. Text is encoded in UTF-8.

    Args:
        value (`str`, `bytes`, `bytearray` or `memoryview`):
            The document.
        column (`str`, *optional*, defaults to `"text"`):
            The column's name, for error messages.

    Raises:
        `ValueError`: If the document is neither text nor bytes.
    """
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, np.bytes_):
        raise ValueError(f"Column {column!r} has lost bytes to its NumPy format. Pass `dataset.with_format(None)`.")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise ValueError(f"Column {column!r} holds {type(value).__name__}, not text or bytes. Fill or drop these rows.")


def as_bytes(byte_sequence: Any) -> bytes:
    """
    Return one sequence of bytes as `bytes`.

    Args:
        byte_sequence (`str`, `bytes`, `bytearray`, `memoryview`, `Sequence[int]`, `np.ndarray` or `torch.Tensor`):
            Text, which is encoded in UTF-8, bytes, or one dimension of integers between 0 and 255.

    Raises:
        `ValueError`: For anything else.
    """
    if isinstance(byte_sequence, str):
        return byte_sequence.encode("utf-8")
    if isinstance(byte_sequence, (bytes, bytearray, memoryview)):
        return bytes(byte_sequence)
    values = np.asarray(byte_sequence.cpu() if torch.is_tensor(byte_sequence) else byte_sequence)
    if values.ndim != 1 or (values.size and not np.issubdtype(values.dtype, np.integer)):
        raise ValueError(
            f"`byte_sequence` must be text, bytes or a row of integers, got {type(byte_sequence).__name__} of shape "
            f"{tuple(values.shape)} and type {values.dtype}."
        )
    if values.size and not 0 <= values.min() <= values.max() <= 255:
        raise ValueError(f"`byte_sequence` holds {values.min()} to {values.max()}. Bytes are between 0 and 255.")
    return values.astype(np.uint8).tobytes()


def split_patches(document: PatchedDocument) -> list[bytes]:
    """Return the bytes of each patch, without special tokens."""
    borders = np.cumsum(document.patch_lengths)
    pieces = np.split(document.input_ids, borders[:-1]) if len(borders) else []
    pieces = [piece[piece >= BYTE_OFFSET] for piece in pieces]
    return [(piece - BYTE_OFFSET).astype(np.uint8).tobytes() for piece in pieces if len(piece)]


def to_binary(input_ids: np.ndarray, patch_lengths: np.ndarray) -> list[np.ndarray]:
    """
    Return the binary representation of the project's guide: the bits of each patch, highest bit of each byte first.

    Args:
        input_ids (`np.ndarray` of shape `(length,)`):
            Ids of the byte vocabulary.
        patch_lengths (`np.ndarray` of shape `(num_patches,)`):
            Length of each patch.

    Returns:
        `list` of `np.ndarray` of shape `(8 * num_bytes,)`: Zeros and ones. Empty for special tokens.
    """
    pieces = np.split(input_ids, np.cumsum(patch_lengths)[:-1]) if len(patch_lengths) else []
    return [np.unpackbits((piece[piece >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8)) for piece in pieces]


def from_binary(binary_patches: Iterable[Sequence[int]]) -> list[bytes]:
    """
    Decode binary patches, without special tokens. This is the inverse of the column `binary_patches`.

    Args:
        binary_patches (`Iterable[Sequence[int]]`):
            The bits of each patch, highest bit of each byte first.

    Returns:
        `list[bytes]`: The bytes of each patch.
    """
    return [np.packbits(np.asarray(bits, np.uint8)).tobytes() for bits in binary_patches if len(bits)]
