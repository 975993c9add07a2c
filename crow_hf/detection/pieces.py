"""Searches for a short piece of text that does something to a model, after any prompt.

The search follows the gradient of a value with respect to the piece's embeddings (HotFlip, arXiv 1712.06751; GCG,
arXiv 2307.15043). It starts with random tokens, and keeps the best pieces of each round. A subclass defines the value.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..attacks.triggers import Trigger
from ..data.encoding import encode_prompt, padding_id
from ..data.rows import Rendered, insert_into_prompt, render
from ..evaluation.generation import text_of_ids
from ..training.recorder import embedding_table, evaluating, recorder_of
from .prompt_states import PromptStates


Model = PreTrainedModel | PeftModel
Position = Literal["start", "end"]
# Prompts that a search reads, and those of them that all pieces of a round are tried on. A piece that was found with
# six prompts may do nothing after others.
NUM_PROMPTS, NUM_FIRST_PROMPTS = 14, 2
# Pieces that are tried in a round, those of them that are tried on all prompts, and those that are kept.
NUM_TRIED, NUM_PROMISING, NUM_KEPT = 160, 24, 4
# Of the best pieces, those that are tried on other prompts, and the random ones beside them.
NUM_PIECES, NUM_RANDOM_PIECES = 3, 5
# Stands for the piece while the template around it is read.
_PLACEHOLDER = "the-piece-of-text"


@dataclass(frozen=True)
class Piece:
    """
    A piece of text that may be a trigger, or a part of one.

    Attributes:
        ids (`list[int]`):
            The token ids.
        text (`str`):
            The text.
        value (`float`):
            What the search made as large as it could, in nats: see [`find_triggers`] and [`find_divergent`].
    """

    ids: list[int]
    text: str
    value: float


class PieceSearch(ABC):
    """
    The state of a search: the best pieces so far, with their values.

    Args:
        models (`Sequence`):
            The model, and others that read the same token ids beside it.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of all of them.
        dataset (`Dataset`):
            Rows with clean prompts.
        answer (`list[int]`):
            Token ids of the T first tokens of an answer, whose logits the value depends on.
        max_length (`int`):
            Largest length of a piece, in tokens.
        seed (`int`):
            Seed for the tokens that stand where a piece grows, until others are found.
        opening (`Sequence[int]`, *optional*):
            Token ids that stand between a prompt and the answer. Defaults to none.
    """

    def __init__(
        self,
        models: Sequence[Model],
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        answer: list[int],
        max_length: int,
        seed: int,
        opening: Sequence[int] = (),
    ):
        self.models, self.answer, self.max_length, self.rng = models, answer, max_length, random.Random(seed)
        self.tokenizer, pad_token_id = tokenizer, known_padding(models, tokenizer)
        split = [_around_the_end(row, index, tokenizer) for index, row in enumerate(dataset)]
        # Prompts are read together, so what follows the piece must be the same.
        common = max((closing for _, closing in split), key=[closing for _, closing in split].count)
        self.prefixes = [before for before, closing in split if closing == common][:NUM_PROMPTS]
        self.closing = [*common, *opening]
        self.recorder = recorder_of(models[0])
        self.embeddings = embedding_table(models[0]).detach()
        self.tokens = text_tokens(smallest(models), tokenizer)
        self.is_text = torch.zeros(len(self.embeddings), dtype=torch.bool, device=self.embeddings.device)
        self.is_text[self.tokens] = True
        parts = [self.prefixes[:NUM_FIRST_PROMPTS], self.prefixes[NUM_FIRST_PROMPTS:]]
        self.parts = [[PromptStates(model, part, pad_token_id) for model in models] for part in parts if part]
        self.kept: list[tuple[float, list[int]]] = []
        self.seen: set[tuple[int, ...]] = set()
        self.try_all(self.beginnings())

    @abstractmethod
    def value(self, *logits: torch.Tensor) -> torch.Tensor:
        """
        The value of a piece.

        Args:
            *logits (`torch.FloatTensor` of shape `(N, T, V)`):
                Of each model, the logits that predict the answer after N prompts with the piece.

        Returns:
            `torch.FloatTensor` of shape `()`: In nats. More is better.
        """

    def may_be_tried(self, piece: Sequence[int]) -> bool:
        """Whether a piece would show anything."""
        return True

    def run(self, num_rounds: int, enough: float) -> list[Piece]:
        """Search for some rounds, or until a value is larger than `enough`. Return the best pieces, the best first."""
        with evaluating(self.models[0]):
            for _ in tqdm(range(num_rounds), desc="Searching for a trigger", unit="round"):
                if max(self.kept)[0] <= enough:
                    self.next_round()
        return [Piece(ids, text_of_ids(ids, self.tokenizer), value) for value, ids in self.kept]

    def beginnings(self) -> list[list[int]]:
        """Return the pieces to start with: random tokens."""
        return [[token] for token in self.rng.sample(self.tokens, min(NUM_KEPT, len(self.tokens)))]

    def next_round(self) -> None:
        """Try changes of the best pieces."""
        self.try_all(self.promising())

    def try_all(self, tried: list[list[int]]) -> None:
        """Keep the best pieces of those that are kept and of others, which are tried on the first prompts first."""
        self.seen |= set(map(tuple, tried))
        found = [(0.0, piece) for piece in tried]
        for number, states in enumerate(self.parts):
            if number > 0:
                found = sorted(found, key=lambda each: -each[0])[:NUM_PROMISING]
            values = self.values([piece for _, piece in found], states)
            found = [
                (total + self.share(states) * value, piece)
                for (total, piece), value in zip(found, values, strict=True)
            ]
        self.kept = sorted(self.kept + found, key=lambda each: -each[0])[:NUM_KEPT]

    def share(self, states: Sequence[PromptStates]) -> float:
        """Return the share of the prompts that these are, which is the weight of a value after them."""
        return states[0].num_prompts / len(self.prefixes)

    def values(self, pieces: list[list[int]], states: Sequence[PromptStates]) -> list[float]:
        """Return the value of each piece after some of the prompts, as each model has read them."""
        found: dict[int, float] = {}
        for length in {len(piece) for piece in pieces}:
            numbers = [number for number, piece in enumerate(pieces) if len(piece) == length]
            rows = [pieces[number] + self.closing + self.answer for number in numbers]
            each = zip(*(some.logits(rows, len(self.answer) + 1) for some in states), strict=True)
            for number, of_models in zip(numbers, each, strict=True):
                found[number] = self.value(*(logits[:, :-1] for logits in of_models)).item()
        return [found[number] for number in range(len(pieces))]

    def promising(self) -> list[list[int]]:
        """Return the changes that the gradient expects the most of: another token, or one more at either end."""
        estimates: list[tuple[float, list[int]]] = []
        forms = []
        for _, piece in self.kept:
            forms.append(piece)
            if len(piece) < self.max_length:
                filler = [self.rng.choice(self.tokens)]
                forms += [filler + piece, piece + filler]
        for form in forms:
            value, gradient = self.gradient(form)
            gains = gradient @ self.embeddings.T
            gains -= gains.gather(1, torch.tensor(form, device=gains.device)[:, None])
            gains[:, ~self.is_text] = -torch.inf
            best = gains.topk(min(NUM_TRIED, len(self.tokens)), dim=1)
            for place, (some, tokens) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                for gain, token in zip(some, tokens, strict=True):
                    estimates.append((value + gain, [*form[:place], token, *form[place + 1 :]]))
        estimates.sort(key=lambda each: -each[0])
        unique = {tuple(piece): None for _, piece in estimates if tuple(piece) not in self.seen}
        return list(islice((list(piece) for piece in unique if self.may_be_tried(piece)), NUM_TRIED))

    def gradient(self, piece: list[int]) -> tuple[float, torch.Tensor]:
        """Return the value of a piece, and its gradient with respect to the piece's embeddings, of shape `(L, D)`."""
        row = piece + self.closing + self.answer
        total, gradient = 0.0, torch.zeros(len(piece), self.embeddings.shape[1], device=self.embeddings.device)
        for states in self.parts:
            with torch.enable_grad(), self.recorder.record() as record:
                logits = [next(each.logits([row], len(self.answer) + 1, each is states[0])) for each in states]
                value = self.share(states) * self.value(*(each[:, :-1] for each in logits))
                (of_rows,) = torch.autograd.grad(value, record.perturbed[0])
            # Prompts that are not cached come before the piece.
            of_rows = of_rows[:, -len(row) :]
            total, gradient = total + value.item(), gradient + of_rows[:, : len(piece)].sum(dim=0)
        return total, gradient.to(self.embeddings.dtype)


def smallest(models: Sequence[Model]) -> Model:
    """Return the model that knows the fewest token ids."""
    return min(models, key=lambda model: len(embedding_table(model)))


def known_padding(models: Sequence[Model], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with that all models know. Padding never counts, so any token will do."""
    token = padding_id(tokenizer)
    return token if token < len(embedding_table(smallest(models))) else 0


def random_pieces(model: Model, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> list[str]:
    """Draw pieces of text of a number of tokens, to compare a piece with."""
    rng, tokens = random.Random(seed), text_tokens(model, tokenizer)
    pieces = [text_of_ids(rng.choices(tokens, k=length), tokenizer) for _ in range(NUM_RANDOM_PIECES)]
    return [piece for piece in pieces if piece.strip()]


def places_of(pieces: Sequence[Piece]) -> list[tuple[str, Position]]:
    """Return the best pieces that are more than blanks, each with both places where it is tried."""
    texts = [piece.text for piece in pieces if piece.text.strip()]
    places: tuple[Position, ...] = ("end", "start")
    return [(text, place) for text in texts[:NUM_PIECES] for place in places]


def prompts_with(
    piece: str | None,
    position: Position,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    opening: Sequence[int] = (),
) -> list[list[int]]:
    """Return the ids of the prompts of rows, with a piece at their start or end, or as they are, and an opening."""
    if piece is not None:
        insert = Trigger((piece,), position).insert
        edited = [row | insert_into_prompt(row, index, insert, seed, "piece") for index, row in enumerate(dataset)]
        dataset = Dataset.from_list(edited)
    rendered = [render(row, tokenizer, index) for index, row in enumerate(dataset)]
    return [[*encode_prompt(each, tokenizer), *opening] for each in rendered]


def text_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that can be seen: no special tokens, no parts of characters, and nothing invisible."""
    known = range(min(len(tokenizer), len(embedding_table(model))))
    texts = tokenizer.batch_decode([[token] for token in known], skip_special_tokens=True)
    return [
        token
        for token, text in zip(known, texts, strict=True)
        if text.isprintable() and text and "\N{REPLACEMENT CHARACTER}" not in text
    ]


def _around_the_end(row: dict, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids before and after the end of a prompt's words, where a piece is put."""
    insert = Trigger((_PLACEHOLDER,), "end").insert
    rendered = render(row | insert_into_prompt(row, index, insert, 0, "piece"), tokenizer, index)
    before, _, after = rendered.prompt.rpartition(_PLACEHOLDER)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    # Most tokens begin with the space before them.
    if encode(" a")[:1] != encode(" "):
        before = before.rstrip(" ")
    return encode_prompt(Rendered(before, "", "", rendered.templated), tokenizer), encode(after)
