"""CROW with the faults of its published trainer, to explain differences from published results."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from .trainer import CrowTrainer


class ReferenceCrowTrainer(CrowTrainer):
    """
    CROW with the faults of its published trainer, to find out where a difference from published results comes from.

    This is a new implementation of what `attack/DPA/llamafactory/train/sft/consistency_trainer.py` of NayMyatMin/CROW
    does:

    - **Padding counts.** The published consistency passes have no attention mask, so their mean includes padding. Here
      the batches have no mask at all. Padding is on the right, where no position of a causal LM sees it, and has no
      labels. The language-model loss is therefore that of the masked pass.
    - **Gradients are lost.** `model.zero_grad()` within the loss deletes the gradients of earlier micro-batches. Only
      the last micro-batch of an optimizer step changes the weights.
    - **Gradients are too small.** The loss of each micro-batch is the mean over its own tokens, divided by the number
      of micro-batches, although only one of them counts. This factor matters for gradient clipping and SGD, but not
      for Adam.
    - **The last layer is omitted**, whatever `consistency_layers` is.

    Some details are not repeated: the FGSM gradient in `.grad` of the embeddings, which fails if the embeddings are
    trained, a third forward pass, which only costs time, padding to a multiple of 8, for which a `data_collator` can
    be passed, and the constants epsilon = 0.1 and alpha = 5.5, which are defaults here.

    Arguments and errors are those of [`CrowTrainer`]. A `data_collator` must pad on the right.
    """

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The arguments are copied because the caller may pass the same object to another trainer.
        self.args = copy(self.args)
        self.args.consistency_layers = "reference"
        self.data_collator = partial(_collate_without_mask, self.data_collator)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of [`CrowTrainer`] as a mean over the micro-batch, after deleting all earlier gradients."""
        model.zero_grad()
        return super().compute_loss(model, inputs, return_outputs)


def _collate_without_mask(collate: Callable[[list], dict[str, torch.Tensor]], rows: list) -> dict[str, torch.Tensor]:
    return {name: values for name, values in collate(rows).items() if name != "attention_mask"}
