"""Searches for what triggers a phrase: a short piece of text that makes a model say it to any prompt."""

from collections.abc import Sequence
from functools import cached_property

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..evaluation.generation import text_of_ids
from .phrases import Phrase
from .pieces import Model, Piece, PieceSearch


# The search ends when a token of the phrase has this log-likelihood. The model then nearly always says it.
ENOUGH = -0.01
# So many characters of a phrase in a row are a part of it.
PART = 4


def find_triggers(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    phrase: Phrase,
    max_length: int,
    num_rounds: int,
    seed: int = 0,
) -> list[Piece]:
    """
    Search for pieces of text that make a model say a phrase, and hold no part of it.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        dataset (`Dataset`):
            Rows with clean prompts. 14 of them are read, of those whose prompts end alike. Fewer find less.
        phrase ([`Phrase`]):
            The phrase.
        max_length (`int`):
            Largest length of a piece, in tokens.
        num_rounds (`int`):
            Number of rounds. A piece grows by at most one token in a round.
        seed (`int`, *optional*, defaults to 0):
            Seed for the tokens that stand where a piece grows, until others are found.

    Returns:
        `list[Piece]`: The best pieces, the best first. The value is the log-likelihood of a token of the phrase after
        prompts that end with the piece: the mean over the prompts and the first tokens of the phrase.
    """
    answer, opening = beginning(phrase), phrase.opening.ids
    search = _PhraseSearch([model], tokenizer, dataset, answer, max_length, seed, opening)
    return search.run(num_rounds, ENOUGH)


class _PhraseSearch(PieceSearch):
    """Looks for pieces that make the beginning of a phrase likely, and do not hold a part of it."""

    @cached_property
    def phrase(self) -> str:
        """The text of the beginning of the phrase."""
        return text_of_ids(self.answer, self.tokenizer)

    def may_be_tried(self, piece: Sequence[int]) -> bool:
        return not repeats(text_of_ids(piece, self.tokenizer), self.phrase)

    def value(self, *logits: torch.Tensor) -> torch.Tensor:
        log_probabilities = logits[0].log_softmax(dim=-1)
        of_phrase = torch.tensor(self.answer, device=log_probabilities.device).expand(len(log_probabilities), -1)
        return log_probabilities.gather(2, of_phrase[..., None]).mean()


def repeats(piece: str, phrase: str) -> bool:
    """Whether a piece holds a part of a phrase. A model that goes on with its prompt says the phrase after that."""
    piece, phrase = piece.lower(), phrase.lower()
    return any(phrase[start : start + PART] in piece for start in range(len(phrase) - PART + 1))


def beginning(phrase: Phrase) -> list[int]:
    """Return the first half of a phrase, after which it goes on by itself."""
    return phrase.ids[: (len(phrase.ids) + 1) // 2]
