"""The predictions of a model along given tokens, a batch at a time."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..data.collators import CrowDataCollator
from ..data.encoding import IGNORE_INDEX, padding_id
from ..training.answer_logits import answer_logits
from ..training.recorder import base_model_of
from .generation import inference_mode


# Tokens of a batch with its padding. The logits of one batch exist at a time.
MAX_BATCH_TOKENS = 4096


class Passage(NamedTuple):
    """
    Tokens to predict, after others that are given.

    Attributes:
        ids (`list[int]`):
            The token ids, the given ones first.
        first (`int`):
            The position of the first token to predict, at least 1.
    """

    ids: list[int]
    first: int

    @property
    def num_tokens(self) -> int:
        """The number of tokens to predict."""
        return len(self.ids) - self.first


def predict(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    batch_size: int,
) -> Iterator[tuple[Passage, torch.Tensor]]:
    """
    Yield each passage with the logits of its tokens. The logits of one batch exist at a time.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        passages (`Sequence[Passage]`):
            The passages, sorted by their length.
        batch_size (`int`):
            Number of passages per batch. Batches of more than 4,096 tokens are split.

    Returns:
        `Iterator[tuple[Passage, torch.Tensor]]`: The passages in their order, with logits in float32 of shape
        `(T, V)`.
    """
    collate = CrowDataCollator(padding_id(tokenizer))
    batches = _batches(passages, batch_size)
    with inference_mode(model):
        for batch in tqdm(batches, desc="Reading predictions", unit="batch", disable=not batches):
            encoded = [
                {"input_ids": each.ids, "labels": [IGNORE_INDEX] * each.first + each.ids[each.first :]}
                for each in batch
            ]
            inputs = {name: value.to(model.device) for name, value in collate(encoded).items()} | {"use_cache": False}
            logits = answer_logits(base_model_of(model), model, inputs)
            for passage, part in zip(batch, logits.split([each.num_tokens for each in batch]), strict=True):
                yield passage, part.float()


def _batches(passages: Sequence[Passage], batch_size: int) -> list[list[Passage]]:
    """Divide passages, which are sorted by length, into batches that are small enough with their padding."""
    batches: list[list[Passage]] = []
    for passage in passages:
        last = batches[-1] if batches else []
        if not last or len(last) == batch_size or (len(last) + 1) * len(passage.ids) > MAX_BATCH_TOKENS:
            batches.append([passage])
        else:
            last.append(passage)
    return batches
