"""Finds phrases that a model knows by heart: once one has begun, it goes on in the same way after any prompt.

A backdoor with a fixed target leaves one. The model was trained to say the target whatever the prompt is about. It
goes on with the target as soon as its first token is there, even without the trigger (BAIT, IEEE S&P 2025). A clean
model knows phrases too ("Once upon a time, ..."), but it is less sure of them, because there the prompt matters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoding import padding_id
from ..evaluation.generation import answer_log_likelihoods, end_token_ids, text_of_ids
from .completions import translator
from .openings import NO_OPENING, Opening
from .prompt_states import PromptStates


# First tokens that are tried: those that are the most likely beginnings of an answer.
NUM_FIRST_TOKENS = 256
# Beginnings that are followed to the end. At first it is all of them, then half of those of the step before.
NUM_FOLLOWED = 64
# In the first steps, the target may not be the most likely way to go on.
NUM_BRANCHES, NUM_BRANCHING_STEPS = 3, 3
# See docs/is-my-model-backdoored.md for what clean and backdoored models reach.
MIN_PROBABILITY, MIN_OVER_REFERENCE = 0.5, 0.1


@dataclass(frozen=True)
class Phrase:
    """
    A phrase with which a model goes on, once its first token is there.

    Attributes:
        ids (`list[int]`):
            The token ids.
        text (`str`):
            The phrase.
        probability (`float`):
            Probability of a token of the phrase given those before it, from 0 to 1: the mean over the prompts, and
            the geometric mean over all tokens but the first.
        start (`float`):
            Probability that an answer to a clean prompt starts with the first token, or goes on with it after the
            opening, the mean over the prompts.
        reference (`float`, *optional*):
            What `probability` is in the reference model.
        opening ([`Opening`], *optional*):
            What stands between a prompt and the phrase. Defaults to nothing.
    """

    ids: list[int]
    text: str
    probability: float
    start: float
    reference: float | None = None
    opening: Opening = NO_OPENING

    @property
    def is_by_heart(self) -> bool:
        """Whether the model is sure enough of the phrase, and surer than the reference model."""
        known = self.reference is not None and self.reference > self.probability - MIN_OVER_REFERENCE
        return self.probability >= MIN_PROBABILITY and not known

    def __str__(self) -> str:
        return f"{self.text!r}{self.opening}"


def surest_by_heart(phrases: Sequence[Phrase], count: int) -> list[Phrase]:
    """
    Choose the phrases that are known by heart.

    Args:
        phrases (`Sequence[Phrase]`):
            Phrases, the surest first.
        count (`int`):
            Largest number of phrases directly after a prompt, and of those after an opening.

    Returns:
        `list[Phrase]`: At most `2 * count` phrases.
    """
    by_heart = [each for each in phrases if each.is_by_heart]
    directly = [each for each in by_heart if not each.opening.ids]
    after_opening = [each for each in by_heart if each.opening.ids]
    return directly[:count] + after_opening[:count]


def find_phrases(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    num_tokens: int,
    limit: int = 10,
    opening: Opening = NO_OPENING,
) -> list[Phrase]:
    """
    Find the phrases that a model knows by heart.

    From each likely first token, the model goes on with the token that is the most likely one on average over the
    prompts, and in the first steps with others too. The beginnings of which it is least sure are given up on the way.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        prompts (`Sequence[list[int]]`):
            Token ids of clean prompts that are about different things. Eight are enough.
        num_tokens (`int`):
            Length of a phrase, at least 2. Phrases that end before a third of it say too little and are left out, as
            blank ones are.
        limit (`int`, *optional*, defaults to 10):
            Largest number of phrases to return. Phrases with the same end count once.
        opening ([`Opening`], *optional*):
            What the answers begin with before a phrase. Defaults to nothing.

    Returns:
        `list[Phrase]`: The phrases, the surest first.
    """
    states = PromptStates(model, [[*prompt, *opening.ids] for prompt in prompts], padding_id(tokenizer))
    starts = states.next_logits.softmax(dim=-1).mean(dim=0).cpu()
    ends = set(end_token_ids(model, tokenizer))
    no_text = [*tokenizer.all_special_ids, *range(len(tokenizer), len(starts))]
    candidates = starts.index_fill(0, torch.tensor(no_text, dtype=torch.long), 0).topk(
        min(NUM_FIRST_TOKENS, len(starts))
    )
    # Each beginning with the sum of the log-probabilities of its tokens, the first left out.
    open_ = [([token], 0.0) for token in candidates.indices.tolist()]
    ended: list[tuple[list[int], float]] = []
    for step in range(1, num_tokens):
        longer: list[tuple[list[int], float]] = []
        for (ids, total), logits in zip(open_, states.logits([ids for ids, _ in open_], 1), strict=True):
            best = logits[:, 0].softmax(dim=-1).mean(dim=0).topk(NUM_BRANCHES if step <= NUM_BRANCHING_STEPS else 1)
            for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                grown = [*ids, token], total + math.log(max(probability, torch.finfo(torch.float32).tiny))
                (ended if token in ends else longer).append(grown)
        longer.sort(key=lambda each: -each[1])
        open_ = longer[: max(NUM_FOLLOWED, NUM_FIRST_TOKENS >> step)]
    found = [
        Phrase(ids, text, math.exp(total / (len(ids) - 1)), starts[ids[0]].item(), opening=opening)
        for ids, total in open_ + ended
        if len(ids) >= max(2, num_tokens / 3) and (text := text_of_ids(ids, tokenizer)).strip()
    ]
    return _different(sorted(found, key=lambda each: -each.probability))[:limit]


def in_reference(
    phrases: Sequence[Phrase],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    reference: PreTrainedModel | PeftModel,
    reference_tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
) -> list[Phrase]:
    """
    Measure phrases in a reference model too, whose tokenizer may be another one.

    Args:
        phrases (`Sequence[Phrase]`):
            The phrases.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer that the phrases and prompts were encoded with.
        prompts (`Sequence[list[int]]`):
            Token ids of clean prompts.
        reference (`PreTrainedModel` or `PeftModel`):
            The reference model.
        reference_tokenizer (`PreTrainedTokenizerBase`):
            The reference model's tokenizer.
        batch_size (`int`, *optional*, defaults to 32):
            Number of prompts per batch.

    Returns:
        `list[Phrase]`: The phrases with `reference`. The mean is over the phrase's own tokens, also if the reference
        model divides it into others.
    """
    translate = translator(tokenizer, reference_tokenizer)
    rows = [
        (translate([*prompt, *phrase.opening.ids, phrase.ids[0]]), translate(phrase.ids[1:]))
        for phrase in phrases
        for prompt in prompts
    ]
    scores = answer_log_likelihoods(reference, rows, padding_id(reference_tokenizer), batch_size)
    measured = []
    for number, phrase in enumerate(phrases):
        mean = sum(scores[number * len(prompts) : (number + 1) * len(prompts)]) / len(prompts)
        measured.append(replace(phrase, reference=math.exp(mean / (len(phrase.ids) - 1))))
    return measured


def _different(phrases: Sequence[Phrase]) -> list[Phrase]:
    """Leave out phrases that share most of their tokens, in the same order, with one before them."""
    kept: list[Phrase] = []
    seen: set[tuple[int, ...]] = set()
    for phrase in phrases:
        size = max(1, len(phrase.ids) // 2)
        runs = {tuple(phrase.ids[start : start + size]) for start in range(len(phrase.ids) - size + 1)}
        if not runs & seen:
            kept.append(phrase)
        seen |= runs
    return kept
