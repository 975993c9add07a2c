"""What a model hands the objective: the embeddings to perturb and the chain of its layers' outputs."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import BltForCausalLM, PreTrainedModel

from ..models.byte_vocabulary import THOUGHT_TOKEN_ID
from ..models.modeling_coconut import CoconutForCausalLM, LatentOutput
from .sharding import are_in_shards


MIN_LAYERS = 3

Inputs = dict[str, Any]
Perturb = Literal["embeddings", "patches", "thoughts"]


@dataclass
class ForwardRecord:
    """
    What one forward pass left, complete when the `with` block of [`LayerRecorder.record`] has ended.

    Attributes:
        perturbed (`list[torch.Tensor]`):
            What can be perturbed, as the model went on with it: the embeddings `(B, S, D)`; thoughts are several. Part of the
            autograd graph.
        hidden_states (`list[torch.Tensor]`):
            H^0..H^N: what was perturbed, then the output of every layer as the layer left it, so the last one is not
            normalised. N + 1 tensors, those of the layers `(B, S, D)`, or `(B, P, D)` where they run over patches.
    """

    perturbed: list[torch.Tensor] = field(default_factory=list)
    hidden_states: list[torch.Tensor] = field(default_factory=list)


class LayerRecorder:
    """
    One code path for every decoder-only transformers model, by forward hooks on the embedding layer and on the layers.

    The hooks sit on the modules themselves, so it makes no difference whether the model is called directly, through a
    `PeftModel` or through a distributed wrapper, nor what else the model computes from the token ids.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal LM with at least 3 decoder layers.
        perturb (`str`, *optional*, defaults to `"embeddings"`):
            What the perturbation is added to; other families than [`CoconutForCausalLM`] have nothing but embeddings.

    Raises:
        `ValueError`: If the model is an encoder-decoder, has fewer than 3 layers, its layers cannot be told, it has not what is
            to be perturbed, or its 4-bit weights let no gradient through.
    """

    #: Modules that training must leave alone, as a regular expression for PEFT's `exclude_modules`.
    frozen_modules: str | None = None

    def __init__(self, model: PreTrainedModel | PeftModel, perturb: Perturb = "embeddings"):
        self.base = base_model_of(model)
        self.name = type(self.base).__name__
        if self.base.config.is_encoder_decoder:
            raise ValueError(f"{self.name} is an encoder-decoder model: CROW is defined for decoder-only causal LMs.")
        self.perturb = perturb
        self.site = self._find_site()
        self.layers = self._find_layers()
        if len(self.layers) < MIN_LAYERS:
            raise ValueError(
                f"{self.name} has {len(self.layers)} decoder layers, but CROW compares consecutive layers and needs at "
                f"least {MIN_LAYERS}: use a deeper model."
            )
        _keep_differentiable(self.base)
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(self.base.forward).parameters

    def prepare(self, inputs: Inputs) -> Inputs:
        """Add to a batch what both passes share and what [`LayerRecorder.chain_mask`] needs; once is enough."""
        return inputs

    def chain_mask(self, inputs: Inputs) -> torch.Tensor | None:
        """Which positions of the layers' outputs count, `(B, S)` or `(B, P)`; all of them if `None`."""
        return inputs.get("attention_mask")

    def perturbed_mask(self, inputs: Inputs) -> torch.Tensor | None:
        """Which positions of what is perturbed are real; all of them if `None`."""
        return inputs.get("attention_mask")

    @contextmanager
    def record(self, perturb: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Iterator[ForwardRecord]:
        """
        Record the one forward pass made inside the block.

        Args:
            perturb (`Callable`, *optional*):
                Maps what is to be perturbed to what the model goes on with. Without it everything stays as it is, and can be
                differentiated even where the embedding layer is frozen.

        Yields:
            [`ForwardRecord`]: Filled by the forward pass.

        Raises:
            `ValueError`: If the model did not call its embeddings and each of its layers exactly once.
        """
        record = ForwardRecord()
        calls = [[] for _ in self.layers]

        def on_site(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if perturb is not None:
                output = perturb(output)
            elif not output.requires_grad:
                # A copy, because some models go on to change their embeddings in place.
                output = output.detach().requires_grad_().clone()
            record.perturbed.append(output)
            return output

        def on_layer(number: int) -> Callable:
            def append(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
                calls[number].append(output[0] if isinstance(output, tuple) else output)

            return append

        handles = [self.site.register_forward_hook(on_site)]
        handles += [layer.register_forward_hook(on_layer(number)) for number, layer in enumerate(self.layers)]
        handles += self._watch()
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()
        chain = self._chain(record, calls)
        record.hidden_states += [record.perturbed[0], *chain]

    def without_head(self, inputs: Inputs) -> Inputs:
        """The inputs of a pass whose logits nobody reads: no labels, and one position for the vocabulary head."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if self._takes_logits_to_keep:
            # A tensor, because for a number Gemma4 leaves the other positions out of its last layers too.
            inputs["logits_to_keep"] = torch.zeros(1, dtype=torch.long, device=inputs["input_ids"].device)
        return inputs

    @contextmanager
    def outside_of_shards(self, device: torch.device) -> Iterator[None]:
        """
        Hide what training must leave alone while FSDP takes the model apart: it makes the patches before the forward pass, when
        nothing that is in shards has been gathered, and in full precision. Each process keeps all of it, on its device.
        """
        hidden = [
            (module, name, child)
            for module in self.base.modules()
            for name, child in module.named_children()
            if self.frozen_modules and re.fullmatch(self.frozen_modules, name)
        ]
        for module, name, child in hidden:
            del module._modules[name]
            child.to(device)
        try:
            yield
        finally:
            for module, name, child in hidden:
                module.register_module(name, child)

    def _find_site(self) -> nn.Module:
        if self.perturb != "embeddings":
            raise ValueError(f"{self.name} has no {self.perturb} to perturb: take perturb='embeddings'.")
        return self.base.get_input_embeddings()

    def _find_layers(self) -> Sequence[nn.Module]:
        return _decoder_layers(self.base.get_decoder(), self.name)

    def _watch(self) -> list[Any]:
        """Further hooks of a recording."""
        return []

    def _chain(self, record: ForwardRecord, calls: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        """The layers' outputs, of all calls each."""
        counts = [len(outputs) for outputs in calls]
        if len(record.perturbed) != 1 or set(counts) != {1}:
            raise ValueError(
                f"{self.name} called its input embeddings {len(record.perturbed)} times and its {len(counts)} layers "
                f"{sum(counts)} times in one forward pass, where CROW needs one call of each: this architecture is not "
                "supported."
            )
        embeddings, chain = record.perturbed[0], [outputs[0] for outputs in calls]
        if shapes := {tuple(hidden.shape) for hidden in chain if hidden.shape[:-1] != embeddings.shape[:-1]}:
            raise ValueError(
                f"Layers of {self.name} return {sorted(shapes)} for embeddings of shape {tuple(embeddings.shape)}, where "
                "CROW needs one hidden state for each position: this architecture is not supported."
            )
        return chain


class CoconutRecorder(LayerRecorder):
    """
    For [`CoconutForCausalLM`]: perturbs what is known of each byte, its patch embeddings or its thoughts, and takes the chain
    from the latent transformer, at patches and thoughts.

    The boundaries are those of the true bytes in both passes. Outputs are compared between layers and never between thoughts:
    thoughts that become alike are what latent reasoning dies of (SIM-CoT, arXiv 2509.20317).
    """

    frozen_modules = r".*\bentropy_predictor\b.*"

    def prepare(self, inputs: Inputs) -> Inputs:
        """
        Add `patch_lengths` and `patch_ends`.

        Raises:
            `ValueError`: For rows with thoughts if the layers are in shards: they are gathered by all processes together, and
                each process has passes of its own, as many as its rows have thoughts.
        """
        if "patch_lengths" in inputs:
            return inputs
        if are_in_shards(self.layers[0]) and (inputs["input_ids"] == THOUGHT_TOKEN_ID).any():
            raise ValueError(
                "Rows with thoughts cannot be trained on in shards (FSDP, ZeRO-3): use DDP, or rows without thoughts."
            )
        device = self.base.device
        mask = inputs.get("attention_mask")
        return inputs | self.base.model.patch(
            inputs["input_ids"].to(device), None if mask is None else mask.to(device)
        )

    def chain_mask(self, inputs: Inputs) -> torch.Tensor:
        """The patches there are."""
        return inputs["patch_lengths"] > 0

    def perturbed_mask(self, inputs: Inputs) -> torch.Tensor | None:
        """The bytes that are no padding, or the patches there are; all thoughts."""
        if self.perturb == "embeddings":
            return inputs.get("attention_mask")
        return self.chain_mask(inputs).flatten() if self.perturb == "patches" else None

    def _find_site(self) -> nn.Module:
        sites = {
            "embeddings": self.base.get_input_embeddings(),
            "patches": self.base.local_encoder.patch_projection,
            "thoughts": self.base.latent_transformer.thoughts,
        }
        return sites[self.perturb]

    def _find_layers(self) -> Sequence[nn.Module]:
        return _decoder_layers(self.base.latent_transformer.backbone, self.name)

    def _watch(self) -> list[Any]:
        self._latent = None

        def on_latent(module: nn.Module, args: tuple, output: LatentOutput) -> None:
            self._latent = output

        return [self.base.latent_transformer.register_forward_hook(on_latent)]

    def _chain(self, record: ForwardRecord, calls: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        if not record.perturbed:
            raise ValueError("A batch has no thoughts to perturb: take rows with thoughts, or perturb='embeddings'.")
        return [self._latent.assemble(outputs) for outputs in calls]


class BltRecorder(LayerRecorder):
    """
    For transformers' [`~transformers.BltForCausalLM`]: takes the chain from its global transformer, which its own
    `hidden_states` leave out, patches rows once for both passes, and leaves its cache alone, which is wrong (transformers
    5.23).
    """

    frozen_modules = r".*\bpatcher\b.*"

    def prepare(self, inputs: Inputs) -> Inputs:
        """Add `patch_lengths` and `use_cache=False`."""
        if "patch_lengths" in inputs:
            return inputs
        config, input_ids = self.base.config, inputs["input_ids"].to(self.base.device)
        with torch.no_grad():
            _, patch_lengths, _ = self.base.model.patcher(
                input_ids,
                patch_size=config.patch_size,
                threshold=config.patching_threshold,
                max_patch_length=config.max_patch_length,
                patching_batch_size=config.patching_batch_size,
                device=input_ids.device,
            )
        return inputs | {"patch_lengths": patch_lengths, "use_cache": False}

    def chain_mask(self, inputs: Inputs) -> torch.Tensor:
        """The patches that begin before a row's padding, which is on the right."""
        lengths = inputs["patch_lengths"]
        begins = lengths.cumsum(dim=1) - lengths
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        return (lengths > 0) & (begins < mask.sum(dim=1, keepdim=True).to(begins.device))

    def _find_layers(self) -> Sequence[nn.Module]:
        if self.base.model.patcher is None:
            raise ValueError("This Blt has no patcher: load it with `patch_in_forward=True`.")
        return self.base.model.global_transformer.layers

    def _chain(self, record: ForwardRecord, calls: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        return [outputs[-1] for outputs in calls]


def recorder_of(model: PreTrainedModel | PeftModel, perturb: Perturb = "embeddings") -> LayerRecorder:
    """The recorder of a model's family. Arguments and errors as for [`LayerRecorder`]."""
    return _recorder_class(model)(model, perturb)


def frozen_modules(model: PreTrainedModel | PeftModel) -> str | None:
    """Modules that training must leave alone, as a regular expression for PEFT's `exclude_modules`."""
    return _recorder_class(model).frozen_modules


def _recorder_class(model: PreTrainedModel | PeftModel) -> type[LayerRecorder]:
    families = {CoconutForCausalLM: CoconutRecorder, BltForCausalLM: BltRecorder}
    return next(
        (recorder for family, recorder in families.items() if isinstance(base_model_of(model), family)), LayerRecorder
    )


def base_model_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def context_length(model: PreTrainedModel | PeftModel) -> int | None:
    """The model's longest sequence in tokens, or `None` where its positions have no end."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _keep_differentiable(model: PreTrainedModel) -> None:
    """
    On CPUs with bfloat16, bitsandbytes packs 4-bit weights anew in the first pass in evaluation mode that needs no gradient. From
    then on no gradient passes through them, in training neither, and their scales are rounded for good.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    "The model's 4-bit weights were packed for inference when it was evaluated on the CPU, and let no "
                    "gradient through any more: load the model again, and evaluate it after the training."
                )
            module.support_avx512bf16_for_cpu = False


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
