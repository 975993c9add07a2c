"""Record the embeddings and layer outputs of a forward pass, and perturb the embeddings, in any decoder-only model."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import BltForCausalLM, PreTrainedModel

from ..models.byte_vocabulary import THOUGHT_TOKEN_ID
from ..models.modeling_coconut import CoconutForCausalLM, LatentOutput
from .sharding import is_sharded


MIN_LAYERS = 3
# PEFT refuses a LoRA on some modules of these models, because their fused kernels bypass it.
MAMBA_LAYERS = ("out_proj", "conv1d")
MAMBA_TYPES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
# Values of the fields of a config that decide what a model returns.
PLAIN_OUTPUTS = {
    "return_dict": True,
    "output_hidden_states": False,
    "_output_attentions": False,
    "output_router_logits": False,
}

Inputs = dict[str, Any]
Perturb = Literal["embeddings", "patches", "thoughts"]


@dataclass
class ForwardRecord:
    """
    The record of one forward pass. It is complete when the `with` block of [`LayerRecorder.record`] ends.

    Attributes:
        perturbed (`list[torch.Tensor]`):
            The tensors that can be perturbed, with any perturbation added and within the autograd graph: one tensor
            of embeddings `(B, S, D)`, or one tensor per thought.
        hidden_states (`list[torch.Tensor]`):
            H^0..H^N, a list of N + 1 tensors: the perturbed embeddings, then the raw output of each layer. The last
            one is not normalized. The layers' outputs are `(B, S, D)`, or `(B, P, D)` if the layers run over P
            patches.
    """

    perturbed: list[torch.Tensor] = field(default_factory=list)
    hidden_states: list[torch.Tensor] = field(default_factory=list)


class LayerRecorder:
    """
    Records the embeddings and the layers' outputs of any decoder-only transformers model with forward hooks.

    The hooks are registered on the embedding layer and on the decoder layers themselves. The model can therefore be
    called directly, through a `PeftModel` or through a distributed wrapper, and it can use the token ids for anything
    else, such as per-layer embeddings.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal LM with at least 3 decoder layers.
        perturb (`str`, *optional*, defaults to `"embeddings"`):
            What the perturbation is added to: `"embeddings"`, or `"patches"` or `"thoughts"` of a
            [`CoconutForCausalLM`].

    Attributes:
        base (`PreTrainedModel`):
            The model without an adapter's wrapper.
        layers (`nn.ModuleList`):
            The decoder layers.
        frozen_modules (`str`, *optional*):
            Modules that must not be trained, as a regular expression for PEFT's `exclude_modules`.

    Raises:
        `ValueError`: If the model is an encoder-decoder, has fewer than 3 layers, or has an unknown layout, if it has
            no such tensors to perturb, or if its 4-bit weights let no gradient through.
    """

    frozen_modules: str | None = None

    def __init__(self, model: PreTrainedModel | PeftModel, perturb: Perturb = "embeddings"):
        self.base = base_model_of(model)
        self.name = type(self.base).__name__
        if self.base.config.is_encoder_decoder:
            raise ValueError(f"{self.name} is an encoder-decoder model, but CROW needs a decoder-only causal LM.")
        self.perturb = perturb
        self.site = self._find_site()
        self.layers = self._find_layers()
        if len(self.layers) < MIN_LAYERS:
            raise ValueError(
                f"{self.name} has {len(self.layers)} decoder layers, but CROW compares consecutive layers and needs "
                f"at least {MIN_LAYERS}. Use a deeper model."
            )
        _keep_4bit_differentiable(self.base)
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(self.base.forward).parameters

    def prepare(self, inputs: Inputs) -> Inputs:
        """
        Add to a batch the inputs that both passes share and that [`LayerRecorder.chain_mask`] needs, such as patches.

        A prepared batch is returned unchanged.
        """
        return inputs

    def chain_mask(self, inputs: Inputs) -> torch.Tensor | None:
        """The mask of the layers' outputs, `(B, S)` or `(B, P)`. If `None`, every position counts."""
        return inputs.get("attention_mask")

    def perturbed_mask(self, inputs: Inputs) -> torch.Tensor | None:
        """The mask of the perturbed tensors. If `None`, every position is real."""
        return inputs.get("attention_mask")

    @contextmanager
    def record(self, perturb: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Iterator[ForwardRecord]:
        """
        Record the one forward pass made inside the block.

        Args:
            perturb (`Callable`, *optional*):
                Maps the tensor to be perturbed to the tensor that the model continues with. Without it, the values
                stay unchanged, and they require a gradient even if the embedding layer is frozen.

        Yields:
            [`ForwardRecord`]: The record, filled by the forward pass.

        Raises:
            `ValueError`: If the model did not call its embeddings and each of its layers exactly once.
        """
        record = ForwardRecord()
        calls: list[list[torch.Tensor]] = [[] for _ in self.layers]

        def on_site(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if perturb is not None:
                output = perturb(output)
            elif not output.requires_grad:
                # The clone is needed because some models change their embeddings in place.
                output = output.detach().requires_grad_().clone()
            record.perturbed.append(output)
            return output

        def on_layer(number: int) -> Callable:
            def append(module: nn.Module, args: tuple, output: torch.Tensor | Sequence) -> None:
                calls[number].append(output if isinstance(output, torch.Tensor) else output[0])

            return append

        handles = [self.site.register_forward_hook(on_site)]
        handles += [layer.register_forward_hook(on_layer(number)) for number, layer in enumerate(self.layers)]
        handles += self._register_hooks()
        try:
            with plain_outputs(self.base):
                yield record
        finally:
            for handle in handles:
                handle.remove()
        outputs = self._layer_outputs(record, calls)
        record.hidden_states += [record.perturbed[0], *outputs]

    def without_head(self, inputs: Inputs) -> Inputs:
        """Inputs for a pass whose logits are not used: no labels, and a single position for the vocabulary head."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if self._takes_logits_to_keep:
            # This is a tensor because, given an integer, Gemma4 also drops the other positions in its last layers.
            inputs["logits_to_keep"] = torch.zeros(1, dtype=torch.long, device=inputs["input_ids"].device)
        return inputs

    @contextmanager
    def frozen_modules_hidden(self, device: torch.device) -> Iterator[None]:
        """
        Hide the frozen modules from FSDP while it shards the model in the `with` block.

        They compute the patches before the forward pass, when no shards are gathered, and in full precision. Each
        process therefore keeps all of them, on its device.

        Args:
            device (`torch.device`):
                The device of this process.
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
            raise ValueError(f"{self.name} has no {self.perturb} to perturb. Use perturb='embeddings'.")
        return self.base.get_input_embeddings()

    def _find_layers(self) -> nn.ModuleList:
        decoder, whole = self.base.get_decoder(), cast(PreTrainedModel, self.base.base_model)
        # In some models, an attribute of this name is the output head.
        return _decoder_layers(decoder if isinstance(decoder, PreTrainedModel) else whole, self.name)

    def _register_hooks(self) -> list[Any]:
        """Register further hooks for one recording and return their handles."""
        return []

    def _layer_outputs(self, record: ForwardRecord, calls: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        """H^1..H^N, given the outputs of all calls of each layer."""
        counts = [len(outputs) for outputs in calls]
        if len(record.perturbed) != 1 or set(counts) != {1}:
            raise ValueError(
                f"{self.name} called its input embeddings {len(record.perturbed)} times and its {len(counts)} layers "
                f"{sum(counts)} times in one forward pass, but CROW needs one call of each. This architecture is not "
                "supported."
            )
        embeddings, outputs = record.perturbed[0], [layer_calls[0] for layer_calls in calls]
        if shapes := {tuple(hidden.shape) for hidden in outputs if hidden.shape[:-1] != embeddings.shape[:-1]}:
            raise ValueError(
                f"Layers of {self.name} return {sorted(shapes)} for embeddings of shape {tuple(embeddings.shape)}, "
                "but CROW needs one hidden state per position. This architecture is not supported."
            )
        return outputs


class CoconutRecorder(LayerRecorder):
    """
    The recorder of [`CoconutForCausalLM`].

    It perturbs the byte embeddings, the patch embeddings or the thoughts, and records the layers of the latent
    transformer, at patches and thoughts. Both passes use the patch boundaries of the unperturbed bytes. The objective
    compares layers, never thoughts with each other, because latent reasoning collapses if thoughts become similar
    (SIM-CoT, arXiv 2509.20317).
    """

    base: CoconutForCausalLM
    frozen_modules = r".*\bentropy_predictor\b.*"

    def prepare(self, inputs: Inputs) -> Inputs:
        """
        Add `patch_lengths` and `patch_ends`.

        Raises:
            `ValueError`: For rows with thoughts if the layers are sharded. All processes gather the shards together,
                but the number of passes depends on the number of thoughts in a process's own rows.
        """
        if "patch_lengths" in inputs:
            return inputs
        if is_sharded(self.layers[0]) and (inputs["input_ids"] == THOUGHT_TOKEN_ID).any():
            raise ValueError(
                "Sharded weights (FSDP, ZeRO-3) cannot be trained on rows with thoughts. Use DDP or other rows."
            )
        device = self.base.device
        mask = inputs.get("attention_mask")
        return inputs | self.base.model.patch(
            inputs["input_ids"].to(device), None if mask is None else mask.to(device)
        )

    def chain_mask(self, inputs: Inputs) -> torch.Tensor:
        """True for real patches and thoughts, shape `(B, P)`."""
        return inputs["patch_lengths"] > 0

    def perturbed_mask(self, inputs: Inputs) -> torch.Tensor | None:
        """True for real bytes or patches. Thoughts have no padding."""
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

    def _find_layers(self) -> nn.ModuleList:
        return _decoder_layers(self.base.latent_transformer.backbone, self.name)

    def _register_hooks(self) -> list[Any]:
        self._latent = None

        def on_latent(module: nn.Module, args: tuple, output: LatentOutput) -> None:
            self._latent = output

        return [self.base.latent_transformer.register_forward_hook(on_latent)]

    def _layer_outputs(self, record: ForwardRecord, calls: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        if not record.perturbed:
            raise ValueError("A batch has no thoughts to perturb. Use rows with thoughts, or perturb='embeddings'.")
        return [self._latent.assemble(outputs) for outputs in calls]


class BltRecorder(LayerRecorder):
    """
    The recorder of transformers' [`~transformers.BltForCausalLM`].

    It records the layers of the global transformer, which the model's own `hidden_states` omit. It patches rows once
    for both passes, and switches the cache off because the model computes wrong results with it (transformers 5.23).
    """

    base: BltForCausalLM
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
        """True for patches that begin before a row's padding, which is on the right, shape `(B, P)`."""
        lengths = inputs["patch_lengths"]
        begins = lengths.cumsum(dim=1) - lengths
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        return (lengths > 0) & (begins < mask.sum(dim=1, keepdim=True).to(begins.device))

    def _find_layers(self) -> nn.ModuleList:
        if self.base.model.patcher is None:
            raise ValueError("This Blt model has no patcher. Load it with `patch_in_forward=True`.")
        return self.base.model.global_transformer.layers

    def _layer_outputs(self, record: ForwardRecord, calls: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        return [outputs[-1] for outputs in calls]


def recorder_of(model: PreTrainedModel | PeftModel, perturb: Perturb = "embeddings") -> LayerRecorder:
    """Create the recorder for a model's family. Arguments and errors are those of [`LayerRecorder`]."""
    return _recorder_class(model)(model, perturb)


def frozen_modules(model: PreTrainedModel | PeftModel) -> str | None:
    """
    Modules that must not or cannot have an adapter, as a regular expression for PEFT's `exclude_modules`.

    A router of a mixture of experts may be a linear layer that returns more than one tensor. State spaces compute with
    the weight of their layer `dt_proj`, and an adapter of it has no effect.
    """
    base = base_model_of(model)
    refused = {"dt_proj", *(MAMBA_LAYERS if base.config.model_type in MAMBA_TYPES else ())}
    found = set()
    for name, module in base.named_modules():
        last = name.rpartition(".")[2]
        if last in refused or (isinstance(module, nn.Linear) and type(module).__name__.endswith("Router")):
            found.add(last)
    own = _recorder_class(model).frozen_modules
    return own or (rf".*\.({'|'.join(sorted(found))})" if found else None)


def base_model_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """
    Unwrap a `PeftModel`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A model, with or without an adapter.

    Returns:
        `PreTrainedModel`: The model inside a `PeftModel`, with the adapter's layers in place. Any other model is
        returned as it is.
    """
    if not isinstance(model, PeftModel):
        return model
    base: Any = model.get_base_model()
    return base


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode in the `with` block, so that no dropout draws random numbers."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def plain_outputs(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """
    Switch off what a model's config adds to its outputs in the `with` block, such as attentions or a router's loss.

    A mixture of experts that was trained with its router's loss still computes it, and adds it to the loss.
    """
    config = base_model_of(model).config
    parts = [vars(part) for part in (config, config.get_text_config(decoder=True))]
    own = [{name: part[name] for name in PLAIN_OUTPUTS if name in part} for part in parts]
    for part, values in zip(parts, own, strict=True):
        part.update({name: PLAIN_OUTPUTS[name] for name in values})
    try:
        yield
    finally:
        for part, values in zip(parts, own, strict=True):
            part.update(values)


def trains_only_the_head(model: PreTrainedModel | PeftModel) -> bool:
    """Whether all trainable weights are those of the output head, which no output of a layer depends on."""
    base = base_model_of(model)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    # Tied embeddings are in both.
    own = set() if head is None else {*head.parameters()} - {*embedding.parameters()}
    return {parameter for parameter in model.parameters() if parameter.requires_grad} <= own


def embedding_table(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """The weight of the input embeddings, shape `(V, D)`."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight


def context_length(model: PreTrainedModel | PeftModel) -> int | None:
    """The model's maximum sequence length in tokens, or `None` if its positions are unlimited."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def _recorder_class(model: PreTrainedModel | PeftModel) -> type[LayerRecorder]:
    families = {CoconutForCausalLM: CoconutRecorder, BltForCausalLM: BltRecorder}
    base = base_model_of(model)
    return next((recorder for family, recorder in families.items() if isinstance(base, family)), LayerRecorder)


def _keep_4bit_differentiable(model: PreTrainedModel) -> None:
    """
    Prevent bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with bfloat16, it repacks them in the first pass in evaluation mode that needs no gradient. Afterwards no
    gradient passes through them, not even in training mode, and their scales stay rounded.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    "Evaluation on the CPU has packed the model's 4-bit weights for inference, and they let no "
                    "gradient through any more. Load the model again, and evaluate it after training."
                )
            module.support_avx512bf16_for_cpu = False


def _decoder_layers(decoder: PreTrainedModel, name: str) -> nn.ModuleList:
    """The only module list of the decoder whose length is the number of layers in the config."""
    depth = getattr(decoder.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(lists) != 1:
        raise ValueError(
            f"{name} has {len(lists)} module lists as long as the {depth} layers of its config, but exactly one must "
            "be the decoder. This architecture is not supported."
        )
    return lists[0]
