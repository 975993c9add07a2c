"""Tests of the cosine distance and its gradient, against those of PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from crow_hf.methods.crow.cosine import summed_cosine_distance


MASK = torch.tensor([[True, True, False], [True, False, False]])


def pair(dtype=torch.float32, width=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, width, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


def by_torch(previous, current, mask):
    cosine = F.cosine_similarity(previous.float()[mask], current.float()[mask], dim=-1)
    return (1 - cosine).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_those_of_torch(dtype):
    value, expected = (function(*pair(dtype), MASK) for function in (summed_cosine_distance, by_torch))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    states, others = pair(dtype), pair(dtype)
    gradients = torch.autograd.grad(3 * summed_cosine_distance(*states, MASK), states)
    for gradient, wanted in zip(gradients, torch.autograd.grad(3 * by_torch(*others, MASK), others), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_masked_positions_have_no_part():
    states = pair()
    with torch.no_grad():
        for tensor in states:
            tensor[~MASK] = float("nan")
    value = summed_cosine_distance(*states, MASK)
    torch.testing.assert_close(value, by_torch(*pair(), MASK))
    for gradient in torch.autograd.grad(value, states):
        assert (gradient[~MASK] == 0).all()
        assert (gradient[MASK] != 0).any()


def test_zeros_have_a_cosine_of_zero():
    zeros, other = torch.zeros(1, 1, 4, requires_grad=True), torch.ones(1, 1, 4, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    value = summed_cosine_distance(zeros, other, mask)
    assert value.item() == 1
    expected = torch.autograd.grad(by_torch(zeros, other, mask), (zeros, other))
    for gradient, wanted in zip(torch.autograd.grad(value, (zeros, other)), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_the_graph_keeps_no_copy_of_the_states():
    states, kept = pair(torch.bfloat16, width=64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        value = summed_cosine_distance(*states, MASK)
    own = {tensor.untyped_storage().data_ptr() for tensor in states}
    copies = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]
    assert len(copies) < len(kept)
    assert all(tensor.numel() <= MASK.numel() for tensor in copies)
    value.backward()
