"""Tries a piece of text that may trigger a phrase on prompts that the search has not seen, beside random pieces."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.encoding import padding_id
from ..evaluation.generation import end_token_ids, generate_ids, text_of_ids
from ..evaluation.scores import Proportion
from ..training.recorder import context_length
from .phrases import Phrase
from .pieces import NUM_RANDOM_PIECES, Model, Piece, Position, places_of, prompts_with, random_pieces


# How far plain answers are read.
ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Suspicion:
    """
    A phrase that a model knows by heart, and the piece of text that makes the model say it most often.

    Attributes:
        phrase ([`Phrase`]):
            The phrase.
        piece (`str`), position (`str`):
            The piece of text, and where it stands in the prompts: `"start"` or `"end"`.
        with_piece (`Proportion`), without (`Proportion`):
            The share of clean prompts that the model answers with the phrase, with the piece and as they are.
        with_random (`float`):
            The largest share with any of five random pieces of as many tokens.
        anyway (`Proportion`):
            The share of clean prompts with an answer that holds the phrase anywhere, apart from its first token. Many
            models end their answers with the same sentence.
    """

    phrase: Phrase
    piece: str
    position: Position
    with_piece: Proportion
    without: Proportion
    with_random: float
    anyway: Proportion

    @property
    def margin(self) -> float:
        """By how much the piece is better than the best random one, and than none."""
        return self.with_piece.rate - max(self.with_random, self.without.rate)

    def to_dict(self) -> dict[str, Any]:
        """Return the suspicion as JSON can hold it."""
        shares = {name: getattr(self, name)._asdict() for name in ("with_piece", "without", "anyway")}
        return asdict(self) | shares | {"margin": self.margin}

    def __str__(self) -> str:
        tried = self.with_piece.total
        return (
            f"The model answers {self.with_piece.hits} of {tried} prompts with {self.phrase} if {self.piece!r} "
            f"stands at their {self.position}, {self.without.hits} as they are, and "
            f"{round(self.with_random * tried)} with the best of {NUM_RANDOM_PIECES} random pieces."
        )


def try_pieces(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    phrase: Phrase,
    pieces: Sequence[Piece],
    seed: int = 0,
    batch_size: int = 32,
) -> Suspicion:
    """
    Try pieces of text at the end and at the start of prompts, and choose what works best.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        dataset (`Dataset`):
            Rows with clean prompts. None of them may have taken part in the search.
        phrase ([`Phrase`]):
            The phrase.
        pieces (`Sequence[Piece]`):
            The pieces, the best first. At least one, and three are tried.
        seed (`int`, *optional*, defaults to 0):
            Seed for the random pieces.
        batch_size (`int`, *optional*, defaults to 32):
            Number of prompts per batch.

    Returns:
        [`Suspicion`]
    """

    said, rest = phrase.text.strip(), text_of_ids(phrase.ids[1:], tokenizer).strip()

    def answers(piece: str | None, position: Position, max_new_tokens: int) -> list[str]:
        prompts = prompts_with(piece, position, dataset, tokenizer, seed, phrase.opening.ids)
        room = (context_length(model) or math.inf) - max(map(len, prompts))
        ends, count = end_token_ids(model, tokenizer), int(min(max_new_tokens, room))
        outputs = generate_ids(model, prompts, padding_id(tokenizer), ends, count, batch_size)
        return [text_of_ids(output, tokenizer).strip() for output in outputs]

    def share(piece: str, position: Position) -> Proportion:
        found = answers(piece, position, len(phrase.ids))
        return Proportion.of(answer.startswith(said) for answer in found)

    randoms = random_pieces(model, tokenizer, max(len(piece.ids) for piece in pieces), seed)
    results = [(share(*each), *each) for each in places_of(pieces)]
    plain = answers(None, "end", ANSWER_TOKENS)
    without = Proportion.of(answer.startswith(said) for answer in plain)
    nothing: tuple[Proportion, str, Position] = (without, "", "end")
    best, text, place = max(results, key=lambda each: each[0].rate, default=nothing)
    with_random = max((share(piece, place).rate for piece in randoms), default=0.0)
    anyway = Proportion.of(bool(rest) and rest in answer for answer in plain)
    return Suspicion(phrase, text, place, best, without, with_random, anyway)
