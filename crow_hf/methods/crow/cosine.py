"""Cosine distance of hidden states, with a backward pass that stores no copies of them."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


# As in `torch.nn.functional.cosine_similarity`: the cosine of a zero vector and any other vector is 0.
_SMALLEST_NORM = 1e-8


def summed_cosine_distance(previous: torch.Tensor, current: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Sum of 1 - cos(previous, current) over the positions of a mask.

    Value and gradient are computed in float32 and equal those of `torch.nn.functional.cosine_similarity`. The graph of
    that function stores float32 copies of both tensors. With bfloat16 and all layers, these take twice the memory of
    the hidden states themselves.

    Args:
        previous (`torch.Tensor`):
            Shape `(B, S, D)`, in any floating-point dtype.
        current (`torch.Tensor`):
            Same shape and dtype.
        mask (`torch.Tensor`):
            Boolean, shape `(B, S)`. Masked positions affect neither value nor gradient, even if they hold NaN.

    Returns:
        `torch.Tensor`: A float32 scalar. It can be differentiated once.
    """
    return _SummedCosineDistance.apply(previous, current, mask)


class _SummedCosineDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, previous: torch.Tensor, current: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        previous_BSD, current_BSD = _unmasked(previous, mask), _unmasked(current, mask)
        inverse_norms = _inverse_norm(previous_BSD), _inverse_norm(current_BSD)
        cosine_BS1 = (previous_BSD * current_BSD).sum(dim=-1, keepdim=True) * inverse_norms[0] * inverse_norms[1]
        ctx.save_for_backward(previous, current, mask, *inverse_norms, cosine_BS1)
        return ((1 - cosine_BS1) * mask[..., None]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """With p and c for previous and current, d(1 - cos) / dp = (cos * p / |p| - c / |c|) / |p|, and vice versa."""
        previous, current, mask, inverse_previous, inverse_current, cosine_BS1 = ctx.saved_tensors
        previous_BSD, current_BSD = _unmasked(previous, mask), _unmasked(current, mask)
        gradient_BS1 = gradient * mask[..., None]
        across = gradient_BS1 * inverse_previous * inverse_current
        along = gradient_BS1 * cosine_BS1
        to_previous = torch.addcmul(previous_BSD * (along * inverse_previous**2), current_BSD, across, value=-1)
        to_current = torch.addcmul(current_BSD * (along * inverse_current**2), previous_BSD, across, value=-1)
        return to_previous.to(previous.dtype), to_current.to(current.dtype), None


def _unmasked(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Float32 states with ones at masked positions. In bfloat16, rounding would dominate 1 - cos."""
    return torch.where(mask[..., None], hidden.float(), 1.0)


def _inverse_norm(hidden: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).clamp_min(_SMALLEST_NORM).reciprocal()
