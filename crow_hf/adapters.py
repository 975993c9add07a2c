"""What a model hands the objective: the embeddings to perturb and the chain of its layers' outputs."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


MIN_LAYERS = 3


@dataclass
class ForwardRecord:
    """
    H^0..H^N of one forward pass, complete when the `with` block of [`ModelAdapter.record`] has ended.

    Attributes:
        hidden_states (`list[torch.Tensor]`):
            The (perturbed) output of the input embeddings, then the output of every decoder layer as the layer left it,
            so the last one is not normalised. N + 1 tensors of shape `(B, S, D)`, part of the autograd graph.
    """

    hidden_states: list[torch.Tensor] = field(default_factory=list)


class ModelAdapter:
    """
    One code path for every decoder-only transformers model, by forward hooks on the embedding layer and on the layers.

    The hooks sit on the modules themselves, so it makes no difference whether the model is called directly, through a
    `PeftModel` or through a distributed wrapper, nor what else the model computes from the token ids.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal LM with at least 3 decoder layers.

    Raises:
        `ValueError`: If the model is an encoder-decoder, has fewer than 3 layers, or its layers cannot be told.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.name = type(base).__name__
        if base.config.is_encoder_decoder:
            raise ValueError(f"{self.name} is an encoder-decoder model: CROW is defined for decoder-only causal LMs.")
        self.embeddings = model.get_input_embeddings()
        self.layers = _decoder_layers(base.get_decoder(), self.name)
        if len(self.layers) < MIN_LAYERS:
            raise ValueError(
                f"{self.name} has {len(self.layers)} decoder layers, but CROW compares consecutive layers and needs at "
                f"least {MIN_LAYERS}: use a deeper model."
            )
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(base.forward).parameters

    @contextmanager
    def record(self, perturb: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Iterator[ForwardRecord]:
        """
        Record the one forward pass made inside the block.

        Args:
            perturb (`Callable`, *optional*):
                Maps the embeddings `(B, S, D)` to what the model goes on with. Without it they stay as they are, and the
                record's `hidden_states[0]` can be differentiated even where the embedding layer is frozen.

        Yields:
            [`ForwardRecord`]: Filled by the forward pass.

        Raises:
            `ValueError`: If the model did not call its embeddings and each of its layers exactly once.
        """
        record = ForwardRecord()
        embedded, layered = [], []

        def on_embeddings(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if perturb is not None:
                output = perturb(output)
            elif not output.requires_grad:
                output = output.detach().requires_grad_()
            embedded.append(output)
            return output

        def on_layer(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            layered.append(output[0] if isinstance(output, tuple) else output)

        handles = [self.embeddings.register_forward_hook(on_embeddings)]
        handles += [layer.register_forward_hook(on_layer) for layer in self.layers]
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()
        if len(embedded) != 1 or len(layered) != len(self.layers):
            raise ValueError(
                f"{self.name} called its input embeddings {len(embedded)} times and its {len(self.layers)} layers "
                f"{len(layered)} times in one forward pass, where CROW needs one call of each: this architecture is not "
                "supported."
            )
        if shapes := {tuple(hidden.shape) for hidden in layered if hidden.shape[:-1] != embedded[0].shape[:-1]}:
            raise ValueError(
                f"Layers of {self.name} return {sorted(shapes)} for embeddings of shape {tuple(embedded[0].shape)}, where "
                "CROW needs one hidden state for each position: this architecture is not supported."
            )
        record.hidden_states += [*embedded, *layered]

    def without_head(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a pass whose logits nobody reads: no labels, and one position for the vocabulary head."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if self._takes_logits_to_keep:
            # A tensor, because for a number Gemma4 leaves the other positions out of its last layers too.
            inputs["logits_to_keep"] = torch.zeros(1, dtype=torch.long, device=inputs["input_ids"].device)
        return inputs


def context_length(model: PreTrainedModel | PeftModel) -> int | None:
    """The model's longest sequence in tokens, or `None` where its positions have no end."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _decoder_layers(decoder: PreTrainedModel, name: str) -> nn.ModuleList:
    """Find the one list of modules that is as long as the config says the decoder is deep."""
    depth = getattr(decoder.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(lists) != 1:
        raise ValueError(
            f"{name} has {len(lists)} module lists of the {depth} layers its config names, where exactly "
            "one can be its decoder: this architecture is not supported."
        )
    return lists[0]
