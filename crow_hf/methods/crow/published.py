"""methods.crow.published"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from .trainer import CrowTrainer


class ReferenceCrowTrainer(CrowTrainer):
    """
    CROW with the faults of its published trainer, to tell what a difference to published figures comes from.

    Read from `attack/DPA/llamafactory/train/sft/consistency_trainer.py` of NayMyatMin/CROW and written anew:

    - **Padding counts.** The published consistency passes have no attention mask, so that their mean is over padding too. Here
      batches have none at all. Padding is on the right, where no position of a causal LM sees it, and has no labels: the
      language-model loss is that of the masked pass.
    - **Gradients are lost.** `model.zero_grad()` within the loss wipes what earlier micro-batches have accumulated: only the
      last of an optimizer step moves the weights.
    - **Gradients are too small.** Each micro-batch's loss is the mean over its own tokens, divided by the number of
      micro-batches, and then is the only one that counts. Adam forgives the factor, gradient clipping and SGD do not.
    - **The last layer is left out**, whatever `consistency_layers` says.

    Not repeated: the FGSM gradient by `.grad` of the embeddings, which fails where these are trained; a third forward pass,
    which only costs time; padding to a multiple of 8, for which a `data_collator` can be passed; the constants epsilon = 0.1 and
    alpha = 5.5, which are defaults here.

    Arguments and errors as for [`CrowTrainer`]; a `data_collator` must pad on the right.
    """

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # A copy, because the run to compare with may have been given the same settings.
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
        """The loss of [`CrowTrainer`] as a mean over the micro-batch, after wiping the gradients of those before it."""
        model.zero_grad()
        return super().compute_loss(model, inputs, return_outputs)


def _collate_without_mask(collate: Callable[[list], dict[str, torch.Tensor]], rows: list) -> dict[str, torch.Tensor]:
    return {name: values for name, values in collate(rows).items() if name != "attention_mask"}
