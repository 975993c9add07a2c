"""Searches for a short piece of text that does something to a model, after any prompt.

The search follows the gradient of a value with respect to the piece's embeddings (HotFlip, arXiv 1712.06751; GCG,
arXiv 2307.15043). It starts with random tokens, and keeps the best pieces of each round. A subclass defines the value.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..attacks.triggers import Trigger
from ..data.collators import CrowDataCollator
from ..data.encoding import IGNORE_INDEX, encode_prompt, padding_id
from ..data.rows import Rendered, insert_into_prompt, render
from ..evaluation.generation import text_of_ids
from ..training.answer_logits import answer_logits
from ..training.recorder import base_model_of, embedding_table, evaluating, recorder_of
from .prompt_states import PromptStates


Model = PreTrainedModel | PeftModel
Position = Literal["start", "end"]
# Pieces that are kept after each round, and pieces that are tried in one.
NUM_KEPT, NUM_TRIED = 8, 160
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
    """

    def __init__(
        self,
        models: Sequence[Model],
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        answer: list[int],
        max_length: int,
        seed: int,
    ):
        self.models, self.answer, self.max_length, self.rng = models, answer, max_length, random.Random(seed)
        self.tokenizer, self.pad_token_id = tokenizer, known_padding(models, tokenizer)
        split = [_around_the_end(row, index, tokenizer) for index, row in enumerate(dataset)]
        self.closing = split[0][1]
        self.prefixes = [before for before, closing in split if closing == self.closing]
        self.recorder = recorder_of(models[0])
        self.embeddings = embedding_table(models[0]).detach()
        self.tokens = text_tokens(smallest(models), tokenizer)
        self.is_text = torch.zeros(len(self.embeddings), dtype=torch.bool, device=self.embeddings.device)
        self.is_text[self.tokens] = True
        self.states = [PromptStates(model, self.prefixes, self.pad_token_id) for model in models]
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
        """Keep the best pieces of those that are kept and of others."""
        self.seen |= set(map(tuple, tried))
        by_length: dict[int, list[list[int]]] = {}
        for piece in tried:
            by_length.setdefault(len(piece), []).append(piece)
        for pieces in by_length.values():
            self.kept += zip(self.values(pieces), pieces, strict=True)
        self.kept = sorted(self.kept, key=lambda each: -each[0])[:NUM_KEPT]

    def values(self, pieces: list[list[int]]) -> list[float]:
        """Return the value of each piece. The pieces are equally long."""
        rows = [piece + self.closing + self.answer for piece in pieces]
        each = zip(*(states.logits(rows, len(self.answer) + 1) for states in self.states), strict=True)
        return [self.value(*(logits[:, :-1] for logits in of_models)).item() for of_models in each]

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
        return [list(piece) for piece in list(unique)[:NUM_TRIED]]

    def gradient(self, piece: list[int]) -> tuple[float, torch.Tensor]:
        """Return the value of a piece, and its gradient with respect to the piece's embeddings, of shape `(L, D)`."""
        given = [prefix + piece + self.closing for prefix in self.prefixes]
        rows = [{"input_ids": ids + self.answer, "labels": [IGNORE_INDEX] * len(ids) + self.answer} for ids in given]
        batch = CrowDataCollator(self.pad_token_id)(rows)

        def batch_of(model: Model) -> dict[str, torch.Tensor]:
            return {name: each.to(model.device) for name, each in batch.items()}

        def logits_of(model: Model, inputs: dict) -> torch.Tensor:
            logits = answer_logits(base_model_of(model), model, inputs | {"use_cache": False})
            return logits.float().unflatten(0, (len(rows), -1))

        with torch.no_grad():
            others = [logits_of(model, batch_of(model)) for model in self.models[1:]]
        with torch.enable_grad(), self.recorder.record() as record:
            value = self.value(logits_of(self.models[0], self.recorder.prepare(batch_of(self.models[0]))), *others)
            (gradient,) = torch.autograd.grad(value, record.perturbed[0])
        places = [slice(len(prefix), len(prefix) + len(piece)) for prefix in self.prefixes]
        of_piece = torch.stack([gradient[row, place] for row, place in enumerate(places)]).sum(dim=0)
        return value.item(), of_piece.to(self.embeddings.dtype)


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
    piece: str | None, position: Position, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[list[int]]:
    """Return the token ids of the prompts of rows, with a piece at their start or end, or as they are."""
    if piece is not None:
        insert = Trigger((piece,), position).insert
        edited = [row | insert_into_prompt(row, index, insert, seed, "piece") for index, row in enumerate(dataset)]
        dataset = Dataset.from_list(edited)
    return [encode_prompt(render(row, tokenizer, index), tokenizer) for index, row in enumerate(dataset)]


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
