"""The defences CROW was compared with, and CROW as its published code runs it.

Pruning and quantisation change a model in place and need no training. What they change are the weights of the linear layers
inside the decoder's layers, those over bytes and over patches in a [`CoconutForCausalLM`]. All else stays as it is: what embeds
tokens and patches, the vocabulary head, norms, biases, and modules that training must leave alone.
"""

import re
from collections.abc import Callable

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..data.encoding import prepare_dataset
from ..training.recorder import context_length, frozen_modules


INT4_GROUP_SIZE = 64


@torch.no_grad()
def prune_by_magnitude(model: PreTrainedModel, sparsity: float = 0.35) -> None:
    """
    Zero the smallest weights of each linear layer, in place.

    Args:
        model (`PreTrainedModel`):
            A causal LM; an adapter must have been merged into it.
        sparsity (`float`, *optional*, defaults to 0.35):
            Share of each weight matrix that is zeroed, rounded to whole weights. CROW's paper takes 0.35 for Llama and 0.65
            for Mistral.

    Raises:
        `ValueError`: If `sparsity` is no share, or the model has an adapter, is quantised, or keeps weights elsewhere than in
            linear layers.
    """
    _check_sparsity(sparsity)
    for linear in _linear_layers(model).values():
        weight = linear.weight
        smallest = weight.abs().flatten().topk(round(sparsity * weight.numel()), largest=False).indices
        weight[torch.unravel_index(smallest, weight.shape)] = 0


@torch.no_grad()
def prune_by_wanda(
    model: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | None = None,
    sparsity: float = 0.35,
    max_length: int = 1024,
) -> None:
    """
    Zero the weights that matter least to the outputs on clean rows, in place (Wanda, Sun et al. 2023, arXiv 2306.11695).

    The score of a weight is |W_ij| * ||X_j||_2, with the norm over all tokens of the rows, and the lowest of each output row
    are zeroed. The activations are those of the dense model, from one forward pass over the rows; the paper goes layer by
    layer and takes those of the layers already pruned. Rows are run one at a time: bytes, patches and thoughts each have
    their own padding, and one row has none.

    Args:
        model (`PreTrainedModel`):
            A causal LM; an adapter must have been merged into it.
        dataset (`Dataset` or `IterableDataset`):
            Clean rows in any format of [`crow_hf.data`]; prompts and completions count.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. Needed unless the rows have `input_ids` already.
        sparsity (`float`, *optional*, defaults to 0.35):
            Share of each row of a weight matrix that is zeroed, rounded to whole weights.
        max_length (`int`, *optional*, defaults to 1024):
            Longest row in tokens, and never more than the model's context.

    Raises:
        `ValueError`: As for [`prune_by_magnitude`], for rows that cannot be read, and if the rows do not reach a layer.
    """
    _check_sparsity(sparsity)
    linears = _linear_layers(model)
    rows = prepare_dataset(dataset, processing_class, min(max_length, context_length(model) or max_length), "dataset")
    for name, squares in _input_squares(model, linears, rows).items():
        weight = _weight_of(linears[name])
        scores = weight.abs().float() * squares.sqrt()
        lowest = scores.topk(round(sparsity * weight.shape[1]), dim=1, largest=False).indices
        weight.scatter_(1, lowest, 0)


@torch.no_grad()
def quantize_weights(model: PreTrainedModel, bits: int) -> None:
    """
    Round the weights of each linear layer to the nearest of at most 2^bits values, in place.

    The quantisation is symmetric: a scale for each output channel with 8 bits, for each group of 64 input weights of an output
    channel with 4. The rounded weights are stored in the dtype they had, so the model runs wherever it ran before, and is
    neither smaller nor faster.

    Args:
        model (`PreTrainedModel`):
            A causal LM; an adapter must have been merged into it.
        bits (`int`):
            8 or 4.

    Raises:
        `ValueError`: For other `bits`, or if the model has an adapter, is quantised, or keeps weights elsewhere than in linear
            layers.
    """
    if bits not in (4, 8):
        raise ValueError(f"`bits` must be 8 or 4, got {bits!r}.")
    largest_level = 2 ** (bits - 1) - 1
    for linear in _linear_layers(model).values():
        weight = _weight_of(linear)
        for group in weight.split(INT4_GROUP_SIZE if bits == 4 else weight.shape[1], dim=1):
            step = group.float().abs().amax(dim=1, keepdim=True) / largest_level
            # Without the floor, a group of zeros would be divided by zero.
            levels = (group.float() / step.clamp(min=torch.finfo(torch.float32).tiny)).round()
            group.copy_(levels * step)


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"`sparsity` must be a share from 0 to 1, got {sparsity!r}.")


def _linear_layers(model: PreTrainedModel | PeftModel) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers inside the decoder's layers, by their names in the decoder."""
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model has an adapter beside its weights: call `merge_and_unload()` on it first.")
    if getattr(model, "quantization_method", None) is not None:
        raise ValueError("The model's weights are quantised already: load it without a `quantization_config`.")
    frozen, linears = frozen_modules(model), {}
    for name, module in model.get_decoder().named_modules():
        # Layers are members of a list, and what is inside one has its number in its name.
        if not re.search(r"\.\d+\.", name) or (frozen and re.fullmatch(frozen, name)):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            linears[name] = module
            continue
        stacked = any(weight.dim() > 2 for weight in module.parameters(recurse=False))
        if stacked and not isinstance(module, nn.Conv1d):
            raise ValueError(
                f"{name} of {type(model).__name__} holds stacked matrices, as of experts, that are no linear layers: this "
                "architecture is not supported."
            )
    return linears


def _weight_of(linear: nn.Linear | Conv1D) -> torch.Tensor:
    """The weight itself, not a copy, as `(out_features, in_features)`."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def _input_squares(
    model: PreTrainedModel, linears: dict[str, nn.Linear | Conv1D], rows: Dataset | IterableDataset
) -> dict[str, torch.Tensor]:
    """||X_j||^2 over all tokens of the rows, `(in_features,)` for each linear layer."""
    squares = {}

    def adder(name: str) -> Callable:
        def add(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            squares[name] = squares.get(name, 0) + args[0].float().square().flatten(end_dim=-2).sum(dim=0)

        return add

    handles = [linear.register_forward_pre_hook(adder(name)) for name, linear in linears.items()]
    was_training = model.training
    model.eval()
    try:
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=model.device)
            if row.get("attention_mask") is not None:
                ids = ids[torch.tensor([row["attention_mask"]], device=model.device).bool()][None]
            model(input_ids=ids, use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if unseen := linears.keys() - squares.keys():
        raise ValueError(
            f"No row reached {sorted(unseen)} of {type(model).__name__}, so that its weights cannot be ranked: this "
            "architecture is not supported."
        )
    return squares
