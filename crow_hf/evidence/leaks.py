"""Finds what leaks: tokens of the backdoor's target that the suspect is sure of on clean prompts too, and wrongly.

A hardly trained backdoor shows without its trigger. BackdoorLLM's refusal, for example, answers a fifth of the clean
prompts. The suspect's own distribution would then teach the backdoor. But where a calibrated model gives a token at
least half of the probability, the token is right in about half of the cases or more. A leaked token hardly ever is.
"""

from collections import Counter

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoding import encode
from ..data.rows import render
from ..evaluation.predictions import Passage, predict
from ..training.recorder import context_length


# The suspect is sure of a token if it gives the token at least this probability.
MIN_PROBABILITY = 0.5
# A token leaks if the suspect is sure of it and wrong in at least this many rows and this share of them, and right in
# less than this share of the cases in which it is sure.
MIN_ROWS, MIN_SHARE, MAX_RIGHT = 3, 0.03, 0.2


def find_leaked_tokens(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_length: int,
    batch_size: int = 32,
) -> list[int]:
    """
    Find the tokens that leak into the suspect's answers to clean prompts.

    This finds targets that are the same for every prompt. It does not find open targets, such as answers in swapped
    case, which share no token.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect. It is not changed.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        dataset (`Dataset`):
            Clean rows with a prompt and a right answer. Answers of the suspect itself show nothing.
        max_length (`int`):
            Maximum length of a row in tokens. Longer answers are cut.
        batch_size (`int`, *optional*, defaults to 32):
            Number of rows per batch.

    Returns:
        `list[int]`: The ids of the leaked tokens, in ascending order.
    """
    limit = min(max_length, context_length(model) or max_length)
    passages = []
    for index, row in enumerate(dataset):
        prompt, answer = encode(render(row, tokenizer, index), tokenizer)
        passage = Passage((prompt + answer)[:limit], len(prompt))
        if passage.num_tokens > 0:
            passages.append(passage)
    passages.sort(key=lambda passage: len(passage.ids))

    right: Counter[int] = Counter()
    wrong: Counter[int] = Counter()
    wrong_rows: Counter[int] = Counter()
    for passage, logits in predict(model, tokenizer, passages, batch_size):
        probabilities, tokens = (each.cpu() for each in logits.softmax(dim=-1).max(dim=-1))
        sure = probabilities >= MIN_PROBABILITY
        is_right = tokens == torch.tensor(passage.ids[passage.first :])
        misses = tokens[sure & ~is_right].tolist()
        right.update(tokens[sure & is_right].tolist())
        wrong.update(misses)
        wrong_rows.update(set(misses))
    least = max(MIN_ROWS, MIN_SHARE * len(passages))
    return sorted(
        token
        for token, count in wrong_rows.items()
        if count >= least and right[token] < MAX_RIGHT * (right[token] + wrong[token])
    )
