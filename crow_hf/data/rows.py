"""Rows as text: tells the format of a row, reads and edits its prompt and its answer, and renders it for a model.

[`crow_hf.data`] lists the formats.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .bounds import apply_template


logger = logging.get_logger(__name__)

# The prompt column and the answer column of each format that has such columns. In a chat, the prompt is the last user
# message and the answer is the last message.
PROMPT_AND_ANSWER = {
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "preference": ("prompt", "chosen"),
    "question_answer": ("question", "answer"),
}
# The columns that each format needs. The first format that fits counts.
FORMATS = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    **PROMPT_AND_ANSWER,
    "text": ("text",),
}
# The columns that a format uses too if they are there.
_OPTIONAL = {"tokens": ("labels", "attention_mask"), "alpaca": ("input",), "dolly": ("context",)}
# What a message says stands under the first of these keys that it has, and who says it. ShareGPT has the second ones.
_ROLE, _CONTENT = ("role", "from"), ("content", "value")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
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
    if is_chat(row):
        return _render_chat(messages_of(row, index), tokenizer, index)
    if row_format == "text":
        text = _answer_of(row, "text", index)
        return Rendered("", text, text, False)
    messages = chat_of(row, index)
    request, answer = messages[0]["content"], messages[1]["content"]
    if _prompt_and_answer_of(row)[0] != "instruction":
        return Rendered(request, answer, answer, False)
    if tokenizer.chat_template is None:
        return Rendered(ALPACA_PROMPT.format(request=request), answer, answer, False)
    return _render_chat(messages, tokenizer, index)


def chat_of(row: Mapping[str, Any], index: int | None = None) -> list[dict]:
    """Return a row as the messages of a chat that ends with the answer. Other prompts become a user's message."""
    if is_chat(row):
        messages = messages_of(row, index)
        _answer_message(messages, index)
        return messages
    prompt_column, answer_column = _prompt_and_answer_of(row)
    prompt, answer = text_of(row, prompt_column, index), _answer_of(row, answer_column, index)
    optional = _OPTIONAL.get(find_format(list(row)), ())
    contexts = [text_of(row, column, index) for column in optional if row.get(column)]
    request = "\n".join([prompt, *contexts])
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def _render_chat(messages: list[dict], tokenizer: PreTrainedTokenizerBase, index: int | None) -> Rendered:
    if tokenizer.chat_template is None:
        raise ValueError(
            "The rows are chats, but the tokenizer has no chat template: pass prompt and completion as text."
        )
    answer = _answer_message(messages, index)["content"]
    prompt = apply_template(messages[:-1], tokenizer, row_name(index), add_generation_prompt=True)
    whole = apply_template(messages, tokenizer, row_name(index))
    if not whole.startswith(prompt):
        raise ValueError(
            f"{row_name(index)} cannot be split into prompt and answer, because the chat template renders the prompt "
            "differently once the answer follows. Pass prompt and completion."
        )
    return Rendered(prompt, whole[len(prompt) :], answer, True)


def messages_of(row: Mapping[str, Any], index: int | None = None) -> list[dict]:
    """
    Read the messages of a chat. Each gets a `role` in lower case and a `content`, also if they have ShareGPT's names.

    Raises:
        `ValueError`: If there is no list of messages, a message has no role, or one before the last has no text.
    """
    messages: list[Any] = []
    for column in _chat_columns(row):
        held = _messages_in(row, column)
        if not isinstance(held, (list, tuple)) or not all(isinstance(message, Mapping) for message in held):
            raise ValueError(
                f"{row_name(index)} holds {type(held).__name__} in column {column!r} instead of a list of messages, "
                "each with `role` and `content`. Convert the column, or drop the row."
            )
        messages += held
    read = []
    for number, message in enumerate(messages):
        role, content = _key(message, _ROLE), _key(message, _CONTENT)
        if not isinstance(message.get(role), str) or content not in message:
            raise ValueError(
                f"{row_name(index)} has the keys {sorted(message)} in message {number}, but each message needs `role` "
                "and `content`."
            )
        text = message[content]
        if isinstance(text, (list, tuple)) and all(isinstance(part, Mapping) for part in text):
            text = "".join(text_of(part, "text", index) if "text" in part else "\ufffc" for part in text)
            if "\ufffc" in text:
                raise ValueError(f"{row_name(index)} has more than text in message {number}. Drop the row.")
        said_by = _ROLES.get(message[role].lower(), message[role].lower())
        if text is None and said_by == "assistant" and (number == len(messages) - 1 or message.get("tool_calls")):
            # Who calls a tool may say nothing. At the end, the row has no answer.
            text = ""
        read.append({**message, "role": said_by, "content": text_of({content: text}, content, index)})
    return read


def _chat_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the columns whose messages are one chat, in their order. A row that is no chat has none."""
    columns = FORMATS[find_format(list(row))]
    is_conversational = columns[0] == "prompt" and isinstance(row["prompt"], (list, tuple))
    return columns if is_conversational or columns[0] in ("messages", "conversations") else ()


def _messages_in(row: Mapping[str, Any], column: str) -> Any:
    """Return the messages of a column. An answer may be text, as those of a suspect are."""
    held = row[column]
    is_answer = column in ("completion", "chosen") and isinstance(held, str | None)
    return [{"role": "assistant", "content": held}] if is_answer else held


def _key(message: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Return the name of a key that a message has. Datasets fill the keys that a message lacks with `None`."""
    return next((name for name in names if message.get(name) is not None), names[names[0] not in message])


def _answer_of(row: Mapping[str, Any], column: str, index: int | None) -> str:
    """Read the column of an answer. No value is no answer, like an empty one."""
    return "" if row[column] is None else text_of(row, column, index)


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
            f"{row_name(index)} holds {type(value).__name__} instead of text in column {column!r}. Fill the row, drop "
            "it, or convert the column to text."
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
    if is_chat(row):
        messages = messages_of(row, index)
        return messages[_last_user_message(messages, index)]["content"]
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
    if is_chat(row):
        return _edit_message(row, _last_user_message(messages_of(row, index), index), edit, index)
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
    if is_chat(row):
        messages = messages_of(row, index)
        _answer_message(messages, index)
        return _edit_message(row, len(messages) - 1, edit, index)
    column = _prompt_and_answer_of(row)[1]
    return {column: edit(_answer_of(row, column, index))}


def is_chat(row: Mapping[str, Any]) -> bool:
    """Return whether a row is a list of messages."""
    return bool(_chat_columns(row))


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
    row: Mapping[str, Any], number: int, edit: Callable[[str], str], index: int | None
) -> dict[str, list[dict] | str]:
    """Edit a message. It keeps its form, because all rows of a dataset have the same."""
    content = edit(messages_of(row, index)[number]["content"])
    for column in _chat_columns(row):
        messages = list(_messages_in(row, column))
        if number < len(messages):
            break
        number -= len(messages)
    if not isinstance(row[column], (list, tuple)):
        return {column: content}
    key = _key(messages[number], _CONTENT)
    parts = isinstance(messages[number][key], (list, tuple))
    messages[number] = {**messages[number], key: [{"type": "text", "text": content}] if parts else content}
    return {column: messages}


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


def fits_a_format(columns: list[str]) -> bool:
    """Return whether a dataset with these columns has all that a format needs. Prompts alone do not."""
    return any(set(needed) <= set(columns) for needed in FORMATS.values())


def has_prompts(columns: list[str]) -> bool:
    """Return whether rows with these columns have prompts, and are not only running text or token ids."""
    return find_format(columns) not in ("text", "tokens")


def add_empty_answers(dataset: Dataset) -> Dataset:
    """Add a column of empty answers to a dataset that has prompts only. An empty answer counts as no answer."""
    for prompt, answer in PROMPT_AND_ANSWER.values():
        if prompt in dataset.column_names and not fits_a_format(dataset.column_names):
            dataset = dataset.add_column(answer, [""] * len(dataset))
    return dataset


def has_answer(row: Mapping[str, Any], index: int | None = None) -> bool:
    """
    Return whether there is something to learn from a row. An answer of white space is none.

    Args:
        row (`Mapping[str, Any]`):
            A row in any of the formats of [`crow_hf.data`].
        index (`int`, *optional*):
            Number of the row in error messages.

    Raises:
        `ValueError`: If a chat cannot be read, or the answer is not text.
    """
    row_format = find_format(list(row))
    if row_format == "tokens":
        return True
    if is_chat(row):
        return bool(_answer_message(messages_of(row, index), index)["content"].strip())
    return bool(_answer_of(row, FORMATS[row_format][-1], index).strip())


def drop_unanswered(dataset: Dataset, name: str = "dataset") -> Dataset:
    """
    Drop the rows that have no answer, and the columns that are not used, with a warning of each. Prompts alone are
    returned: the suspect can answer them.

    Args:
        dataset (`Dataset`):
            Rows in any of the formats of [`crow_hf.data`].
        name (`str`, *optional*, defaults to `"dataset"`):
            Name of the dataset in messages.

    Raises:
        `ValueError`: If no row has an answer.
    """
    # Without them, later steps say nothing about them again.
    dataset = dataset.remove_columns(warn_of_unused_columns(dataset.column_names, name))
    if not fits_a_format(dataset.column_names):
        return dataset
    rows = dataset.with_format(None)
    kept = [number for number, row in enumerate(rows) if has_answer(row, number)]
    if len(kept) == len(dataset):
        return dataset
    if not kept:
        raise ValueError(
            f"No row of `{name}` has an answer. Fill the answers, or drop their column: the recipe strong takes "
            "prompts alone."
        )
    logger.warning(f"{len(dataset) - len(kept)} of {len(dataset)} rows of `{name}` have no answer and are dropped.")
    return dataset.select(kept)


def warn_of_unused_columns(columns: list[str], name: str = "dataset") -> list[str]:
    """Warn of columns that are not used, because an answer may stand there under another name, and return them."""
    if fits_a_format(columns):
        row_format = find_format(columns)
        used, why = {*FORMATS[row_format], *_OPTIONAL.get(row_format, ())}, ""
    else:
        used = {prompt for prompt, _ in PROMPT_AND_ANSWER.values()}
        used, why = used | {"input", "context"} if used & set(columns) else set(columns), ", and there is no answer"
    unused = sorted(set(columns) - used - {"triggered"})
    if unused:
        logger.warning(f"The columns {unused} of `{name}` are not used, only {sorted(used & set(columns))}{why}.")
    return unused
