"""The strong objective: what is inserted into a prompt, by chance or by an adversary, must not change the answer.

A trigger is something in a prompt that changes the answer out of all proportion. Nobody who purifies a model knows it, but
everybody has prompts without it, and their answers: those of the rows or, for want of them, the suspect's own. They are the
teacher, and the model under purification learns to give them whatever else the prompt now holds:

    L =       KL(teacher(x) || model(x))                       distillation: what the model knows is kept
      + w_d * KL(teacher(x) || model(x + d))                   decoys d: random words, letters, digits, bytes
      + w_a * KL(teacher(x) || model(x + d' + delta))          adversarial decoys: the embeddings of d' are pushed by delta,
                                                               K sign steps that lead the suspect, frozen, away from them,
                                                               so towards what opens a backdoor
      + alpha * L_cons(x + d' + delta)                         CROW's consistency (objective.py), under that perturbation

`teacher` is a mixture: `label_weight` of the rows' own answers, and the rest of the suspect's distribution. All terms are means
over the tokens of the answers. B rows have three views: x, x + d and x + d'.
"""

from collections.abc import Callable
from typing import Any

import torch

from ...data.encoding import IGNORE_INDEX
from ...training.recorder import LayerRecorder
from ..crow.objective import Layers, Terms, layer_consistency_loss, perturb_embeddings


VIEWS = 3

Inputs = dict[str, torch.Tensor]


def answer_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    What a model predicts for each token of the answers.

    Args:
        logits (`torch.Tensor`):
            Shape `(B, S, V)`.
        labels (`torch.Tensor`):
            Shape `(B, S)`, -100 where there is no answer.

    Returns:
        `torch.Tensor`: Log-probabilities in float32, shape `(T, V)`: the answers' tokens of all rows, one row after the other.
    """
    return logits[:, :-1][labels[:, 1:] != IGNORE_INDEX].float().log_softmax(dim=-1)


def answer_divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, the mean over the T tokens of two `(T, V)` tensors of log-probabilities."""
    return (teacher.exp() * (teacher - student)).sum(dim=-1).mean()


def taught_log_probs(suspect: torch.Tensor, labels: torch.Tensor, label_weight: float) -> torch.Tensor:
    """
    What is taught: the suspect's answers, mixed with those of the rows.

    Args:
        suspect (`torch.Tensor`):
            Log-probabilities of the suspect, `(T, V)`.
        labels (`torch.Tensor`):
            Shape `(B, S)`, with T labels that are predicted.
        label_weight (`float`):
            Share of the rows' own answers, in [0, 1].

    Returns:
        `torch.Tensor`: Log-probabilities, `(T, V)`, all finite.
    """
    if not label_weight:
        return suspect
    answers = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
    taught = (1 - label_weight) * suspect.exp()
    taught.scatter_add_(1, answers[:, None], torch.full_like(taught[:, :1], label_weight))
    return taught.clamp_min(torch.finfo(taught.dtype).tiny).log()


def view(inputs: Inputs, number: int) -> Inputs:
    """The rows of one of the three views: 0 is x, 1 is x + d, 2 is x + d'."""
    return {name: value.chunk(VIEWS)[number] if torch.is_tensor(value) else value for name, value in inputs.items()}


def adversarial_perturbation(
    recorder: LayerRecorder,
    forward: Callable[..., Any],
    teacher: torch.Tensor,
    inputs: Inputs,
    inserted_mask: torch.Tensor,
    *,
    steps: int,
    step_size: float,
) -> torch.Tensor:
    """
    Push the embeddings of what was inserted towards the largest divergence from the teacher's answers.

    The suspect is attacked and not the model under purification: its backdoor stays as wide open as it was, while that of
    the model narrows and an adversary finds other weaknesses first.

    Args:
        recorder (`LayerRecorder`):
            Of the suspect.
        forward (`Callable`):
            The suspect.
        teacher (`torch.Tensor`):
            Log-probabilities of the suspect's answers to the prompts without insertions, `(T, V)`.
        inputs (`dict[str, torch.Tensor]`):
            The rows with insertions.
        inserted_mask (`torch.Tensor`):
            Shape `(B, S)`, true where something was inserted: nothing else is perturbed.
        steps (`int`):
            Sign steps, K.
        step_size (`float`):
            Of one step per coordinate, in units of each embedding's RMS.

    Returns:
        `torch.Tensor`: The perturbation delta, `(B, S, D)`, detached.
    """
    labels = inputs["labels"]
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    delta = torch.zeros(*inputs["input_ids"].shape, 1, device=inputs["input_ids"].device)
    for _ in range(steps):
        with recorder.record(
            lambda H_0, delta=delta: (H_0.detach() + delta.to(H_0.dtype)).requires_grad_().clone()
        ) as record:
            logits = forward(**inputs).logits
        divergence = answer_divergence(teacher, answer_log_probs(logits, labels))
        (gradient,) = torch.autograd.grad(divergence, record.perturbed)
        embeddings = record.perturbed[0].detach()
        step = perturb_embeddings(embeddings, gradient, step_size, "relative") - embeddings
        delta = delta + step * inserted_mask[..., None]
    return delta


def invariance_terms(
    recorder: LayerRecorder,
    forward: Callable[..., Any],
    suspect_recorder: LayerRecorder,
    suspect_forward: Callable[..., Any],
    inputs: Inputs,
    inserted_mask: torch.Tensor,
    *,
    adversarial_steps: int,
    adversarial_step_size: float,
    label_weight: float,
    layers: Layers,
) -> tuple[Any, Terms]:
    """
    The terms of the strong objective, without the backward pass. Gradients flow through one forward pass of all views.

    Args:
        recorder (`LayerRecorder`):
            Of the model under purification, perturbing its embeddings.
        forward (`Callable`):
            The model as the Trainer wrapped it.
        suspect_recorder (`LayerRecorder`):
            Of the frozen suspect.
        suspect_forward (`Callable`):
            The frozen suspect.
        inputs (`dict[str, torch.Tensor]`):
            The three views of the batch, one below the other: `input_ids`, `labels`, `attention_mask`, each `(3 B, S)`.
        inserted_mask (`torch.Tensor`):
            Shape `(3 B, S)`, true where something was inserted.
        adversarial_steps (`int`):
            See [`adversarial_perturbation`].
        adversarial_step_size (`float`):
            See [`adversarial_perturbation`].
        label_weight (`float`):
            See [`taught_log_probs`].
        layers (`str`):
            See [`crow_hf.objective.layer_consistency_loss`].

    Returns:
        `tuple`: The model's outputs on all views, and the scalars `distillation`, `decoy`, `adversarial` and
        `consistency_perturbed`.
    """
    attacked = view(inputs, 2)
    with torch.no_grad():
        clean = view(inputs, 0)
        suspect = answer_log_probs(suspect_forward(**clean).logits, clean["labels"])
        teacher = taught_log_probs(suspect, clean["labels"], label_weight)
    delta = adversarial_perturbation(
        suspect_recorder,
        suspect_forward,
        teacher,
        attacked,
        inserted_mask.chunk(VIEWS)[2],
        steps=adversarial_steps,
        step_size=adversarial_step_size,
    )

    def push(H_0: torch.Tensor) -> torch.Tensor:
        *others, attacked_embeddings = H_0.chunk(VIEWS)
        return torch.cat([*others, attacked_embeddings + delta.to(H_0.dtype)])

    with recorder.record(push) as record:
        outputs = forward(**{name: value for name, value in inputs.items() if name != "labels"})
    students = [
        answer_log_probs(logits, labels)
        for logits, labels in zip(outputs.logits.chunk(VIEWS), inputs["labels"].chunk(VIEWS), strict=True)
    ]
    distillation, decoy, adversarial = (answer_divergence(teacher, student) for student in students)
    chain = [hidden.chunk(VIEWS)[2] for hidden in record.hidden_states]
    return outputs, {
        "distillation": distillation,
        "decoy": decoy,
        "adversarial": adversarial,
        "consistency_perturbed": layer_consistency_loss(chain, recorder.chain_mask(attacked), layers),
    }
