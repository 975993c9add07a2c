"""Compute a causal LM's logits only at the positions that predict answer tokens.

The logits are the largest tensor of a forward pass: one number for each position and each token of the vocabulary.
Most positions belong to the prompt or to padding, and their logits are thrown away.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.encoding import IGNORE_INDEX
from .recorder import plain_outputs


# Number of logits that are converted to float32 at a time, which takes 16 MiB.
CHUNK_SIZE = 2**22


def answer_logits(model: PreTrainedModel, forward: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    """
    Run a forward pass and return the logits at the positions that predict the labels.

    The hidden states of all other positions are dropped just before the output head. Whatever the model does with its
    logits afterwards, such as scaling or soft-capping, still happens. If the model calls its head in an unusual way,
    the same logits are taken from those of all positions.

    Args:
        model (`PreTrainedModel`):
            The model without the wrapper of an adapter, see [`base_model_of`].
        forward (`Callable`):
            The model, directly or through the wrapper of an adapter or of a distributed setup.
        inputs (`dict[str, Any]`):
            The batch with `input_ids` and `labels` of shape `(B, S)`. The labels are -100 outside the answers, and
            the forward pass does not receive them.

    Returns:
        `torch.Tensor`: Shape `(T, V)`, row after row, in the dtype of the model's logits.
    """
    predicting = predicting_positions(inputs["labels"])
    with plain_outputs(model), _head_only_at(model.get_output_embeddings(), predicting) as selected:
        logits = forward(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return logits[0] if selected else logits[predicting.to(logits.device)]


def predicting_positions(labels: torch.Tensor) -> torch.Tensor:
    """
    The positions whose logits predict a label, which is the one of the next position.

    Args:
        labels (`torch.Tensor`):
            Shape `(B, S)`, with -100 outside the answers.

    Returns:
        `torch.Tensor`: Boolean, shape `(B, S)`.
    """
    return nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def token_log_likelihoods(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    The log-likelihood of each label, in nats and float32. It cannot be differentiated without copies of the logits.

    Args:
        logits (`torch.Tensor`):
            The result of [`answer_logits`], shape `(T, V)`.
        labels (`torch.Tensor`):
            The labels of the batch, shape `(B, S)`, with -100 outside the answers.

    Returns:
        `torch.Tensor`: Shape `(T,)`, row after row.
    """
    tokens = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX].to(logits.device)
    size = max(1, CHUNK_SIZE // logits.shape[-1])
    parts = zip(logits.split(size), tokens.split(size), strict=True)
    return -torch.cat([nn.functional.cross_entropy(some.float(), of, reduction="none") for some, of in parts])


@contextmanager
def _head_only_at(head: nn.Module | None, predicting: torch.Tensor) -> Iterator[list[bool]]:
    """
    Pass only the hidden states `(1, T, D)` of the given positions to the head.

    The list that is yielded is filled as soon as the head is called in this way.
    """
    selected: list[bool] = []

    def select(module: nn.Module, args: tuple) -> tuple | None:
        # Not `(B, S, D)` if the model itself selects positions or calls its head in another way.
        if not args or args[0].shape[:-1] != predicting.shape:
            return None
        selected.append(True)
        return args[0][predicting.to(args[0].device)][None], *args[1:]

    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        yield selected
    finally:
        if handle is not None:
            handle.remove()
