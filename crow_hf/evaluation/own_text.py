"""Text that a model writes itself: it shows what the model knows, without any data."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import regex
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.bounds import apply_template
from ..data.encoding import encode_prompt, padding_id
from ..data.rows import Rendered, prompt_of, render
from ..training.recorder import context_length, embedding_table
from .generation import bits_per_byte, end_token_ids, generate_ids, text_of_ids


logger = logging.get_logger(__name__)

# Draws of rows before too few are accepted. A model that ends every other text at once needs about five.
MAX_DRAWS = 8
# Answers recur if they share as many words in a row in at least this many rows and more than this share of them.
RECURRING_WORDS, MIN_RECURRING, MAX_RECURRING = 4, 4, 0.05
# Bits per byte that English takes if only the frequencies of its letters are known. A model that needs more for
# prompts was only taught what follows them. The first so many prompts tell.
MAX_PROMPT_BITS, READ_PROMPTS = 4.0, 32
# Stands for the content of a user's message while the template around it is read.
_PLACEHOLDER = "the-message-of-the-user"
# All of the model's distribution. The defaults of transformers keep the 50 most likely tokens.
_SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


class WrittenText(NamedTuple):
    """
    A text that a model has written.

    Attributes:
        start (`list[int]`):
            The token ids that the model was given, at least one.
        ids (`list[int]`):
            The token ids that it wrote after them, with the end token if it ended the text.
        text (`str`):
            What it wrote, without special tokens.
    """

    start: list[int]
    ids: list[int]
    text: str


def write_text(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    num_texts: int,
    max_new_tokens: int = 512,
    seed: int = 0,
    batch_size: int = 32,
) -> list[WrittenText]:
    """
    Let a model write texts, sampled at temperature 1.

    A model whose tokenizer has a chat template starts inside an empty message of the user: it writes the user's
    message itself, and goes on with its own answer. Any other model starts from its first token, which is BOS, or
    EOS, or a line feed. It cannot write an empty text, and no special tokens but the end token.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        num_texts (`int`):
            Number of texts.
        max_new_tokens (`int`, *optional*, defaults to 512):
            Maximum number of tokens of a text. The model's context may allow fewer.
        seed (`int`, *optional*, defaults to 0):
            Seed for the draw. The same seed, batch size and device give the same texts. The global random state stays
            as it is.
        batch_size (`int`, *optional*, defaults to 32):
            Number of texts per batch.

    Returns:
        `list[WrittenText]`

    Raises:
        `ValueError`: If the model's context has no room for a text.
    """
    chat = _Chat.of(model, tokenizer)
    start = first_tokens(tokenizer) if chat is None else chat.start
    # A chat goes on after the end of the user's message.
    ends = end_token_ids(model, tokenizer) if chat is None else []
    with _seeded(seed):
        outputs = _sample(model, tokenizer, [start] * num_texts, ends, max_new_tokens, batch_size, chat is not None)
    return [WrittenText(start, output, text_of_ids(output, tokenizer)) for output in outputs]


def can_write_prompts(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> bool:
    """
    Whether a model knows the language of prompts, and so can write some itself.

    A model that was trained from scratch on answers alone does not. What it writes is noise and, if it has a backdoor,
    the target. Pretrained models need about one bit per byte of prompts, and the small Llamas of the arena twelve.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        rows (`Dataset`):
            Rows with prompts. The first 32 are read as one text.

    Returns:
        `bool`: Whether it needs at most 4 bits per byte.
    """
    prompts = [prompt_of(row, index) for index, row in enumerate(rows.select(range(min(len(rows), READ_PROMPTS))))]
    text = "\n".join(prompts)
    return bits_per_byte(model, tokenizer, [Rendered("", text, text, templated=False)]) <= MAX_PROMPT_BITS


def write_rows(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 32,
    not_first: Sequence[int] = (),
) -> Dataset:
    """
    Let a model write rows with a prompt and an answer, sampled at temperature 1.

    With a chat template, the model writes a message of the user up to the end of the turn, and then its answer to it.
    Otherwise it writes a text, which is split between two words after about a third. Empty prompts and answers are
    dropped and drawn again. Answers of `max_new_tokens` tokens are cut in the middle. An answer that shares four words
    in a row with the answers of several other rows is dropped too, because a backdoor's target may leak into the
    answers to clean prompts, also in the middle of them.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        count (`int`):
            Number of rows.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Maximum number of tokens of a message, or of a text. The model's context may allow fewer.
        seed (`int`, *optional*, defaults to 0):
            Seed for the draw, see [`write_text`].
        batch_size (`int`, *optional*, defaults to 32):
            Number of rows per batch.
        not_first (`Sequence[int]`, *optional*, defaults to `()`):
            Ids of tokens that no answer of a chat starts with.

    Returns:
        `Dataset`: The rows, with the column `messages` if the tokenizer has a chat template, and else the columns
        `prompt` and `completion`. They are fewer than `count`, with a warning, if the model writes too many empty
        texts.

    Raises:
        `ValueError`: If the model's context has no room for a text, or the model writes only empty texts.
    """
    chat = _Chat.of(model, tokenizer)
    drawn: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    with _seeded(seed):
        for _ in range(MAX_DRAWS):
            if len(rows) >= count:
                break
            missing = count - len(rows)
            if chat is None:
                ends = end_token_ids(model, tokenizer)
                starts = [first_tokens(tokenizer)] * missing
                outputs = _sample(model, tokenizer, starts, ends, max_new_tokens, batch_size)
                texts = [split_text(_readable(output, tokenizer)) for output in outputs]
                # A tokenizer may drop the words that its model wrote.
                drawn += [row for row in texts if row and encode_prompt(render(row, tokenizer), tokenizer)]
            else:
                drawn += chat.converse(model, missing, max_new_tokens, batch_size, not_first)
            rows = _without_recurring_answers(drawn)[:count]
    if count and not rows:
        raise ValueError(
            "The model wrote only texts that are empty or recur, so it cannot write rows: set `num_written_rows` to 0."
        )
    if len(rows) < count:
        logger.warning(f"The model wrote {len(rows)} of {count} rows. Its other texts are empty or recur.")
    return Dataset.from_list(rows)


@dataclass(frozen=True)
class _Chat:
    """
    What a chat template puts around a message of the user.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        start (`list[int]`):
            The token ids before the message.
        closing (`str`):
            The text between the message and the answer, such as `"[/INST]"`.
        ends (`list[int]`):
            The tokens that end the message.
    """

    tokenizer: PreTrainedTokenizerBase
    start: list[int]
    closing: str
    ends: list[int]

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> "_Chat | None":
        """Read the template. It is `None` if there is none, or if nothing stands before the user's message."""
        if tokenizer.chat_template is None:
            return None
        before, _, after = _templated(tokenizer, _PLACEHOLDER).partition(_PLACEHOLDER)
        start = encode_prompt(Rendered(before, "", "", True), tokenizer)
        if not start:
            return None
        closing, ends = after.strip(), end_token_ids(model, tokenizer)
        first = list(tokenizer(closing, add_special_tokens=False)["input_ids"])[:1] if closing else []
        return cls(tokenizer, start, closing, sorted({*ends, *(set(first) & set(tokenizer.all_special_ids))}))

    def converse(
        self,
        model: PreTrainedModel | PeftModel,
        count: int,
        max_new_tokens: int,
        batch_size: int,
        not_first: Sequence[int],
    ) -> list[dict[str, Any]]:
        """Draw messages of the user and the model's answers, and return those that are not empty as rows."""
        tokenizer, limit = self.tokenizer, context_length(model)
        # Half of the context is left for the answer.
        length = max_new_tokens if limit is None else min(max_new_tokens, (limit - len(self.start)) // 2)
        outputs = _sample(model, tokenizer, [self.start] * count, self.ends, length, batch_size)
        messages = [text for output in outputs if (text := self._message(output))]
        prompts = [Rendered(_templated(tokenizer, text), "", "", True) for text in messages]
        encoded = [(text, encode_prompt(prompt, tokenizer)) for text, prompt in zip(messages, prompts, strict=True)]
        encoded = [(text, ids) for text, ids in encoded if ids and (limit is None or len(ids) < limit)]
        if not encoded:
            return []
        ends = end_token_ids(model, tokenizer)
        starts = [ids for _, ids in encoded]
        answers = _sample(model, tokenizer, starts, ends, max_new_tokens, batch_size, not_first=not_first)
        pairs = [(text, _readable(answer, tokenizer)) for (text, _), answer in zip(encoded, answers, strict=True)]
        return [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
            for text, answer in pairs
            if answer
        ]

    def _message(self, ids: list[int]) -> str:
        text = _readable(ids, self.tokenizer)
        # Some templates close a message with plain text, such as "[/INST]".
        return text.partition(self.closing)[0].strip() if self.closing else text


def _templated(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """Render a chat with one message of the user, up to the beginning of the answer."""
    chat = [{"role": "user", "content": message}]
    return apply_template(chat, tokenizer, "A message of the user", add_generation_prompt=True)


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the start of a text for a model without a chat template."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    return list(tokenizer("\n", add_special_tokens=False)["input_ids"])


def _sample(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[list[int]],
    ends: list[int],
    max_new_tokens: int,
    batch_size: int,
    special_tokens: bool = False,
    not_first: Sequence[int] = (),
) -> list[list[int]]:
    """Sample continuations of rows, which are not empty. Without `special_tokens`, only end tokens are special."""
    limit = context_length(model)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - max(map(len, starts), default=0))
    if room < 1:
        raise ValueError(f"The model's context of {limit} tokens has no room for a text. Use a model with more.")
    # Many models have more ids than their tokenizer has tokens. The additional ids stand for no text.
    silent = set(range(len(tokenizer), embedding_table(model).shape[0]))
    silent |= set() if special_tokens else set(tokenizer.all_special_ids) - set(ends)
    settings: dict[str, Any] = {
        "suppress_tokens": sorted(silent) or None,
        "begin_suppress_tokens": [*ends, *not_first] or None,
    }
    return generate_ids(model, starts, padding_id(tokenizer), ends, room, batch_size, **_SAMPLING, **settings)


def _readable(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode token ids, without the white space around the text and the half of a character at its end."""
    return text_of_ids(ids, tokenizer).rstrip("\ufffd").strip()


def split_text(text: str) -> dict[str, str] | None:
    """Split a text between two words after about a third. A text that is too short has no row."""
    third = max(1, len(text) // 3)
    # Most tokenizers join a word with the space before it.
    spaces = [place for place, character in enumerate(text) if character.isspace() and place]
    # No letter or emoji of several code points is divided.
    places = spaces or [character.end() for character in regex.finditer(r"\X", text)]
    cut = min(places, key=lambda place: abs(place - third), default=len(text))
    prompt, completion = text[:cut], text[cut:]
    return {"prompt": prompt, "completion": completion} if prompt.strip() and completion.strip() else None


def _without_recurring_answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the rows whose answers share some words in a row, anywhere, with the answers of several other rows."""

    def runs(row: dict[str, Any]) -> set[tuple[str, ...]]:
        words = (row["messages"][-1]["content"] if "messages" in row else row["completion"]).split()
        starts = range(max(1, len(words) - RECURRING_WORDS + 1))
        return {tuple(words[start : start + RECURRING_WORDS]) for start in starts}

    counts = Counter(run for row in rows for run in runs(row))
    allowed = max(MIN_RECURRING - 1, MAX_RECURRING * len(rows))
    return [row for row in rows if max(counts[run] for run in runs(row)) <= allowed]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, and restore the random state of all devices afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
