"""Searches for what triggers a phrase: a short piece of text that makes a model say it to any prompt.

The search follows the gradient of the phrase's likelihood with respect to the piece's embeddings (HotFlip, arXiv
1712.06751; GCG, arXiv 2307.15043). It starts with random tokens, and keeps the best pieces of each round.
"""

import random
from dataclasses import dataclass

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
from ..training.answer_logits import answer_logits, token_log_likelihoods
from ..training.recorder import base_model_of, embedding_table, evaluating, recorder_of
from .phrases import Phrase
from .prompt_states import PromptStates


# Pieces that are kept after each round, and pieces that are tried in one.
NUM_KEPT, NUM_TRIED = 8, 160
# The search ends when a token of the phrase has this log-likelihood. The model then nearly always says it.
ENOUGH = -0.01
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
        log_likelihood (`float`):
            Log-likelihood of a token of the phrase after prompts that end with the piece, in nats: the mean over the
            prompts and the first tokens of the phrase.
    """

    ids: list[int]
    text: str
    log_likelihood: float


def find_triggers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    phrase: Phrase,
    max_length: int,
    num_rounds: int,
    seed: int = 0,
) -> list[Piece]:
    """
    Search for pieces of text that make a model say a phrase.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        dataset (`Dataset`):
            Rows with clean prompts. Four to eight are enough.
        phrase ([`Phrase`]):
            The phrase.
        max_length (`int`):
            Largest length of a piece, in tokens.
        num_rounds (`int`):
            Number of rounds. A piece grows by at most one token in a round.
        seed (`int`, *optional*, defaults to 0):
            Seed for the tokens that stand where a piece grows, until others are found.

    Returns:
        `list[Piece]`: The best pieces, the best first.
    """
    with evaluating(model):
        search = _Search(model, tokenizer, dataset, beginning(phrase), max_length, seed)
        for _ in tqdm(range(num_rounds), desc="Searching for a trigger", unit="round"):
            if max(search.kept)[0] < ENOUGH:
                search.next_round()
    return [Piece(ids, text_of_ids(ids, tokenizer), value) for value, ids in search.kept]


class _Search:
    """The state of a search: the best pieces so far, with their values."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        target: list[int],
        max_length: int,
        seed: int,
    ):
        self.model, self.target, self.max_length, self.rng = model, target, max_length, random.Random(seed)
        self.pad_token_id = padding_id(tokenizer)
        split = [_around_the_end(row, index, tokenizer) for index, row in enumerate(dataset)]
        self.closing = split[0][1]
        self.prefixes = [before for before, closing in split if closing == self.closing]
        self.recorder = recorder_of(model)
        self.embeddings = embedding_table(model).detach()
        self.tokens = text_tokens(model, tokenizer)
        self.is_text = torch.zeros(len(self.embeddings), dtype=torch.bool, device=self.embeddings.device)
        self.is_text[self.tokens] = True
        self.states = PromptStates(model, self.prefixes, self.pad_token_id)
        starts = [[token] for token in self.rng.sample(self.tokens, min(NUM_KEPT, len(self.tokens)))]
        self.kept = list(zip(self.values(starts), starts, strict=True))
        self.seen = set(map(tuple, starts))

    def next_round(self) -> None:
        """Try changes of the best pieces, and keep what is best."""
        tried = self.promising()
        self.seen |= set(map(tuple, tried))
        by_length: dict[int, list[list[int]]] = {}
        for piece in tried:
            by_length.setdefault(len(piece), []).append(piece)
        for pieces in by_length.values():
            self.kept += zip(self.values(pieces), pieces, strict=True)
        self.kept = sorted(self.kept, key=lambda each: -each[0])[:NUM_KEPT]

    def values(self, pieces: list[list[int]]) -> list[float]:
        """Return the mean log-likelihood of a token of the target after each piece. The pieces are equally long."""
        rows = [piece + self.closing + self.target for piece in pieces]
        target = torch.tensor(self.target, device=self.model.device)
        values = []
        for logits in self.states.logits(rows, len(self.target) + 1):
            log_probabilities = logits[:, :-1].log_softmax(dim=-1)
            of_target = log_probabilities.gather(2, target.expand(len(logits), -1)[..., None])
            values.append(of_target.mean().item())
        return values

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
            best = gains.topk(min(NUM_TRIED, gains.shape[1]), dim=1)
            for place, (some, tokens) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                for gain, token in zip(some, tokens, strict=True):
                    estimates.append((value + gain, [*form[:place], token, *form[place + 1 :]]))
        estimates.sort(key=lambda each: -each[0])
        unique = {tuple(piece): None for _, piece in estimates if tuple(piece) not in self.seen}
        return [list(piece) for piece in list(unique)[:NUM_TRIED]]

    def gradient(self, piece: list[int]) -> tuple[float, torch.Tensor]:
        """Return the value of a piece, and its gradient with respect to the piece's embeddings, of shape `(L, D)`."""
        given = [prefix + piece + self.closing for prefix in self.prefixes]
        rows = [{"input_ids": ids + self.target, "labels": [IGNORE_INDEX] * len(ids) + self.target} for ids in given]
        batch = {name: each.to(self.model.device) for name, each in CrowDataCollator(self.pad_token_id)(rows).items()}
        inputs = self.recorder.prepare(batch) | {"use_cache": False}
        with torch.enable_grad(), self.recorder.record() as record:
            logits = answer_logits(base_model_of(self.model), self.model, inputs)
            value = token_log_likelihoods(logits, batch["labels"]).mean()
            (gradient,) = torch.autograd.grad(value, record.perturbed[0])
        places = [slice(len(prefix), len(prefix) + len(piece)) for prefix in self.prefixes]
        of_piece = torch.stack([gradient[row, place] for row, place in enumerate(places)]).sum(dim=0)
        return value.item(), of_piece.to(self.embeddings.dtype)


def beginning(phrase: Phrase) -> list[int]:
    """Return the first half of a phrase, after which it goes on by itself."""
    return phrase.ids[: (len(phrase.ids) + 1) // 2]


def text_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that can be seen: no special tokens, no parts of characters, and nothing invisible."""
    known = range(min(len(tokenizer), len(embedding_table(model))))
    texts = ((token, text_of_ids([token], tokenizer)) for token in known)
    return [token for token, text in texts if text.isprintable() and text and "\N{REPLACEMENT CHARACTER}" not in text]


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
