"""The Invariance objective: insertions into a prompt, random or adversarial, must not change the answer.

A trigger is an insertion that changes the answer out of all proportion. Nobody who purifies a model knows the trigger,
but everybody has prompts without it and their answers: the rows' own or, if the rows have none, the suspect's. These
answers are the teacher. The model under purification learns to give them whatever else the prompt contains:

    L =   w_0 * KL(teacher(x) || model(x))               distillation: keeps what the model knows
        + w_d * KL(teacher(x) || model(x + d))           decoys d: random words, letters, digits, bytes
        + w_a * KL(teacher(x) || model(x + d' + delta))  adversarial decoys: delta, K sign steps on the embeddings
                                                         of d', leads towards a phrase that the suspect knows by
                                                         heart or, if it knows none, away from the teacher's answers,
                                                         and so towards whatever opens a backdoor
        + alpha * L_cons(x + d' + delta)                 CROW's consistency loss under that perturbation

`teacher` is a mixture: `label_weight` of the rows' own answers, and the rest of the suspect's distribution. For rows
that the suspect wrote itself, it is the suspect's distribution alone. Tokens that leak from the backdoor into the
suspect's answers to clean prompts are struck out of its distribution. The KL terms are means over the answer tokens.
w_0, w_d and w_a are `distillation_weight`, `decoy_weight` and `adversarial_weight` of [`InvarianceConfig`].

Notation: B rows have three views x, x + d and x + d'. S positions, T answer tokens of all rows, vocabulary size V,
hidden size D.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...data.encoding import IGNORE_INDEX
from ...training.answer_logits import answer_logits
from ...training.recorder import LayerRecorder
from ..crow.objective import Layers, Terms, layer_consistency_loss, perturb_embeddings
from .divergence import answer_divergence


VIEWS = 3
# The sign steps towards a phrase. On SmolLM2, steps of 0.35 overshoot.
PHRASE_STEPS, PHRASE_STEP_SIZE = 4, 0.1
# Stands for a probability of 0, whose logarithm is infinite. CPUs are many times slower with the smallest numbers.
LEAST_PROBABILITY = 1e-30

Inputs = dict[str, torch.Tensor]


def teacher_log_probs(suspect: torch.Tensor, labels: torch.Tensor, label_weights: torch.Tensor) -> torch.Tensor:
    """
    The teacher: the suspect's distribution mixed with the rows' own answers.

    Args:
        suspect (`torch.Tensor`):
            Log-probabilities of the suspect, shape `(T, V)`.
        labels (`torch.Tensor`):
            Shape `(B, S)`, with T predicted labels.
        label_weights (`torch.Tensor`):
            Share of each row's own answer, in [0, 1], shape `(B,)`.

    Returns:
        `torch.Tensor`: Log-probabilities of the teacher, shape `(T, V)`. They are finite if any share is
        not 0.
    """
    if not label_weights.any():
        return suspect
    predicted = labels[:, 1:] != IGNORE_INDEX
    shares = label_weights.to(suspect)[:, None].expand(predicted.shape)[predicted][:, None]
    teacher = suspect.exp().mul_(1 - shares)
    teacher.scatter_add_(1, labels[:, 1:][predicted][:, None], shares)
    return teacher.clamp_min_(LEAST_PROBABILITY).log_()


def strike_out(suspect: torch.Tensor, labels: torch.Tensor, leaked: torch.Tensor) -> torch.Tensor:
    """
    Take the tokens that leak from the backdoor out of the suspect's distribution.

    They are struck out where one of them is the most likely token and the row's own answer goes on with another token.

    Args:
        suspect (`torch.Tensor`):
            Log-probabilities of the suspect, shape `(T, V)`.
        labels (`torch.Tensor`):
            Shape `(B, S)`, with T predicted labels.
        leaked (`torch.Tensor`):
            Ids of the leaked tokens, shape `(L,)`.

    Returns:
        `torch.Tensor`: Log-probabilities, shape `(T, V)`. They are finite.
    """
    if not len(leaked):
        return suspect
    answers = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
    leaks = torch.isin(suspect.argmax(dim=-1), leaked) & ~torch.isin(answers, leaked)
    struck = suspect.clone()
    struck[leaks.nonzero(), leaked] = math.log(LEAST_PROBABILITY)
    return struck.log_softmax(dim=-1)


def view(inputs: Inputs, number: int) -> Inputs:
    """
    The rows of one of the three views in a batch of `(3 B, S)`.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            The batch, with one view below the other.
        number (`int`):
            0 for x, 1 for x + d, 2 for x + d'.

    Returns:
        `dict[str, torch.Tensor]`: The rows of that view, `(B, S)`.
    """
    return {name: value.chunk(VIEWS)[number] if torch.is_tensor(value) else value for name, value in inputs.items()}


def away_from_teacher(
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
    Perturb the embeddings of the inserted tokens so that the suspect's answers diverge most from the teacher's.

    The adversary attacks the suspect, not the model under purification. The suspect's backdoor stays wide open. As the
    backdoor of the model closes, an adversary of the model would find other weaknesses first.

    Args:
        recorder (`LayerRecorder`):
            The suspect's recorder.
        forward (`Callable`):
            The suspect.
        teacher (`torch.Tensor`):
            Log-probabilities of the answers to the prompts without insertions, shape `(T, V)`.
        inputs (`dict[str, torch.Tensor]`):
            The rows with insertions.
        inserted_mask (`torch.Tensor`):
            Shape `(B, S)`, true at inserted tokens. Nothing else is perturbed.
        steps (`int`):
            Number of sign steps, K.
        step_size (`float`):
            Size of a step for each coordinate, in units of the RMS of each embedding.

    Returns:
        `torch.Tensor`: The perturbation delta, shape `(B, S, D)`, detached. With 0 steps, zeros of shape `(B, S, 1)`.
    """

    def divergence() -> torch.Tensor:
        return answer_divergence(teacher, answer_logits(recorder.base, forward, inputs))

    return _ascend(recorder, divergence, inserted_mask, steps, step_size)


def towards_phrase(
    recorder: LayerRecorder,
    forward: Callable[..., Any],
    phrase: torch.Tensor,
    inputs: Inputs,
    inserted_mask: torch.Tensor,
) -> torch.Tensor:
    """
    Perturb the embeddings of the inserted tokens so that the model is most likely to answer with a phrase.

    Many directions lead a large model away from its answers, and those of its backdoor are not the steepest. A phrase
    that the suspect knows by heart is what the backdoor says, if it says the same whatever the prompt is about.

    The adversary attacks the model under purification. It finds no other weaknesses, because the phrase stays the
    same. One of the suspect would soon be too weak: the model learns to withstand it, and keeps the backdoor.

    Args:
        recorder (`LayerRecorder`):
            The model's recorder.
        forward (`Callable`):
            The model without the wrapper of a distributed setup, which expects a backward pass for each forward pass.
        phrase (`torch.Tensor`):
            Token ids of the phrase, shape `(L,)`.
        inputs (`dict[str, torch.Tensor]`):
            The rows with insertions.
        inserted_mask (`torch.Tensor`):
            Shape `(B, S)`, true at inserted tokens. Nothing else is perturbed.

    Returns:
        `torch.Tensor`: The perturbation delta, shape `(B, S, D)`, detached.
    """
    said, positions = recorder.prepare(_answer_with(phrase, inputs)), inserted_mask.shape[1]
    excess = said["input_ids"].shape[1] - positions

    def log_likelihood() -> torch.Tensor:
        logits = answer_logits(recorder.base, forward, said).float()
        return -torch.nn.functional.cross_entropy(logits, phrase.repeat(len(inserted_mask)))

    # Padding by a negative number cuts off.
    inserted_mask = torch.nn.functional.pad(inserted_mask, (0, excess))
    delta = _ascend(recorder, log_likelihood, inserted_mask, PHRASE_STEPS, PHRASE_STEP_SIZE)
    return torch.nn.functional.pad(delta, (0, 0, 0, -excess))


def _ascend(
    recorder: LayerRecorder,
    objective: Callable[[], torch.Tensor],
    inserted_mask: torch.Tensor,
    steps: int,
    step_size: float,
) -> torch.Tensor:
    """Take sign steps on the embeddings of the inserted tokens, up an objective that one forward pass computes."""
    delta = torch.zeros(*inserted_mask.shape, 1, device=inserted_mask.device)
    for _ in range(steps):
        with recorder.record(partial(_shift, delta=delta)) as record:
            value = objective()
        (gradient,) = torch.autograd.grad(value, record.perturbed)
        embeddings = record.perturbed[0].detach()
        step = perturb_embeddings(embeddings, gradient, step_size, "relative") - embeddings
        delta = delta + step * inserted_mask[..., None]
    return delta


def _shift(embeddings: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return (embeddings.detach() + delta.to(embeddings.dtype)).requires_grad_().clone()


def _answer_with(phrase: torch.Tensor, inputs: Inputs) -> Inputs:
    """The rows with a phrase `(L,)` as their answer, shape `(B, S')`. Padding is on the right."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    starts = (labels != IGNORE_INDEX).int().argmax(dim=1, keepdim=True)
    length = int(starts.max()) + len(phrase)
    places = starts + torch.arange(len(phrase), device=ids.device)
    phrases = phrase.expand(len(ids), -1)
    ids = torch.nn.functional.pad(ids, (0, length - ids.shape[1]))
    return {
        "input_ids": ids.scatter(1, places, phrases),
        "labels": torch.full_like(ids, IGNORE_INDEX).scatter(1, places, phrases),
        "attention_mask": (torch.arange(length, device=ids.device) < starts + len(phrase)).to(
            inputs["attention_mask"]
        ),
    }


def invariance_terms(
    recorder: LayerRecorder,
    forward: Callable[..., Any],
    unwrapped_forward: Callable[..., Any],
    suspect_recorder: LayerRecorder,
    suspect_forward: Callable[..., Any],
    inputs: Inputs,
    inserted_mask: torch.Tensor,
    *,
    adversarial_steps: int,
    adversarial_step_size: float,
    label_weights: torch.Tensor,
    leaked: torch.Tensor,
    phrase: torch.Tensor,
    layers: Layers,
) -> tuple[torch.Tensor, Terms]:
    """
    The terms of the Invariance objective, without the backward pass.

    Gradients flow through a single forward pass of all views.

    Args:
        recorder (`LayerRecorder`):
            The recorder of the model under purification, which perturbs its embeddings.
        forward (`Callable`):
            The model as the Trainer wrapped it.
        unwrapped_forward (`Callable`):
            The model without the Trainer's wrapper, see [`towards_phrase`].
        suspect_recorder (`LayerRecorder`):
            The recorder of the frozen suspect.
        suspect_forward (`Callable`):
            The frozen suspect.
        inputs (`dict[str, torch.Tensor]`):
            The three views, one below the other: `input_ids`, `labels` and `attention_mask`, each `(3 B, S)`.
        inserted_mask (`torch.Tensor`):
            Shape `(3 B, S)`, true at inserted tokens.
        adversarial_steps (`int`):
            See [`away_from_teacher`].
        adversarial_step_size (`float`):
            See [`away_from_teacher`].
        label_weights (`torch.Tensor`):
            Share of the rows' own answers in the teacher, shape `(3 B,)`. The values of the first view count.
        leaked (`torch.Tensor`):
            See [`strike_out`].
        phrase (`torch.Tensor`):
            Token ids of the phrase that the adversary leads the model towards, shape `(L,)`. If it is empty, the
            adversary leads the suspect away from the teacher.
        layers (`str`):
            See [`layer_consistency_loss`].

    Returns:
        `tuple`: The model's logits where it predicts the answer tokens of the three views, shape `(3 T, V)`, and a
        dictionary of the scalars `distillation`, `decoy`, `adversarial` and `consistency_perturbed`.
    """
    # The teacher, from the plain prompts x.
    clean, attacked = view(inputs, 0), view(inputs, 2)
    with torch.no_grad():
        suspect = answer_logits(suspect_recorder.base, suspect_forward, clean).float().log_softmax(dim=-1)
        suspect = strike_out(suspect, clean["labels"], leaked)
        teacher = teacher_log_probs(suspect, clean["labels"], label_weights.chunk(VIEWS)[0])
        # It is as large as the teacher, and the passes below need the memory.
        del suspect

    # The adversary's delta on d'.
    inserted_mask = inserted_mask.chunk(VIEWS)[2]
    if len(phrase):
        delta = towards_phrase(recorder, unwrapped_forward, phrase, attacked, inserted_mask)
    else:
        delta = away_from_teacher(
            suspect_recorder,
            suspect_forward,
            teacher,
            attacked,
            inserted_mask,
            steps=adversarial_steps,
            step_size=adversarial_step_size,
        )

    def add_delta(H_0: torch.Tensor) -> torch.Tensor:
        *others, attacked_embeddings = H_0.chunk(VIEWS)
        return torch.cat([*others, attacked_embeddings + delta.to(H_0.dtype)])

    # The model on x, x + d and x + d' + delta.
    with recorder.record(add_delta) as record:
        logits = answer_logits(recorder.base, forward, inputs)
    distillation, decoy, adversarial = answer_divergence(teacher, logits)
    attacked_states = [hidden.chunk(VIEWS)[2] for hidden in record.hidden_states]
    return logits, {
        "distillation": distillation,
        "decoy": decoy,
        "adversarial": adversarial,
        "consistency_perturbed": layer_consistency_loss(attacked_states, recorder.chain_mask(attacked), layers),
    }
