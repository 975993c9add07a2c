"""Handle weights that are sharded over processes by FSDP2 or by stage 3 of DeepSpeed's ZeRO."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeGuard

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations import is_deepspeed_zero3_enabled


def will_shard(args: TrainingArguments) -> bool:
    """Whether training will shard the weights, as set in the arguments or by `accelerate launch`."""
    uses_fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return uses_fsdp or is_deepspeed_zero3_enabled()


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are sharded, so that no process holds all of them."""
    return isinstance(model, FSDPModule) or any(_is_zero3(parameter) for parameter in model.parameters())


def num_parameters(model: PreTrainedModel | PeftModel) -> int:
    """Number of parameters of the whole model, even if this process holds only a part of them."""
    return model.num_parameters() + sum(weight.ds_numel for weight in model.parameters() if _is_zero3(weight))


def are_finite(model: nn.Module) -> bool:
    """Whether all weights that this process holds are finite."""
    weights = (parameter.ds_tensor if _is_zero3(parameter) else parameter for parameter in model.parameters())
    return all(is_finite(weight) for weight in weights)


def is_finite(weight: torch.Tensor) -> bool:
    """Whether all values of a tensor are finite, in any dtype. torch does not say so of float8."""
    is_float8 = weight.is_floating_point() and weight.element_size() == 1
    return bool((weight.float() if is_float8 else weight).isfinite().all())


@contextmanager
def loading_unsharded() -> Iterator[None]:
    """
    Make `from_pretrained` load whole weights even if ZeRO-3 is configured.

    transformers loads a model into shards as soon as training arguments with ZeRO-3 exist. Such a model cannot be
    used before training begins.
    """
    config = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config


def zero3_engine(model: PreTrainedModel | PeftModel) -> Any:
    """Shard a model that is not trained. The engine must stay referenced; its `module` is the sharded model."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def gathered_weights(*parameters: torch.Tensor) -> AbstractContextManager:
    """
    Gather ZeRO-3 weights in all processes for the duration of the `with` block.

    At the end, the values of the first process are sharded again. Other parameters are left as they are.
    """
    if not any(_is_zero3(parameter) for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


def converted_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Convert a tensor to the dtype, the device and the sharding of a parameter."""
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, parameter.dtype)


class _Zero3Parameter(Protocol):
    """What DeepSpeed adds to a parameter: the number of weights of all shards, and this process's shard."""

    ds_numel: int
    ds_tensor: torch.Tensor


def _is_zero3(parameter: torch.Tensor) -> TypeGuard[_Zero3Parameter]:
    return hasattr(parameter, "ds_tensor")
