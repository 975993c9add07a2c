"""Tests of the divergence and its gradient, against the plain formula."""

import math

import pytest
import torch

from crow_hf.methods.invariance import divergence
from crow_hf.methods.invariance.divergence import answer_divergence


TOKENS, VOCABULARY, VIEWS = 7, 11, 3


def pair(dtype=torch.float32, teacher_dtype=torch.float32):
    """A teacher and the logits of students that are far from it."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(TOKENS, VOCABULARY, generator=generator).mul(2).to(teacher_dtype).log_softmax(-1)
    students = torch.randn(VIEWS * TOKENS, VOCABULARY, generator=generator).mul(3)
    return teacher, students.to(dtype).requires_grad_()


def plain(teacher, students):
    """One view after another, as written in the docstring of the objective."""
    values = []
    for view in students.split(TOKENS):
        log_probs = view.to(teacher.dtype).log_softmax(-1)
        values.append((teacher.exp() * (teacher - log_probs)).sum(-1).mean())
    return torch.stack(values)


def test_divergence_worked_by_hand():
    """Fails if the direction is reversed, if tokens are summed, or if the unit is bits."""
    teacher = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    student = torch.tensor([[0.9, 0.1], [0.75, 0.25]]).log()
    first = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert answer_divergence(teacher, student).item() == pytest.approx(first / 2, rel=1e-5)
    backwards = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert answer_divergence(student, teacher).item() == pytest.approx(backwards / 2, rel=1e-5)
    assert abs(answer_divergence(student, student).item()) < 1e-7
    assert answer_divergence(student, student - 40).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 3 * VOCABULARY, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_those_of_the_plain_formula(dtype, chunk_size, monkeypatch):
    """Fails if a chunk is left out or counts twice, or if a view gets the weight of another."""
    monkeypatch.setattr(divergence, "CHUNK_SIZE", chunk_size)
    weights = torch.tensor([1.0, -2.0, 0.5])
    (teacher, students), (_, others) = pair(dtype), pair(dtype)
    value, wanted = answer_divergence(teacher, students), plain(teacher, others)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted)
    (found,) = torch.autograd.grad((value * weights).sum(), students)
    (expected,) = torch.autograd.grad((wanted * weights).sum(), others)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk_size", [2 * VOCABULARY, 2**22])
def test_gradient_is_the_one_of_finite_differences(chunk_size, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK_SIZE", chunk_size)
    teacher, students = pair(torch.float64, torch.float64)
    assert torch.autograd.gradcheck(lambda logits: answer_divergence(teacher, logits), (students,))
    # A teacher whose probabilities do not add up to 1, as after clamping.
    assert torch.autograd.gradcheck(lambda logits: answer_divergence(teacher - 0.1, logits), (students,))


def test_the_teacher_gets_no_gradient():
    teacher, students = pair()
    teacher.requires_grad_()
    answer_divergence(teacher, students).sum().backward()
    assert teacher.grad is None and students.grad.any()


def test_the_graph_keeps_no_copy_of_the_logits():
    (teacher, students), kept = pair(torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        value = answer_divergence(teacher, students)
    own = {tensor.untyped_storage().data_ptr() for tensor in (teacher, students)}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == own
    value.sum().backward()


def test_temporary_tensors_are_no_larger_than_a_chunk(monkeypatch):
    """Fails if any operator but the allocation of the gradient makes a tensor of all tokens."""
    monkeypatch.setattr(divergence, "CHUNK_SIZE", 2 * VOCABULARY)
    teacher, students = pair()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if torch.is_tensor(result) and function.overloadpacket is not torch.ops.aten.detach:
                sizes.append(result.numel())
            return result

    with Watch():
        value = answer_divergence(teacher, students).sum()
        assert max(sizes) <= 2 * VOCABULARY
        sizes.clear()
        value.backward()
    assert sorted(sizes)[-1] == students.numel() and sizes.count(students.numel()) == 1
