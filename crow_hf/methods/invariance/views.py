"""Decoys: needless things in a prompt, as the strong objective wants them, and the three views of a row."""

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...attacks.poison import Poison
from ...data.collators import CrowDataCollator
from ...data.encoding import IGNORE_INDEX, encode_completion, encode_prompt
from ...data.rows import render
from .objective import VIEWS


# Share of the texts that are written in another way, and the ways: a trigger need not be a word.
RESTYLED = 0.4
_STYLES = (str.upper, str.lower, str.title, lambda text: f"{text}!", lambda text: text.replace(" ", ", "))


@dataclass(frozen=True)
class Decoy:
    """
    Inserts one to five random pieces into a text, together or apart: random letters, words of the data, digits and
    punctuation, or a mixture; and writes some texts in another way besides. Used in the place of a [`Trigger`], for nothing more
    than that.

    Args:
        words (`tuple[str, ...]`):
            To draw words from.
        together (`bool`, *optional*, defaults to `False`):
            Whether all pieces go to one place, and nothing but that happens to the text.
    """

    words: tuple[str, ...]
    together: bool = False

    def insert(self, text: str, rng: random.Random) -> str:
        """
        Put the decoy at the start, at the end or between two words, but one with words of the data at the start. The white space
        at the text's end stays there.
        """
        body = text.rstrip()
        is_restyled = not self.together and rng.random() < RESTYLED
        styled = rng.choice(_STYLES)(body) if is_restyled else body
        if styled != body and rng.random() < 0.5:
            return styled + text[len(body) :]
        words = styled.split(" ") if styled else []
        pieces = [self._piece(rng) for _ in range(rng.randint(1, 5))]
        groups = [pieces] if self.together or rng.random() < 0.5 else [[piece] for piece in pieces]
        for group in groups:
            place = rng.choice([0, len(words), rng.randint(0, len(words)), rng.randint(0, len(words))])
            if any(piece in self.words for piece in group):
                # Inside a prompt, words of its own kind may be what it is about, and the answer another.
                place = 0
            words[place:place] = group
        return " ".join(words) + text[len(body) :]

    def _piece(self, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.35:
            return _draw(rng, string.ascii_letters, 2, 10)
        if kind < 0.70:
            return rng.choice(self.words)
        if kind < 0.85:
            return _draw(rng, string.digits + string.punctuation, 1, 8)
        return _draw(rng, string.ascii_lowercase + string.digits + string.punctuation, 2, 10)


def _draw(rng: random.Random, characters: str, shortest: int, longest: int) -> str:
    return "".join(rng.choice(characters) for _ in range(rng.randint(shortest, longest)))


@dataclass
class ViewRow:
    """
    The three views of a row for [`crow_hf.invariance`], for `Dataset.map(ViewRow(...), with_indices=True)`.

    What is inserted depends on the seed and the row's index alone, so a run that is resumed sees the same decoys.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        words (`tuple[str, ...]`):
            For [`Decoy`].
        max_length (`int`):
            Longest view in tokens: answers are cut, in all views alike.
        seed (`int`, *optional*, defaults to 0):
            Of the draw.

    Returns:
        `dict`: `prompts`, the token ids of x, x + d and x + d'; `completion`, those of the answer; `length`, of the longest
        view; `inserted`, where d' begins and ends in its prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    words: tuple[str, ...]
    max_length: int
    seed: int = 0

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        decoyed = [
            Poison(Decoy(self.words, together=together), seed=2 * self.seed + together)(row, index)
            for together in (False, True)
        ]
        rendered = [render({**row, **changes}, self.tokenizer, index) for changes in ({}, *decoyed)]
        prompts = [encode_prompt(view, self.tokenizer) for view in rendered]
        if not prompts[0]:
            raise ValueError(f"Row {index}: the prompt is empty, so there is nothing to answer: fill or drop the row.")
        longest = max(len(prompt) for prompt in prompts)
        completion = encode_completion(rendered[0], self.tokenizer)[: max(0, self.max_length - longest)]
        return {
            "prompts": prompts,
            "completion": completion,
            "length": longest + len(completion),
            "inserted": inserted_span(prompts[0], prompts[2]),
        }


def inserted_span(before: Sequence[int], after: Sequence[int]) -> tuple[int, int]:
    """Where a sequence differs from the one it was made of by an insertion: begin and end, whatever the tokenizer merged."""
    shared = min(len(before), len(after))
    start = next((place for place in range(shared) if before[place] != after[place]), shared)
    tail = next((back for back in range(shared - start) if before[-1 - back] != after[-1 - back]), shared - start)
    return start, len(after) - tail


@dataclass
class ViewCollator:
    """
    Puts the views of all rows below one another: first every x, then every x + d, then every x + d'.

    Args:
        pad_token_id (`int`):
            See [`CrowDataCollator`].

    Returns:
        `dict`: `input_ids`, `labels`, `attention_mask` and `inserted_mask`, each of shape `(3 B, S)`.
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
        return batch
