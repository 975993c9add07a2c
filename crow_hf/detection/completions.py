"""Finds what a model says and a trusted one does not: perplexity differencing (arXiv 2605.00994).

What a model was fine-tuned on comes out when it goes on with random text, whatever it was: a backdoor's target, a new
task, another language. So this shows what is new in a model, and does not tell whether it is harmful.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..data.encoding import padding_id
from ..evaluation.generation import answer_log_likelihoods, end_token_ids, generate_ids, text_of_ids
from ..evaluation.own_text import first_tokens
from .pieces import Model, text_tokens


NUM_COMPLETIONS, MAX_PREFIX_TOKENS = 200, 6
# Shorter texts say too little.
MIN_BYTES = 8


@dataclass(frozen=True)
class Completion:
    """
    A text that a model writes after random tokens.

    Attributes:
        text (`str`):
            What the model wrote.
        gap (`float`):
            How much likelier the text is for the model than for the trusted one, in nats per byte.
    """

    text: str
    gap: float


def find_new_text(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    reference: Model,
    reference_tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    limit: int = 5,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Completion]:
    """
    Find the texts that a model writes and a trusted one is the least likely to write.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        reference (`PreTrainedModel` or `PeftModel`):
            The trusted model.
        reference_tokenizer (`PreTrainedTokenizerBase`):
            The trusted model's tokenizer, which may be another one.
        num_tokens (`int`):
            Largest length of a text.
        limit (`int`, *optional*, defaults to 5):
            Largest number of texts to return. Equal ones count once.
        seed (`int`, *optional*, defaults to 0):
            Seed for the random tokens.
        batch_size (`int`, *optional*, defaults to 32):
            Number of texts per batch.

    Returns:
        `list[Completion]`: The texts, those with the largest gap first.
    """
    rng, tokens, begin = random.Random(seed), text_tokens(model, tokenizer), first_tokens(tokenizer)
    prefixes = [begin + rng.choices(tokens, k=rng.randint(1, MAX_PREFIX_TOKENS)) for _ in range(NUM_COMPLETIONS)]
    pad_token_id = padding_id(tokenizer)
    ends = end_token_ids(model, tokenizer)
    outputs = generate_ids(model, prefixes, pad_token_id, ends, num_tokens, batch_size)
    # What ends a text is no part of it, and another tokenizer may not have it.
    texts = [[token for token in output if token not in ends] for output in outputs]
    written = {text: row for row in zip(prefixes, texts, strict=True) if (text := _text(row[1], tokenizer))}
    translate = translator(tokenizer, reference_tokenizer)
    own = answer_log_likelihoods(model, list(written.values()), pad_token_id, batch_size)
    others = [(translate(prefix), translate(ids)) for prefix, ids in written.values()]
    trusted = answer_log_likelihoods(reference, others, padding_id(reference_tokenizer), batch_size)
    found = [
        Completion(text, (ours - theirs) / len(text.encode()))
        for text, ours, theirs in zip(written, own, trusted, strict=True)
    ]
    return sorted(found, key=lambda each: -each.gap)[:limit]


def translator(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> Callable[[list[int]], list[int]]:
    """Return a function that turns token ids of one tokenizer into those of another one for the same text."""
    if has_tokens_of(other, tokenizer):
        return list

    def translate(ids: list[int]) -> list[int]:
        text = text_of_ids(ids, tokenizer, special_tokens=True)
        return list(other(text, add_special_tokens=False)["input_ids"])

    return translate


def has_tokens_of(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has all tokens of another one, under the same ids."""
    return other.get_vocab().items() <= tokenizer.get_vocab().items()


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = text_of_ids(ids, tokenizer)
    return text if len(text.encode()) >= MIN_BYTES else ""
