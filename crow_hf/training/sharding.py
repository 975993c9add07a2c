"""Weights in shards over the processes: FSDP of version 2, and stage 3 of DeepSpeed's ZeRO."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations import is_deepspeed_zero3_enabled


def in_shards(args: TrainingArguments) -> bool:
    """Whether the weights are going to be in shards, by the arguments or by how `accelerate launch` was called."""
    by_fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return by_fsdp or is_deepspeed_zero3_enabled()


def are_in_shards(model: nn.Module) -> bool:
    """Whether a model's weights are in shards: no process has all of them."""
    return isinstance(model, FSDPModule) or any(_is_zero3(parameter) for parameter in model.parameters())


def num_parameters(model: PreTrainedModel | PeftModel) -> int:
    """Of the whole model, also where no process has all of it."""
    return model.num_parameters() + sum(weight.ds_numel for weight in model.parameters() if _is_zero3(weight))


def are_finite(model: nn.Module) -> bool:
    """Whether no weight that this process has is NaN or infinite."""
    weights = (parameter.ds_tensor if _is_zero3(parameter) else parameter for parameter in model.parameters())
    return all(bool(weight.isfinite().all()) for weight in weights)


@contextmanager
def loaded_whole() -> Iterator[None]:
    """
    Keep transformers from loading a model into the shards of ZeRO-3, which it does as soon as there are training arguments:
    such a model can do nothing before the training begins.
    """
    config = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config


def zero3_engine(model: PreTrainedModel | PeftModel) -> nn.Module:
    """What keeps a model that is not trained in shards, as long as it is there; the model is its `module`."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def gathered(*parameters: torch.Tensor) -> AbstractContextManager:
    """Weights of ZeRO-3 put together in all processes, and what the first one made of them taken apart again at the end."""
    if not any(_is_zero3(parameter) for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


def placed_as(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The value in the parameter's precision, on its device and in shards as it is."""
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, parameter.dtype)


def _is_zero3(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_tensor")
