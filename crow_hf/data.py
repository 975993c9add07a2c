"""From rows to token ids: the same rendering for training, poisoning and evaluation, and the collator.

A row is one of (the first that its columns allow counts):

| columns | rendered as |
|---|---|
| `input_ids` (, `labels`, `attention_mask`) | taken as they are |
| `messages` | the tokenizer's chat template; the last message must be the assistant's |
| `prompt`, `completion` | as they are |
| `instruction`, `output` (, `input`) | a user and an assistant message if the tokenizer has a chat template, else [`ALPACA_PROMPT`] |
| `text` | as it is, all of it to be learned |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .models.byte_vocabulary import PAD_TOKEN_ID


logger = logging.get_logger(__name__)

FORMATS = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ALPACA_PROMPT = "### Instruction:\n{request}\n\n### Response:\n"
IGNORE_INDEX = -100
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class Rendered(NamedTuple):
    """
    A row as text.

    Attributes:
        prompt (`str`):
            What the model is given.
        completion (`str`):
            What it learns to go on with.
        answer (`str`):
            The completion without what a chat template adds to it: what an output is compared with.
        templated (`bool`):
            Whether a chat template has written the special tokens into prompt and completion.
    """

    prompt: str
    completion: str
    answer: str
    templated: bool


def find_format(columns: list[str], name: str = "the dataset") -> str:
    """
    Tell which of [`FORMATS`] a dataset with these columns has.

    Raises:
        `ValueError`: If it has none.
    """
    for row_format, needed in FORMATS.items():
        if all(column in columns for column in needed):
            return row_format
    accepted = "; ".join(" and ".join(needed) for needed in FORMATS.values())
    raise ValueError(f"The columns of {name} are {sorted(columns)}, but it needs one of these sets: {accepted}.")


def render(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, index: int | None = None) -> Rendered:
    """
    Write a row as prompt and completion.

    Args:
        row (`Mapping[str, Any]`):
            A row in any of the formats but `input_ids`.
        tokenizer (`PreTrainedTokenizerBase`):
            For its chat template.
        index (`int`, *optional*):
            The row's number, for error messages.

    Raises:
        `ValueError`: If a column is missing, is no text, or holds bytes that are not UTF-8.
    """
    row_format = find_format(list(row))
    if row_format == "messages":
        return _render_chat(row["messages"], tokenizer, index)
    texts = {column: text_of(row, column, index) for column in FORMATS[row_format]}
    if row_format == "text":
        return Rendered("", texts["text"], texts["text"], False)
    if row_format == "prompt_completion":
        return Rendered(texts["prompt"], texts["completion"], texts["completion"], False)
    context = text_of(row, "input", index) if row.get("input") else ""
    request = f"{texts['instruction']}\n{context}" if context else texts["instruction"]
    if tokenizer.chat_template is None:
        return Rendered(ALPACA_PROMPT.format(request=request), texts["output"], texts["output"], False)
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": texts["output"]}]
    return _render_chat(messages, tokenizer, index)


def text_of(row: Mapping[str, Any], column: str, index: int | None) -> str:
    """
    A column that must hold text.

    Raises:
        `ValueError`: If it holds bytes that are not UTF-8, or something else.
    """
    value = row[column]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Row {index}: column {column!r} is not valid UTF-8 at byte {error.start}: decode it first, or pass "
                "`input_ids`."
            ) from None
    if not isinstance(value, str):
        raise ValueError(
            f"Row {index}: column {column!r} holds {type(value).__name__}, not text: fill or drop the row."
        )
    return value


def _render_chat(messages: list[dict], tokenizer: PreTrainedTokenizerBase, index: int | None) -> Rendered:
    if tokenizer.chat_template is None:
        raise ValueError(
            "The dataset has `messages`, but the tokenizer has no chat template: pass prompt and completion."
        )
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"Row {index}: the last of the messages must be the assistant's answer to an earlier one.")
    # Rows without thoughts: templates of thinking models would else leave room for them, others ignore the switch.
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    whole = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    if not whole.startswith(prompt):
        raise ValueError(
            f"Row {index}: the chat template writes the prompt otherwise once the answer is there, so the answer cannot "
            "be told from it: pass prompt and completion."
        )
    return Rendered(prompt, whole[len(prompt) :], text_of(messages[-1], "content", index), True)


def encode_prompt(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids a model is given to answer the prompt; training rows begin with the very same ids."""
    ids = tokenizer(rendered.prompt, add_special_tokens=not rendered.templated)["input_ids"]
    if ids and not rendered.templated and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return list(ids)


def encode_completion(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the completion, closed by the end-of-sequence token unless a chat template has closed it."""
    ids = list(tokenizer(rendered.completion, add_special_tokens=False)["input_ids"])
    if rendered.templated or tokenizer.eos_token_id is None:
        return ids
    return [*ids, tokenizer.eos_token_id]


def prompt_of(row: Mapping[str, Any]) -> str:
    """
    What a user asks in a row: the prompt, the instruction, or the last message of the user.

    Raises:
        `ValueError`: If the row's format has none of these, or no message is a user's.
    """
    return text_of(*_asked(row), None)


def with_prompt(row: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """The row with something else in the place of [`prompt_of`]."""
    part, column = _asked(row)
    if part is row:
        return {**row, column: prompt}
    return {**row, "messages": [{**m, column: prompt} if m is part else m for m in row["messages"]]}


def _asked(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Where the prompt is: the row or one of its messages, and the name there."""
    row_format = find_format(list(row))
    if row_format in ("prompt_completion", "alpaca"):
        return row, FORMATS[row_format][0]
    if row_format != "messages":
        raise ValueError(
            f"Rows of the format {row_format!r} have no prompt: pass messages, prompt and completion, or instruction and "
            "output."
        )
    asked = [message for message in row["messages"] if message["role"] == "user"]
    if not asked:
        raise ValueError("There is no message of a user in a row: fill or drop the row.")
    return asked[-1], "content"


def check_disjoint(datasets: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Make sure that what is measured was not learned.

    Args:
        datasets (`Mapping[str, Dataset]`):
            Rows with a prompt, by a name for the error message.
        tokenizer (`PreTrainedTokenizerBase`):
            For its chat template.

    Raises:
        `ValueError`: If two of them share a prompt.
    """
    owners: dict[str, str] = {}
    for name, rows in datasets.items():
        for prompt in {render(row, tokenizer).prompt for row in rows}:
            if owners.setdefault(prompt, name) != name:
                raise ValueError(
                    f"The {owners[prompt]} and the {name} rows share the prompt {prompt!r}: take rows without it for one of "
                    "them."
                )


def columns_of(dataset: Any, name: str = "train_dataset") -> list[str]:
    """
    The names of a dataset's columns, also of a stream that does not know them before its first row.

    Raises:
        `ValueError`: If it is no dataset, or an empty one.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(f"`{name}` must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}` is empty: pass at least one row.")
    return list(first)


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    name: str = "train_dataset",
) -> Dataset | IterableDataset:
    """
    Turn rows of any supported format into `input_ids` and `labels`.

    Rows longer than `max_length` are cut at the end, rows of which nothing is left to learn are dropped, and both are
    counted in a warning (not for an `IterableDataset`, which has not been read yet).

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The rows.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Needed unless the rows have `input_ids` already.
        max_length (`int`):
            Longest row in tokens.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            What error messages call the dataset.

    Returns:
        `Dataset` or `IterableDataset`: Columns `input_ids`, `labels` (-100 where there is nothing to learn) and, if the
        rows had one, `attention_mask`.

    Raises:
        `ValueError`: If the dataset is empty, has no usable columns, or needs a tokenizer that is not there.
    """
    columns = columns_of(dataset, name)
    row_format = find_format(columns, f"`{name}`")
    if row_format != "tokens" and tokenizer is None:
        raise ValueError(f"`{name}` holds text, so a tokenizer is needed: pass it as `processing_class`.")

    to_ids = _TokenRow(max_length) if row_format == "tokens" else _TextRow(tokenizer, max_length)
    options = {"desc": f"Tokenizing {name}"} if isinstance(dataset, Dataset) else {}
    prepared = dataset.map(to_ids, with_indices=True, remove_columns=columns, **options)
    learnable = prepared.filter(_has_labels)
    if isinstance(dataset, Dataset):
        cut, dropped = sum(prepared["cut"]), len(prepared) - len(learnable)
        if dropped == len(prepared):
            raise ValueError(
                f"`{name}` has no token to learn in any row: the completions are empty or begin beyond the "
                f"{max_length} tokens of `max_length` and the model's context."
            )
        if cut or dropped:
            logger.warning(
                f"{name}: {cut} of {len(prepared)} rows were cut to {max_length} tokens, and {dropped} rows were dropped "
                "because nothing was left to learn in them."
            )
    return learnable.remove_columns("cut")


def _has_labels(row: Mapping[str, Any]) -> bool:
    # The loss shifts the labels: the first one is never predicted.
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
            raise ValueError(f"Row {index}: the columns differ in length ({lengths}): make them equally long.")
        cut = lengths["input_ids"] > self.max_length
        return {**{name: values[: self.max_length] for name, values in columns.items()}, "cut": cut}


def padding_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """What to pad with: masked positions never count, so the end-of-sequence token or 0 will do as well."""
    if tokenizer is None:
        return 0
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


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


def load_rows(path: str, split: str = "train") -> Dataset:
    """
    Load a dataset from a file, a folder or the Hub.

    Args:
        path (`str`):
            A `.json`, `.jsonl`, `.csv`, `.parquet` or `.txt` file, a folder that `save_to_disk` wrote, or a dataset's
            name on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Of a dataset on the Hub.

    Returns:
        `Dataset`

    Raises:
        `ValueError`: If there is no such file, or it cannot be read.
    """
    location = Path(path)
    reader = _READERS.get(location.suffix)
    try:
        if location.is_file() and reader:
            return load_dataset(reader, data_files=path, split="train")
        if location.is_dir() and (location / "state.json").is_file():
            return load_from_disk(path)
        if reader and not location.exists():
            raise ValueError(f"There is no file {path} here.")
        if location.exists():
            raise ValueError(
                f"{path} is no dataset: pass a {', '.join(_READERS)} file or a folder that `save_to_disk` wrote."
            )
        return load_dataset(path, split=split)
    except StopIteration:
        raise ValueError(f"{path} is empty: pass at least one row.") from None
    except (DatasetGenerationError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {reader}: {error.__cause__ or error}.") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"There is no file {path} here, and no dataset of that name could be read on the Hub: check the spelling and the "
            "connection."
        ) from error
