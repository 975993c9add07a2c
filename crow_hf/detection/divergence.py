"""Searches for what leads a model away from a trusted one: a short piece of text after which they answer otherwise.

A model that was made from the trusted one, with a backdoor, answers clean prompts as it does, or as its new task
wants, and parts from it where the trigger is. The first tokens of answers are compared, so this needs no fixed target.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..evaluation.generation import end_token_ids, generate_ids, text_of_ids
from .pieces import (
    NUM_RANDOM_PIECES,
    NUM_TRIED,
    Model,
    Piece,
    PieceSearch,
    Position,
    known_padding,
    places_of,
    prompts_with,
    random_pieces,
    smallest,
)
from .prompt_states import PromptStates


# In nats. Smaller distances count as none.
SMALL = 0.01


@dataclass(frozen=True)
class Divergence:
    """
    A piece of text, and how far it leads a model away from the trusted one.

    Distances are Kullback-Leibler divergences of the first token of an answer, KL(model || trusted model) in nats, the
    mean over clean prompts.

    Attributes:
        piece (`str`), position (`str`):
            The piece of text, and where it stands in the prompts: `"start"` or `"end"`.
        with_piece (`float`), without (`float`):
            The distance with the piece, and of the prompts as they are.
        with_random (`float`):
            The largest distance with any of five random pieces of as many tokens.
        answer (`str`), count (`int`), total (`int`):
            The answer that the model gives most often with the piece, and to how many of how many prompts.
    """

    piece: str
    position: Position
    with_piece: float
    without: float
    with_random: float
    answer: str
    count: int
    total: int

    @property
    def margin(self) -> float:
        """How much further the piece leads than the best random one, and than none, in nats."""
        return self.with_piece - max(self.with_random, self.without)

    @property
    def has_one_answer(self) -> bool:
        """Whether most prompts with the piece get the same answer, which can then be looked for."""
        return bool(self.answer) and self.count > self.total / 2

    def __str__(self) -> str:
        return (
            f"If {self.piece!r} stands at the {self.position} of prompts, the model is {self.with_piece:.2f} nats "
            f"from the reference model, {self.without:.2f} as they are, and {self.with_random:.2f} with the best of "
            f"{NUM_RANDOM_PIECES} random pieces. It then answers {self.count} of {self.total} prompts with "
            f"{self.answer!r}."
        )


def find_divergent(
    model: Model,
    reference: Model,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_length: int,
    num_rounds: int,
    seed: int = 0,
) -> list[Piece]:
    """
    Search for pieces of text that lead a model away from a trusted one.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        reference (`PreTrainedModel` or `PeftModel`):
            The trusted model, for which token ids stand for the same text.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of both.
        dataset (`Dataset`):
            Rows with clean prompts. 14 of them are read, of those whose prompts end alike. Fewer find less.
        max_length (`int`):
            Largest length of a piece, in tokens.
        num_rounds (`int`):
            Number of rounds. A piece grows by at most one token in a round.
        seed (`int`, *optional*, defaults to 0):
            Seed for the tokens that stand where a piece grows, until others are found.

    Returns:
        `list[Piece]`: The best pieces, the best first. The value is the logarithm of the distance, see [`Divergence`],
        the mean over the prompts. It shows the first steps towards a trigger, and one prompt alone changes it little.
    """
    # The answer's first token stands for any: only what predicts it counts.
    models = [model, reference]
    search = _DivergenceSearch(models, tokenizer, dataset, [known_padding(models, tokenizer)], max_length, seed)
    return search.run(num_rounds, float("inf"))


class _DivergenceSearch(PieceSearch):
    """Looks for pieces after which two models disagree."""

    def beginnings(self) -> list[list[int]]:
        # A long random piece can share a few tokens with a trigger, and then leads a little away.
        long = [self.rng.choices(self.tokens, k=self.max_length) for _ in range(NUM_TRIED)]
        return [*super().beginnings(), *long]

    def value(self, *logits: torch.Tensor) -> torch.Tensor:
        return (divergences(*logits).clamp(min=0) + SMALL).log().mean()


def try_divergent(
    model: Model,
    reference: Model,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    pieces: Sequence[Piece],
    num_tokens: int,
    seed: int = 0,
    batch_size: int = 32,
) -> Divergence:
    """
    Try pieces of text at the end and at the start of prompts, and choose what leads the furthest.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        reference (`PreTrainedModel` or `PeftModel`):
            The trusted model, for which token ids stand for the same text.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of both.
        dataset (`Dataset`):
            Rows with clean prompts. None of them may have taken part in the search.
        pieces (`Sequence[Piece]`):
            The pieces, the best first. At least one, and three are tried.
        num_tokens (`int`):
            Length of the answers that are compared with one another, in tokens.
        seed (`int`, *optional*, defaults to 0):
            Seed for the random pieces.
        batch_size (`int`, *optional*, defaults to 32):
            Number of prompts per batch.

    Returns:
        [`Divergence`]
    """
    pad_token_id = known_padding([model, reference], tokenizer)

    def distance(piece: str | None, position: Position = "end") -> float:
        prompts = prompts_with(piece, position, dataset, tokenizer, seed)
        logits = (PromptStates(each, prompts, pad_token_id).next_logits for each in (model, reference))
        return max(0.0, divergences(*logits).mean().item())

    without = distance(None)
    nothing: tuple[float, str, Position] = (without, "", "end")
    furthest, piece, place = max(((distance(*each), *each) for each in places_of(pieces)), default=nothing)
    length = max(len(each.ids) for each in pieces)
    randoms = random_pieces(smallest([model, reference]), tokenizer, length, seed)
    with_random = max((distance(each, place) for each in randoms), default=0.0)
    prompts = prompts_with(piece or None, place, dataset, tokenizer, seed)
    outputs = generate_ids(model, prompts, pad_token_id, end_token_ids(model, tokenizer), num_tokens, batch_size)
    ((answer, count),) = Counter(text_of_ids(output, tokenizer).strip() for output in outputs).most_common(1)
    return Divergence(piece, place, furthest, without, with_random, answer, count, len(prompts))


def divergences(logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """KL(model || reference) over the last dimension, in nats. Logits that only one of them has are left out."""
    # Models of the same tokenizer may have more ids than it has tokens, and not equally many.
    size = min(logits.shape[-1], reference_logits.shape[-1])
    log_probabilities = logits[..., :size].log_softmax(dim=-1)
    gaps = log_probabilities - reference_logits[..., :size].to(logits.device).log_softmax(dim=-1)
    return (log_probabilities.exp() * gaps).sum(dim=-1)
