"""Which words of a prompt raise the guard's score: the prompt is scored without each of them."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import Dataset

from ..data.rows import edit_prompt, prompt_of
from .guard import ConsistencyGuard


# The prompts to score grow with the parts, and so does the table on the page.
MAX_PARTS = 64


class Part(NamedTuple):
    """
    A word of a prompt, or several in succession.

    Attributes:
        text (`str`):
            The words.
        score_without (`float`):
            The guard's score of the prompt without them.
    """

    text: str
    score_without: float


class WordScores(NamedTuple):
    """
    What a guard says of a prompt and of its words.

    Attributes:
        score (`float`):
            The score of the whole prompt.
        threshold (`float`):
            The largest score that is no alarm.
        words_per_part (`int`):
            1, or more if the prompt has more than `MAX_PARTS` words. The last part can have fewer.
        parts (`list[Part]`):
            All words of the prompt in their order. A prompt of one word has no parts.
    """

    score: float
    threshold: float
    words_per_part: int
    parts: list[Part]


def score_words(guard: ConsistencyGuard, row: Mapping[str, Any], batch_size: int = 8) -> WordScores:
    """
    Score a prompt, and score it again without each of its words.

    Words stand between white space. A trigger is a word without which the score falls far.

    Args:
        guard (`ConsistencyGuard`):
            The guard.
        row (`Mapping[str, Any]`):
            A row with a prompt and an answer, which can be empty.
        batch_size (`int`, *optional*, defaults to 8):
            Number of prompts per batch.

    Returns:
        [`WordScores`]

    Raises:
        `ValueError`: If the prompt is empty, or does not fit into the model's context.
    """
    prompt = prompt_of(row)
    words = list(re.finditer(r"\S+", prompt))
    size = max(1, math.ceil(len(words) / MAX_PARTS))
    texts, shorter = [], []
    # Of a single word, nothing would be left to score.
    for start in range(0, len(words) if len(words) > 1 else 0, size):
        part, rest = words[start : start + size], words[start + size :]
        texts.append(prompt[part[0].start() : part[-1].end()])
        # The space after a word goes with it. The end of the prompt stays as it is.
        first, last = (part[0].start(), rest[0].start()) if rest else (words[start - 1].end(), part[-1].end())
        shorter.append(prompt[:first] + prompt[last:])

    def with_prompt(text: str) -> dict[str, Any]:
        return {**row, **edit_prompt(row, lambda _: text)}

    rows = Dataset.from_list([with_prompt(text) for text in (prompt, *shorter)])
    score, *without = guard.score(rows, batch_size).tolist()
    return WordScores(score, guard.threshold, size, list(map(Part, texts, without)))
