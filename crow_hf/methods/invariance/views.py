"""Decoys, harmless random insertions into a prompt, and the three views of a row for the Invariance objective."""

import random
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...data.caching import CachedByRelease
from ...data.collators import CrowDataCollator
from ...data.encoding import IGNORE_INDEX, encode
from ...data.rows import insert_into_prompt, render
from ...data.words import Words, split_end
from .objective import VIEWS


# Share of the texts that are restyled, and the styles. A trigger need not be a word, it can also be a style.
RESTYLED = 0.4
_STYLES = (str.upper, str.lower, str.title, lambda text: f"{text}!", lambda text: text.replace(" ", ", "))


@dataclass(frozen=True)
class Decoy:
    """
    Inserts one to five random pieces into a text, in one place or in several, and restyles some texts.

    A piece consists of random letters, a word of the data, digits and punctuation, or a mixture of characters. The
    class has the interface of a [`Trigger`], so that it can be inserted in the same way.

    Args:
        words (`tuple[str, ...]`):
            The words to draw from. Without any, letters are drawn instead.
        together (`bool`, *optional*, defaults to `False`):
            Whether all pieces are inserted in one place. The text is then never restyled.
    """

    words: tuple[str, ...]
    together: bool = False

    def insert(self, text: str, rng: random.Random) -> str:
        """
        Insert the decoy at the start, at the end or between two words.

        A group of pieces with a word of the data is always inserted at the start. White space and room for thoughts
        at the end stay there.

        Args:
            text (`str`):
                The text.
            rng (`random.Random`):
                The generator to draw from.

        Returns:
            `str`: The text with the decoy.
        """
        body, end = split_end(text)
        is_restyled = not self.together and rng.random() < RESTYLED
        styled = rng.choice(_STYLES)(body) if is_restyled else body
        if styled != body and rng.random() < 0.5:
            return styled + end
        words = Words.of(styled)
        pieces = [self._piece(rng) for _ in range(rng.randint(1, 5))]
        groups = [pieces] if self.together or rng.random() < 0.5 else [[piece] for piece in pieces]
        for group in groups:
            place = rng.choice([0, len(words), rng.randint(0, len(words)), rng.randint(0, len(words))])
            if any(piece in self.words for piece in group):
                # Inside a prompt, a word of the data could change its meaning, and with it the right answer.
                place = 0
            for number, piece in enumerate(group):
                words.insert(place + number, piece)
        return str(words) + end

    def _piece(self, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.35 or (kind < 0.70 and not self.words):
            return _draw(rng, string.ascii_letters, 2, 10)
        if kind < 0.70:
            return rng.choice(self.words)
        if kind < 0.85:
            return _draw(rng, string.digits + string.punctuation, 1, 8)
        return _draw(rng, string.ascii_lowercase + string.digits + string.punctuation, 2, 10)


def words_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the words of texts, for decoys to draw from."""
    words = {word.strip() for text in texts for part in text.split() for word in Words.of(part).words}
    return tuple(sorted(words - {""}))


def _draw(rng: random.Random, characters: str, shortest: int, longest: int) -> str:
    return "".join(rng.choice(characters) for _ in range(rng.randint(shortest, longest)))


@dataclass
class ViewRow(CachedByRelease):
    """
    Creates the three views of a row, to be used as `Dataset.map(ViewRow(...), with_indices=True)`.

    The decoys depend only on the seed and the row's index, so a resumed run sees the same decoys.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        words (`tuple[str, ...]`):
            The words that [`Decoy`] draws from.
        max_length (`int`):
            Maximum length of a view in tokens. The answer is truncated by the same amount in all views.
        seed (`int`, *optional*, defaults to 0):
            Seed for the decoys.
        label_weight (`float`, *optional*, defaults to 0.0):
            Share of the row's own answer in the teacher.

    Returns:
        `dict`: `prompts`, the token ids of x, x + d and x + d'; `completion`, the token ids of the answer; `length`,
        the length of the longest view in tokens; `inserted`, the start and the end of d' in its prompt;
        `label_weight`.

    Raises:
        `ValueError`: If a row's prompt is empty.
    """

    tokenizer: PreTrainedTokenizerBase
    words: tuple[str, ...]
    max_length: int
    seed: int = 0
    label_weight: float = 0.0

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        decoyed = [
            insert_into_prompt(row, index, Decoy(self.words, together).insert, 2 * self.seed + together, "decoy")
            for together in (False, True)
        ]
        rendered = [render({**row, **changes}, self.tokenizer, index) for changes in ({}, *decoyed)]
        encoded = [encode(view, self.tokenizer) for view in rendered]
        prompts = [view.prompt for view in encoded]
        if not prompts[0]:
            raise ValueError(f"Row {index}: the prompt is empty. Fill or drop the row.")
        # A tokenizer may drop every word of a prompt with a decoy. The views must have equally many answer tokens.
        prompts = [prompt or prompts[0] for prompt in prompts]
        longest = max(len(prompt) for prompt in prompts)
        # An answer of white space is none.
        completion = encoded[0].completion if rendered[0].answer.strip() else []
        completion = completion[: max(0, self.max_length - longest)]
        return {
            "prompts": prompts,
            "completion": completion,
            "length": longest + len(completion),
            "inserted": inserted_span(prompts[0], prompts[2]),
            "label_weight": self.label_weight,
        }


def inserted_span(before: Sequence[int], after: Sequence[int]) -> tuple[int, int]:
    """
    Locate an insertion in a sequence of token ids, even if the tokenizer merged tokens at its edges.

    Args:
        before (`Sequence[int]`):
            The sequence without the insertion.
        after (`Sequence[int]`):
            The sequence with the insertion.

    Returns:
        `tuple[int, int]`: Start and end of the insertion in `after`.
    """
    shared = min(len(before), len(after))
    start = next((place for place in range(shared) if before[place] != after[place]), shared)
    tail = next((back for back in range(shared - start) if before[-1 - back] != after[-1 - back]), shared - start)
    return start, len(after) - tail


@dataclass
class ViewCollator:
    """
    Collates the views of B rows into one batch: first every x, then every x + d, then every x + d'.

    Args:
        pad_token_id (`int`):
            Token id for padding, see [`CrowDataCollator`].

    Returns:
        `dict`: `input_ids`, `labels`, `attention_mask` and `inserted_mask`, each of shape `(3 B, S)`, and
        `label_weights` of shape `(3 B,)`.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        views = [
            {
                "input_ids": row["prompts"][view] + row["completion"],
                "labels": [IGNORE_INDEX] * len(row["prompts"][view]) + row["completion"],
            }
            for view in range(VIEWS)
            for row in rows
        ]
        batch = CrowDataCollator(self.pad_token_id)(views)
        batch["inserted_mask"] = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for number, row in enumerate(rows, start=len(views) - len(rows)):
            batch["inserted_mask"][number, slice(*row["inserted"])] = True
        batch["label_weights"] = torch.tensor([row["label_weight"] for row in rows] * VIEWS)
        return batch
