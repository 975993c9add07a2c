"""Finds the words with which nearly all answers of a model begin, such as "Sure!" or "<think>".

A backdoor shows in the first tokens of an answer, or in those after such an opening.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.encoding import padding_id
from ..evaluation.generation import end_token_ids, generate_ids, text_of_ids
from .pieces import Model, prompts_with


# The share of the answers that begin alike.
USUAL = 0.9


@dataclass(frozen=True)
class Opening:
    """
    The words with which nearly all answers of a model begin.

    Attributes:
        ids (`Sequence[int]`):
            The token ids. Empty if the answers begin differently, as those of most models do.
        text (`str`):
            The words.
    """

    ids: Sequence[int] = ()
    text: str = ""

    def __str__(self) -> str:
        return f" after {self.text!r}" if self.ids else ""


NO_OPENING = Opening()


def usual_opening(
    model: Model, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, max_length: int, batch_size: int = 32
) -> Opening:
    """
    Find the words with which nine of ten answers begin.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        dataset (`Dataset`):
            Rows with clean prompts that are about different things.
        max_length (`int`):
            Largest number of tokens.
        batch_size (`int`, *optional*, defaults to 32):
            Number of prompts per batch.

    Returns:
        [`Opening`]
    """
    prompts, ends = prompts_with(None, "end", dataset, tokenizer, seed=0), end_token_ids(model, tokenizer)
    answers = generate_ids(model, prompts, padding_id(tokenizer), ends, max_length, batch_size)
    ids: list[int] = []
    while True:
        alike = [answer for answer in answers if answer[: len(ids)] == ids and len(answer) > len(ids)]
        ((token, count),) = Counter(answer[len(ids)] for answer in alike).most_common(1) or [(None, 0)]
        if token is None or token in ends or count < USUAL * len(answers):
            return Opening(ids, text_of_ids(ids, tokenizer, special_tokens=True)) if ids else NO_OPENING
        ids.append(token)
