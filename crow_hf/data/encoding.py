"""Rows as token ids: encodes prompts and completions, and prepares whole datasets for training."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .caching import CachedByRelease
from .rows import Rendered, find_format, has_answer, render, row_name, warn_of_unused_columns


logger = logging.get_logger(__name__)
IGNORE_INDEX = -100
# What a mark has and a word or a sentence has not, as in `<|end|>`, `[INST]` and `###`.
_SIGN = re.compile(r"[<>\[\]{}|｜#]")


class Encoded(NamedTuple):
    """
    A row as token ids.

    Attributes:
        prompt (`list[int]`):
            The ids that the model gets.
        completion (`list[int]`):
            The ids that the model learns to generate after them.
    """

    prompt: list[int]
    completion: list[int]


def encode(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """
    Tokenize a row as one text, and cut the ids between prompt and completion.

    Many tokenizers put a space before a text, so the ids of the completion alone are not those that the model itself
    would generate. A token that joins white space at the end of the prompt with the completion belongs to the
    completion. If a token joins more than that, the prompt keeps the ids that it has alone.

    The end-of-sequence token follows, unless a chat template has closed the answer. A text that already has this token
    at its end, or the beginning-of-sequence token at its start, does not get it twice.

    Args:
        rendered ([`Rendered`]):
            The row. If it has no completion, the prompt is cut as it would be before a letter.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.

    Returns:
        [`Encoded`]
    """
    prompt, completion, special = rendered.prompt, rendered.completion, not rendered.templated
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if special and eos is not None and completion.rstrip().endswith(tokenizer.eos_token):
        completion = completion.rstrip().removesuffix(tokenizer.eos_token)
    ids, cut = _cut(prompt, completion or "a", tokenizer, special)
    if cut is None:
        prompt_ids = _ids(prompt, tokenizer, special)
        # A line feed is joined with no letter, and no space is put after it.
        ids, cut = _cut("\n", completion or "a", tokenizer, False)
        answer_ids = ids[cut:]
    else:
        prompt_ids, answer_ids = ids[:cut], ids[cut:]
    answer_ids = answer_ids if completion else []
    if special and eos is not None:
        # Some tokenizers add this token themselves.
        answer_ids = [*(answer_ids[:-1] if answer_ids[-1:] == [eos] else answer_ids), eos]
    if special and (prompt_ids + answer_ids)[:2] == [bos, bos]:
        prompt_ids = prompt_ids[1:]
    return Encoded(prompt_ids, answer_ids)


def encode_prompt(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize the prompt for generation. Training rows begin with exactly these ids, see [`encode`]."""
    return encode(rendered, tokenizer).prompt


def encode_completion(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize the completion as it follows the prompt, see [`encode`]."""
    return encode(rendered, tokenizer).completion


def _cut(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, special: bool
) -> tuple[list[int], int | None]:
    """
    Tokenize prompt and completion as one text. Return the ids, and the number of those of the prompt. It is `None` if
    a token joins more than white space of the prompt with the completion.
    """
    if tokenizer.is_fast:
        encoded = _tokenized(prompt + completion, tokenizer, special, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        cut = next((number for number, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
        joined = cut < len(ids) and offsets[cut][0] < len(prompt.rstrip())
    else:
        # Such a tokenizer does not tell where its tokens come from.
        alone, answer = _ids(prompt, tokenizer, special), _ids(completion, tokenizer, False)
        begun = alone[:1] == [tokenizer.bos_token_id]
        if len(alone + answer) - begun == len((prompt + completion).encode()):
            # One id per byte. None is joined with another.
            return alone + answer, len(alone)
        ids = _ids(prompt + completion, tokenizer, special)
        pairs = enumerate(zip(ids, alone, strict=False))
        cut = next((number for number, (one, other) in pairs if one != other), min(len(ids), len(alone)))
        rest: Any = tokenizer.decode(alone[cut:], skip_special_tokens=True)
        joined = bool(rest.strip())
    return ids, None if joined else cut


def _tokenized(text: str, tokenizer: PreTrainedTokenizerBase, special: bool, **options: bool) -> Any:
    try:
        return tokenizer(text, add_special_tokens=special, **options)
    except BaseException as error:  # Some tokenizers fail on what they do not know, with any error.
        # A panic of the library, such as one over a regular expression without end, is no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"The tokenizer fails on the text {text[:50]!r} ({error}). Use the tokenizer that belongs to the model."
        ) from error


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    """Tokenize a text, with the special tokens before it, but without an end-of-sequence token after it."""
    ids = list(_tokenized(text, tokenizer, special)["input_ids"])
    added = (
        special
        and ids[-1:] == [tokenizer.eos_token_id]
        and not (tokenizer.eos_token and text.endswith(tokenizer.eos_token))
    )
    return ids[:-1] if added else ids


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

    Rows longer than `max_length` are cut at the end. Rows without an answer, and rows that keep no label, are dropped.
    A warning counts both, except for an `IterableDataset`, which has not been read yet.

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

    warn_of_unused_columns(columns, name)
    to_ids = _TokenRow(max_length) if row_format == "tokens" else _TextRow(tokenizer, max_length)
    options: dict[str, Any] = {"desc": f"Tokenizing {name}"} if isinstance(dataset, Dataset) else {}
    prepared: Any = dataset.map(to_ids, with_indices=True, remove_columns=columns, **options)
    learnable = prepared.filter(_has_labels)
    if isinstance(dataset, Dataset):
        cut, dropped = sum(prepared["cut"]), len(prepared) - len(learnable)
        if dropped == len(prepared):
            raise ValueError(
                f"`{name}` has no label in any row. The answers are empty, or they begin beyond the {max_length} "
                "tokens of `max_length` and the model's context."
            )
        if cut or dropped:
            logger.warning(
                f"{name}: {cut} of {len(prepared)} rows were cut to {max_length} tokens, and {dropped} rows were "
                "dropped because they have no answer, or none within these tokens."
            )
    return learnable.remove_columns("cut")


def _has_labels(row: Mapping[str, Any]) -> bool:
    # The loss shifts the labels, so the first label never counts.
    return any(label != IGNORE_INDEX for label in row["labels"][1:])


@dataclass
class _TextRow(CachedByRelease):
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        if not has_answer(row, index):
            return {"input_ids": [], "labels": [], "cut": False}
        prompt, completion = encode(render(row, self.tokenizer, index), self.tokenizer)
        ids = prompt + completion
        labels = [IGNORE_INDEX] * len(prompt) + completion
        return {
            "input_ids": ids[: self.max_length],
            "labels": labels[: self.max_length],
            "cut": len(ids) > self.max_length,
        }


@dataclass
class _TokenRow(CachedByRelease):
    max_length: int

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        columns = {
            name: _listed(row[name]) for name in ("input_ids", "labels", "attention_mask") if row.get(name) is not None
        }
        for name in ("input_ids", *columns):
            values = columns.get(name, [None])
            least = [IGNORE_INDEX] if name == "labels" else []
            if not all(isinstance(value, int) and (value >= 0 or value in least) for value in values):
                raise ValueError(f"{row_name(index)} holds more than token ids in column {name!r}. Drop the row.")
        if "labels" not in columns:
            mask = columns.get("attention_mask", [1] * len(columns["input_ids"]))
            columns["labels"] = [
                i if real else IGNORE_INDEX for i, real in zip(columns["input_ids"], mask, strict=False)
            ]
        if "attention_mask" in row:
            # Other rows of the dataset have one.
            columns.setdefault("attention_mask", [1] * len(columns["input_ids"]))
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"{row_name(index)} has columns of different lengths ({lengths}). Make them equally long."
            )
        cut = lengths["input_ids"] > self.max_length
        return {**{name: values[: self.max_length] for name, values in columns.items()}, "cut": cut}


def _listed(values: Any) -> list[Any]:
    # Datasets in the format "torch" or "numpy" give arrays.
    return values.tolist() if hasattr(values, "tolist") else list(values)


def check_ids(rows: Iterable[Sequence[int]], num_embeddings: int) -> int:
    """
    Check that every token id has an embedding. Without one, a model fails, on a GPU without a readable error.

    Args:
        rows (`Iterable[Sequence[int]]`):
            Token ids.
        num_embeddings (`int`):
            The number of embeddings of the model.

    Returns:
        `int`: The highest id.

    Raises:
        `ValueError`: If an id has no embedding.
    """
    highest = max((max(ids) for ids in rows if len(ids)), default=0)
    if highest >= num_embeddings:
        raise ValueError(
            f"The rows have the token id {highest}, but the model has {num_embeddings} embeddings. Use the model's "
            "own tokenizer, or call `model.resize_token_embeddings(len(tokenizer))`."
        )
    return highest


def marker_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """
    Return the ids of tokens that are marks and no words: special tokens, and added ones of the chat template.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
    """
    template = str(tokenizer.chat_template or "")
    added: Any = tokenizer.added_tokens_decoder
    marks = {
        number
        for number, token in added.items()
        # The template may have a text, of which any word could be made an added token.
        if token.special or (token.content in template and _SIGN.search(token.content))
    }
    return marks | set(tokenizer.all_special_ids)


def padding_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """
    Return the padding token, or else the end token, or 0. Masked positions never count, so any id works.

    A token that was added to a tokenizer may have no embedding, and is not used.
    """
    if tokenizer is None:
        return 0
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None and token < tokenizer.vocab_size), 0)
