"""KL divergence of answers, computed in chunks and without copies of the logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...training.answer_logits import CHUNK_SIZE


def answer_divergence(teacher: torch.Tensor, students: torch.Tensor) -> torch.Tensor:
    """
    KL(teacher || student) in nats, the mean over the answer tokens, for each of N views of the same answers.

    Value and gradient are computed in float32. The graph keeps the two arguments and nothing else. That of the plain
    formula keeps several float32 copies of the logits.

    Args:
        teacher (`torch.Tensor`):
            Log-probabilities, shape `(T, V)`. They get no gradient.
        students (`torch.Tensor`):
            Logits in any floating-point dtype, shape `(N T, V)`, one view below the other.

    Returns:
        `torch.Tensor`: Shape `(N,)`. It can be differentiated once.
    """
    return _AnswerDivergence.apply(teacher, students)


class _AnswerDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher: torch.Tensor, students: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(teacher, students)
        divergences_N = teacher.new_zeros(len(students) // len(teacher))
        for number, here, there in _chunks(teacher, students):
            log_p_TV, log_q_TV = teacher[here], students[there].to(teacher.dtype).log_softmax(dim=-1)
            divergences_N[number] += (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum()
        return divergences_N / len(teacher)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        """With p and q for teacher and student, d KL / d logits = q * sum(p) - p."""
        teacher, students = ctx.saved_tensors
        to_students, scale_N = torch.empty_like(students), gradient / len(teacher)
        for number, here, there in _chunks(teacher, students):
            p_TV, q_TV = teacher[here].exp(), students[there].to(teacher.dtype).softmax(dim=-1)
            to_students[there] = q_TV.mul_(p_TV.sum(dim=-1, keepdim=True)).sub_(p_TV).mul_(scale_N[number])
        return None, to_students


def _chunks(teacher: torch.Tensor, students: torch.Tensor) -> Iterator[tuple[int, slice, slice]]:
    """
    The number of a view, a slice of the teacher's tokens, and the slice of the same tokens of that view.

    About four tensors of a chunk exist at a time, which take 64 MiB.
    """
    num_tokens, size = len(teacher), max(1, CHUNK_SIZE // teacher.shape[1])
    for number in range(len(students) // num_tokens):
        for start in range(0, num_tokens, size):
            stop, first = min(start + size, num_tokens), number * num_tokens
            yield number, slice(start, stop), slice(first + start, first + stop)
