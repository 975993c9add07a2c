"""Pruning and quantization, the baselines that CROW was compared with.

Both change a model in place and need no training. They change the weights of the linear layers inside the decoder
layers (in a [`CoconutForCausalLM`], the layers over bytes and over patches). Everything else stays as it is: the
embeddings of tokens and patches, the vocabulary head, norms, biases, and modules that must not be trained.
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
from ..training.recorder import context_length, evaluating, frozen_modules


INT4_GROUP_SIZE = 64


@torch.no_grad()
def prune_by_magnitude(model: PreTrainedModel, sparsity: float = 0.35) -> None:
    """
    Zero the smallest weights of each linear layer, in place.

    Args:
        model (`PreTrainedModel`):
            A causal LM. Merge its adapter, if any, first.
        sparsity (`float`, *optional*, defaults to 0.35):
            Share of each weight matrix that is zeroed, rounded to a whole number of weights. CROW's paper uses 0.35
            for Llama and 0.65 for Mistral.

    Raises:
        `ValueError`: If `sparsity` is not in [0, 1], or if the model has an adapter, is quantized, or has matrices
            outside of linear layers.
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
    Zero the weights that matter least on clean rows, in place (Wanda, Sun et al. 2023, arXiv 2306.11695).

    The score of a weight is |W_ij| * ||X_j||_2, with the norm over all tokens of the rows. The lowest scores in each
    output row are zeroed. The activations are those of the dense model, from one forward pass over the rows, whereas
    the paper prunes layer by layer and uses the activations of the layers already pruned. Rows are run one at a time
    because bytes, patches and thoughts are padded differently, and a single row needs no padding.

    Args:
        model (`PreTrainedModel`):
            A causal LM. Merge its adapter, if any, first.
        dataset (`Dataset` or `IterableDataset`):
            Clean rows in any format of [`crow_hf.data`]. Both prompts and completions count.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. Not needed if the rows already have `input_ids`.
        sparsity (`float`, *optional*, defaults to 0.35):
            Share of each row of a weight matrix that is zeroed, rounded to a whole number of weights.
        max_length (`int`, *optional*, defaults to 1024):
            Maximum row length in tokens, limited by the model's context.

    Raises:
        `ValueError`: As for [`prune_by_magnitude`], and if the rows cannot be read or reach not all layers.
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

    The quantization is symmetric. With 8 bits, each output channel has a scale. With 4 bits, each group of 64 input
    weights of an output channel has one. The rounded weights keep their dtype, so the model runs wherever it ran
    before, and becomes neither smaller nor faster.

    Args:
        model (`PreTrainedModel`):
            A causal LM. Merge its adapter, if any, first.
        bits (`int`):
            8 or 4.

    Raises:
        `ValueError`: For other `bits`, or if the model has an adapter, is already quantized, or has matrices outside
            of linear layers.
    """
    for linear in _linear_layers(model).values():
        for group in _groups(_weight_of(linear), bits):
            levels, step = _levels_of(group, bits)
            group.copy_(levels * step)


@torch.no_grad()
def rounding_bounds(
    model: PreTrainedModel | PeftModel, bits: int
) -> dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """
    Return between which values the weights may move while [`quantize_weights`] still makes the same of them.

    An attacker who knows the quantization trains within these bounds.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal LM without an adapter. It is not changed.
        bits (`int`):
            8 or 4.

    Returns:
        `dict[torch.Tensor, tuple]`: By each weight of a linear layer, the lowest and the highest values, in the shape
        of the weight. The largest weight of each group, which sets the scale, has no room.
    """
    bounds = {}
    for linear in _linear_layers(model).values():
        low, high = (linear.weight.detach().clone() for _ in range(2))
        views = (tensor.T if isinstance(linear, Conv1D) else tensor for tensor in (low, high))
        for lows, highs in zip(*(_groups(view, bits) for view in views), strict=True):
            levels, step = _levels_of(lows, bits)
            # A little less than half a step, because sums in floating point are inexact.
            limit = lows.abs().amax(dim=1, keepdim=True)
            has_room = lows.abs() < limit
            lows.copy_(torch.where(has_room, ((levels - 0.49) * step).clamp(-limit, limit), lows))
            highs.copy_(torch.where(has_room, ((levels + 0.49) * step).clamp(-limit, limit), highs))
        bounds[linear.weight] = (low, high)
    return bounds


def _groups(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Views of the weights of shape `(out_features, n)` that are rounded with a scale for each row."""
    if bits not in (4, 8):
        raise ValueError(f"`bits` must be 8 or 4, got {bits!r}.")
    return weight.split(INT4_GROUP_SIZE if bits == 4 else weight.shape[1], dim=1)


def _levels_of(group: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers that stand for the weights, and the step between two of them."""
    step = group.float().abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    # The minimum avoids a division by zero for groups of zeros.
    return (group.float() / step.clamp(min=torch.finfo(torch.float32).tiny)).round(), step


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"`sparsity` must be between 0 and 1, got {sparsity!r}.")


def _linear_layers(model: PreTrainedModel | PeftModel) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers inside the decoder's layers, by their names in the decoder."""
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model has an adapter. Call `merge_and_unload()` on it first.")
    if getattr(model, "quantization_method", None) is not None:
        raise ValueError("The model's weights are already quantized. Load it without a `quantization_config`.")
    frozen, linears = frozen_modules(model), {}
    for name, module in model.get_decoder().named_modules():
        # Layers are members of a module list, so the names of modules inside a layer contain its number.
        if not re.search(r"\.\d+\.", name) or (frozen and re.fullmatch(frozen, name)):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            linears[name] = module
            continue
        stacked = any(weight.dim() > 2 for weight in module.parameters(recurse=False))
        if stacked and not isinstance(module, nn.Conv1d):
            raise ValueError(
                f"{name} of {type(model).__name__} holds stacked matrices, such as those of experts, outside of "
                "linear layers. This architecture is not supported."
            )
    return linears


def _weight_of(linear: nn.Linear | Conv1D) -> torch.Tensor:
    """A view of the weight as `(out_features, in_features)`."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def _input_squares(
    model: PreTrainedModel, linears: dict[str, nn.Linear | Conv1D], rows: Dataset | IterableDataset
) -> dict[str, torch.Tensor]:
    """||X_j||^2 over all tokens of the rows, shape `(in_features,)`, by the name of each linear layer."""
    squares: dict[str, torch.Tensor] = {}

    def squares_hook(name: str) -> Callable:
        def add(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            squares[name] = squares.get(name, 0) + args[0].float().square().flatten(end_dim=-2).sum(dim=0)

        return add

    handles = [linear.register_forward_pre_hook(squares_hook(name)) for name, linear in linears.items()]
    try:
        with evaluating(model):
            for row in rows:
                ids = torch.tensor([row["input_ids"]], device=model.device)
                if row.get("attention_mask") is not None:
                    ids = ids[torch.tensor([row["attention_mask"]], device=model.device).bool()][None]
                model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if unseen := linears.keys() - squares.keys():
        raise ValueError(
            f"No row reached {sorted(unseen)} of {type(model).__name__}, so their weights cannot be ranked. This "
            "architecture is not supported."
        )
    return squares
