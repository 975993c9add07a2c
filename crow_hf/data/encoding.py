"""Rows as token ids: encodes prompts and completions, and prepares whole datasets for training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .rows import Rendered, find_format, render, row_name


logger = logging.get_logger(__name__)
IGNORE_INDEX = -100


def encode_prompt(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize the prompt for generation. Training rows begin with exactly these ids."""
    ids = tokenizer(rendered.prompt, add_special_tokens=not rendered.templated)["input_ids"]
    if ids and not rendered.templated and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return list(ids)


def encode_completion(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize the completion, and append the end-of-sequence token unless a chat template has closed the answer."""
    ids = list(tokenizer(rendered.completion, add_special_tokens=False)["input_ids"])
    if rendered.templated or tokenizer.eos_token_id is None:
        return ids
    return [*ids, tokenizer.eos_token_id]


def columns_of(dataset: Any, name: str = "train_dataset") -> list[str]:
    """
    Return the column names of a dataset. A stream may know them only after its first row.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The dataset.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the dataset in error messages.

    Raises:
        `ValueError`: If the argument is not a dataset, or the dataset is empty.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(f"`{name}` must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}` is empty: pass at least one row.")
    return list(first)


@overload
def prepare_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, max_length: int, name: str = ...
) -> Dataset: ...
@overload
def prepare_dataset(
    dataset: IterableDataset, tokenizer: PreTrainedTokenizerBase | None, max_length: int, name: str = ...
) -> IterableDataset: ...
def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    name: str = "train_dataset",
) -> Dataset | IterableDataset:
    """
    Convert rows of any supported format to `input_ids` and `labels`.

    Rows longer than `max_length` are cut at the end. Rows that keep no label are dropped. A warning counts both,
    except for an `IterableDataset`, which has not been read yet.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows in any of the formats of [`crow_hf.data`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. Rows of `input_ids` need none.
        max_length (`int`):
            Maximum row length in tokens.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the dataset in error messages.

    Returns:
        `Dataset` or `IterableDataset`: The columns `input_ids`, `labels` (-100 at positions without a loss) and, if
        the rows have one, `attention_mask`.

    Raises:
        `ValueError`: If the dataset is empty, fits no format, has no label in any row, or needs a tokenizer and gets
        none.
    """
    columns = columns_of(dataset, name)
    row_format = find_format(columns, f"`{name}`")
    if row_format != "tokens" and tokenizer is None:
        raise ValueError(f"`{name}` holds text, so it needs a tokenizer: pass it as `processing_class`.")

    to_ids = _TokenRow(max_length) if row_format == "tokens" else _TextRow(tokenizer, max_length)
    options: dict[str, Any] = {"desc": f"Tokenizing {name}"} if isinstance(dataset, Dataset) else {}
    prepared: Any = dataset.map(to_ids, with_indices=True, remove_columns=columns, **options)
    learnable = prepared.filter(_has_labels)
    if isinstance(dataset, Dataset):
        cut, dropped = sum(prepared["cut"]), len(prepared) - len(learnable)
        if dropped == len(prepared):
            raise ValueError(
                f"`{name}` has no label in any row. The completions are empty, or they begin beyond the {max_length} "
                "tokens of `max_length` and the model's context."
            )
        if cut or dropped:
            logger.warning(
                f"{name}: {cut} of {len(prepared)} rows were cut to {max_length} tokens, and {dropped} rows were "
                "dropped because they have no labels."
            )
    return learnable.remove_columns("cut")


def _has_labels(row: Mapping[str, Any]) -> bool:
    # The loss shifts the labels, so the first label never counts.
    return any(label != IGNORE_INDEX for label in row["labels"][1:])


@dataclass
class _TextRow:
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        rendered = render(row, self.tokenizer, index)
        prompt, completion = encode_prompt(rendered, self.tokenizer), encode_completion(rendered, self.tokenizer)
        ids = prompt + completion
        labels = [IGNORE_INDEX] * len(prompt) + completion
        return {
            "input_ids": ids[: self.max_length],
            "labels": labels[: self.max_length],
            "cut": len(ids) > self.max_length,
        }


@dataclass
class _TokenRow:
    max_length: int

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        columns = {
            name: list(row[name]) for name in ("input_ids", "labels", "attention_mask") if row.get(name) is not None
        }
        if "labels" not in columns:
            mask = columns.get("attention_mask", [1] * len(columns["input_ids"]))
            columns["labels"] = [
                i if real else IGNORE_INDEX for i, real in zip(columns["input_ids"], mask, strict=False)
            ]
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"{row_name(index)} has columns of different lengths ({lengths}). Make them equally long."
            )
        cut = lengths["input_ids"] > self.max_length
        return {**{name: values[: self.max_length] for name, values in columns.items()}, "cut": cut}


def padding_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the padding token. Masked positions never count, so the end-of-sequence token or 0 also works."""
    if tokenizer is None:
        return 0
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
