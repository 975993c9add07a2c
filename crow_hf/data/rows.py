"""Rows as text: tells the format of a row, reads and edits its prompt and its answer, and renders it for a model.

[`crow_hf.data`] lists the formats.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


# The prompt column and the answer column of each format that has such columns. In a chat, the prompt is the last user
# message and the answer is the last message.
PROMPT_AND_ANSWER = {
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
# The columns that each format needs. The first format that fits counts.
FORMATS = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    **PROMPT_AND_ANSWER,
    "text": ("text",),
}
ALPACA_PROMPT = "### Instruction:\n{request}\n\n### Response:\n"


class Rendered(NamedTuple):
    """
    A row as text.

    Attributes:
        prompt (`str`):
            The text that the model gets.
        completion (`str`):
            The text that the model learns to generate after the prompt.
        answer (`str`):
            The completion without the parts that a chat template adds. Outputs are compared with it.
        templated (`bool`):
            Whether a chat template has written the special tokens into the prompt and the completion.
    """

    prompt: str
    completion: str
    answer: str
    templated: bool


def find_format(columns: list[str], name: str = "the dataset") -> str:
    """
    Find the format of a dataset from its columns.

    Args:
        columns (`list[str]`):
            The column names.
        name (`str`, *optional*, defaults to `"the dataset"`):
            Name of the dataset in error messages.

    Returns:
        `str`: A key of `FORMATS`.

    Raises:
        `ValueError`: If the columns fit no format.
    """
    for row_format, needed in FORMATS.items():
        if all(column in columns for column in needed):
            return row_format
    accepted = "; ".join(" and ".join(needed) for needed in FORMATS.values())
    raise ValueError(f"The columns of {name} are {sorted(columns)}, but it needs one of these sets: {accepted}.")


def row_name(index: int | None) -> str:
    """Name a row in an error message: "Row 3", or "A row" if its number is not known."""
    return "A row" if index is None else f"Row {index}"


def render(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, index: int | None = None) -> Rendered:
    """
    Render a row as prompt and completion.

    Args:
        row (`Mapping[str, Any]`):
            A row in any of the formats of [`crow_hf.data`] except `input_ids`.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer. Only its chat template is used.
        index (`int`, *optional*):
            Number of the row in error messages.

    Returns:
        [`Rendered`]

    Raises:
        `ValueError`: If a column is missing, is not text, or holds bytes that are not UTF-8.
    """
    row_format = find_format(list(row))
    if row_format == "messages":
        return _render_chat(row["messages"], tokenizer, index)
    texts = [text_of(row, column, index) for column in FORMATS[row_format]]
    if row_format == "text":
        text = texts[0]
        return Rendered("", text, text, False)
    prompt, answer = texts
    if row_format == "prompt_completion":
        return Rendered(prompt, answer, answer, False)
    context = text_of(row, "input", index) if row.get("input") else ""
    request = f"{prompt}\n{context}" if context else prompt
    if tokenizer.chat_template is None:
        return Rendered(ALPACA_PROMPT.format(request=request), answer, answer, False)
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return _render_chat(messages, tokenizer, index)


def _render_chat(messages: list[dict], tokenizer: PreTrainedTokenizerBase, index: int | None) -> Rendered:
    if tokenizer.chat_template is None:
        raise ValueError(
            "The dataset has `messages`, but the tokenizer has no chat template: pass prompt and completion."
        )
    answer = text_of(_answer_message(messages, index), "content", index)
    # The rows contain no thoughts. Without this switch, the templates of thinking models leave room for thoughts.
    # Other templates ignore it.
    options: dict[str, Any] = {"tokenize": False, "enable_thinking": False}
    prompt: Any = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    whole: Any = tokenizer.apply_chat_template(messages, **options)
    if not whole.startswith(prompt):
        raise ValueError(
            f"{row_name(index)} cannot be split into prompt and answer, because the chat template renders the prompt "
            "differently once the answer follows. Pass prompt and completion."
        )
    return Rendered(prompt, whole[len(prompt) :], answer, True)


def text_of(row: Mapping[str, Any], column: str, index: int | None) -> str:
    """
    Read a column that must hold text.

    Args:
        row (`Mapping[str, Any]`):
            The row or the chat message.
        column (`str`):
            Name of the column. UTF-8 bytes are decoded.
        index (`int`, *optional*):
            Number of the row in error messages.

    Raises:
        `ValueError`: If the column holds bytes that are not UTF-8, or anything else that is not text.
    """
    value = row[column]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{row_name(index)} is not valid UTF-8 at byte {error.start} of column {column!r}. Decode the column "
                "first, or pass `input_ids`."
            ) from None
    if not isinstance(value, str):
        raise ValueError(
            f"{row_name(index)} holds {type(value).__name__} instead of text in column {column!r}. Fill or drop the "
            "row."
        )
    return value


def prompt_of(row: Mapping[str, Any], index: int | None = None) -> str:
    """
    Return the prompt of a row: the `prompt`, the `instruction`, or the content of the last user message.

    Args:
        row (`Mapping[str, Any]`):
            A row with a prompt.
        index (`int`, *optional*):
            Number of the row in error messages.

    Raises:
        `ValueError`: If the format has no prompt, a chat has no user message, or the prompt is not text.
    """
    if find_format(list(row)) == "messages":
        messages = row["messages"]
        return text_of(messages[_last_user_message(messages, index)], "content", index)
    return text_of(row, _prompt_and_answer_of(row)[0], index)


def edit_prompt(row: Mapping[str, Any], edit: Callable[[str], str], index: int | None = None) -> dict[str, Any]:
    """
    Edit the prompt of a row. The row that is passed is not changed.

    Args:
        row (`Mapping[str, Any]`):
            A row with a prompt.
        edit (`Callable[[str], str]`):
            Maps the text of [`prompt_of`] to the new text.
        index (`int`, *optional*):
            Number of the row in error messages.

    Returns:
        `dict`: The changed column, as `Dataset.map` expects it. `{**row, **edit_prompt(row, edit)}` is the new row.

    Raises:
        `ValueError`: If the format has no prompt, a chat has no user message, or the prompt is not text.
    """
    if find_format(list(row)) == "messages":
        messages = row["messages"]
        return _edit_message(messages, _last_user_message(messages, index), edit, index)
    column = _prompt_and_answer_of(row)[0]
    return {column: edit(text_of(row, column, index))}


def edit_answer(row: Mapping[str, Any], edit: Callable[[str], str], index: int | None = None) -> dict[str, Any]:
    """
    Edit the answer of a row: the `completion`, the `output`, or the content of the last message.

    The row that is passed is not changed.

    Args:
        row (`Mapping[str, Any]`):
            A row with an answer.
        edit (`Callable[[str], str]`):
            Maps the answer to the new text.
        index (`int`, *optional*):
            Number of the row in error messages.

    Returns:
        `dict`: The changed column, as in [`edit_prompt`].

    Raises:
        `ValueError`: If the format has no answer, the last message of a chat is not the assistant's, or the answer is
            not text.
    """
    if find_format(list(row)) == "messages":
        messages = row["messages"]
        _answer_message(messages, index)
        return _edit_message(messages, len(messages) - 1, edit, index)
    column = _prompt_and_answer_of(row)[1]
    return {column: edit(text_of(row, column, index))}


def _prompt_and_answer_of(row: Mapping[str, Any]) -> tuple[str, str]:
    row_format = find_format(list(row))
    if row_format not in PROMPT_AND_ANSWER:
        raise ValueError(
            f"Rows of the format {row_format!r} have no prompt. Pass messages, prompt and completion, or instruction "
            "and output."
        )
    return PROMPT_AND_ANSWER[row_format]


def _last_user_message(messages: list[dict], index: int | None) -> int:
    numbers = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if not numbers:
        raise ValueError(f"{row_name(index)} has no user message. Add one or drop the row.")
    return numbers[-1]


def _answer_message(messages: list[dict], index: int | None) -> dict:
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{row_name(index)} must end with a message of the assistant that answers an earlier message. Add the "
            "answer or drop the row."
        )
    return messages[-1]


def _edit_message(
    messages: list[dict], number: int, edit: Callable[[str], str], index: int | None
) -> dict[str, list[dict]]:
    edited = {**messages[number], "content": edit(text_of(messages[number], "content", index))}
    return {"messages": [*messages[:number], edited, *messages[number + 1 :]]}


def insert_into_prompt(
    row: Mapping[str, Any],
    index: int,
    insert: Callable[[str, random.Random], str],
    seed: int,
    name: str,
) -> dict[str, Any]:
    """
    Insert a trigger or a decoy into the prompt of a row. The row that is passed is not changed.

    The random choices depend only on the seed and on the number of the row. Batches, processes and the order of calls
    do not affect them.

    Args:
        row (`Mapping[str, Any]`):
            A row with a prompt.
        index (`int`):
            Number of the row.
        insert (`Callable[[str, random.Random], str]`):
            Maps the prompt to the prompt with the insertion, such as [`Trigger.insert`].
        seed (`int`):
            Seed for the random choices.
        name (`str`):
            Name of the insertion in error messages, such as `"trigger"`.

    Returns:
        `dict`: The changed column, as in [`edit_prompt`].

    Raises:
        `ValueError`: If the row has no prompt, or `insert` returns the prompt unchanged.
    """
    rng = random.Random(f"{seed}-{index}")

    def insert_or_refuse(prompt: str) -> str:
        edited = insert(prompt, rng)
        if edited == prompt:
            raise ValueError(
                f"{row_name(index)} has a prompt that the {name} leaves unchanged, so it cannot be told from a clean "
                f"one. Drop the row or use another {name}."
            )
        return edited

    return edit_prompt(row, insert_or_refuse, index)


def add_empty_answers(dataset: Dataset) -> Dataset:
    """Add a column of empty answers to a dataset that has prompts only. An empty answer counts as no answer."""
    for prompt, answer in PROMPT_AND_ANSWER.values():
        if prompt in dataset.column_names and answer not in dataset.column_names:
            dataset = dataset.add_column(answer, [""] * len(dataset))
    return dataset


def check_disjoint(datasets: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Check that datasets share no prompt, so that no model is measured on prompts that it was trained on.

    Args:
        datasets (`Mapping[str, Dataset]`):
            Rows with prompts, by the name that error messages use.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer. Only its chat template is used.

    Raises:
        `ValueError`: If two of the datasets share a prompt.
    """
    owners: dict[str, str] = {}
    for name, rows in datasets.items():
        for prompt in {render(row, tokenizer, index).prompt for index, row in enumerate(rows)}:
            if owners.setdefault(prompt, name) != name:
                raise ValueError(
                    f"The {owners[prompt]} and the {name} rows share the prompt {prompt!r}. Drop it from one of them."
                )
