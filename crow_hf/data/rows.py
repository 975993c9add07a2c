"""data.rows"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


FORMATS = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ALPACA_PROMPT = "### Instruction:\n{request}\n\n### Response:\n"


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
