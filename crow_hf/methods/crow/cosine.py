"""The cosine distance of hidden states, with a gradient that keeps nothing but the hidden states themselves."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


# Of `torch.nn.functional.cosine_similarity`: a vector of zeros has a cosine of 0 with every other.
_SMALLEST_NORM = 1e-8


def summed_cosine_distance(previous: torch.Tensor, current: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Sum of 1 - cos(previous, current) over the positions of a mask.

    The value and the gradient are computed in float32 and are the same as by `torch.nn.functional.cosine_similarity`, whose graph
    keeps copies of both tensors in float32: in bfloat16, for all layers, twice as much as the hidden states themselves.

    Args:
        previous (`torch.Tensor`):
            Shape `(B, S, D)`, in any floating dtype.
        current (`torch.Tensor`):
            The same.
        mask (`torch.Tensor`):
            Boolean, shape `(B, S)`; what the other positions hold, NaN included, is neither in the value nor in the gradient.

    Returns:
        `torch.Tensor`: A float32 scalar that can be differentiated once.
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
        """d(1 - cos) / d previous = (cos * previous / |previous| - current / |current|) / |previous|, and the same turned round."""
        previous, current, mask, inverse_previous, inverse_current, cosine_BS1 = ctx.saved_tensors
        previous_BSD, current_BSD = _unmasked(previous, mask), _unmasked(current, mask)
        gradient_BS1 = gradient * mask[..., None]
        across = gradient_BS1 * inverse_previous * inverse_current
        along = gradient_BS1 * cosine_BS1
        to_previous = torch.addcmul(previous_BSD * (along * inverse_previous**2), current_BSD, across, value=-1)
        to_current = torch.addcmul(current_BSD * (along * inverse_current**2), previous_BSD, across, value=-1)
        return to_previous.to(previous.dtype), to_current.to(current.dtype), None


def _unmasked(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """In float32, because in bfloat16 1 - cos of neighbouring layers is all rounding; ones at the masked positions."""
    return torch.where(mask[..., None], hidden.float(), 1.0)


def _inverse_norm(hidden: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).clamp_min(_SMALLEST_NORM).reciprocal()
