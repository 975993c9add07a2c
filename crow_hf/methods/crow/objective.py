"""The CROW objective (Min et al., ICML 2025, arXiv 2411.12768), to be read beside section 3.2 of the paper.

A backdoor makes consecutive layers disagree on a triggered input. CROW perturbs the input embeddings in the direction
in which the layers disagree most, and fine-tunes the model to keep them in agreement:

    L = L_LM(clean) + alpha * L_cons(perturbed)                                                        (equation 6)

Notation: H^0 are the input embeddings, H^l is the output of layer l = 1..N. B rows, S positions, hidden size D.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, Literal

import torch

from ...training.recorder import LayerRecorder, plain_outputs
from .cosine import summed_cosine_distance


Layers = Literal["paper", "reference"]
EpsilonMode = Literal["absolute", "relative"]
Terms = dict[str, torch.Tensor]


def layer_consistency_loss(
    hidden_states: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    layers: Layers = "paper",
) -> torch.Tensor:
    """
    Mean cosine distance between the outputs of consecutive layers (equations 3 and 4).

    The hidden states are used as they are: nothing is added and nothing is normalized. [`CrowTrainer`] passes the raw
    outputs of the layers. In contrast, `hidden_states[-1]` of most transformers models is the last layer's output
    *after* the final norm.

    Args:
        hidden_states (`Sequence[torch.Tensor]`):
            H^0..H^N, the embeddings first: N + 1 tensors of shape `(B, S, D)` in any floating-point dtype.
        attention_mask (`torch.Tensor`, *optional*):
            Shape `(B, S)`. Positions with 0 never count, whatever they hold. Without a mask every position counts.
        layers (`str`, *optional*, defaults to `"paper"`):
            `"paper"` compares the pairs (1, 2)..(N-1, N) of equation 4. `"reference"` compares the pairs of the
            published code, `hidden_states[1:-2]` with `hidden_states[2:-1]`, which omit the last layer.

    Returns:
        `torch.Tensor`: A float32 scalar in [0, 2], the mean over the pairs and the unmasked positions of all rows.

    Raises:
        `ValueError`: If there are too few layers for one pair, or the shape of the mask is not `(B, S)`.
    """
    if layers not in ("paper", "reference"):
        raise ValueError(f"`layers` must be 'paper' or 'reference', got {layers!r}.")
    compared = hidden_states[1:] if layers == "paper" else hidden_states[1:-1]
    if len(compared) < 2:
        raise ValueError(
            f"layers={layers!r} leaves {len(compared)} of {len(hidden_states)} hidden states, but one pair needs two. "
            "Pass the embeddings and the outputs of all layers of a model with at least 3 layers."
        )
    mask = _checked_mask(attention_mask, compared[0])

    total = sum(summed_cosine_distance(previous, current, mask) for previous, current in pairwise(compared))
    return total / ((len(compared) - 1) * mask.sum().clamp(min=1))


def perturb_embeddings(
    embeddings: torch.Tensor,
    gradient: torch.Tensor,
    epsilon: float = 0.1,
    mode: EpsilonMode = "absolute",
) -> torch.Tensor:
    """
    One FGSM step away from consistency, H^0_adv = H^0 + epsilon * sign(G) (equation 5).

    Args:
        embeddings (`torch.Tensor`):
            H^0, shape `(B, S, D)`.
        gradient (`torch.Tensor`):
            G, the gradient of the consistency loss with respect to H^0, same shape. Only its sign is used.
        epsilon (`float`, *optional*, defaults to 0.1):
            Step size for each coordinate, in the units of the embeddings or of their RMS.
        mode (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"` is the published method. `"relative"` multiplies epsilon by the root mean square of each
            token's embedding, so that ||perturbation|| / ||embedding|| is epsilon for every model and every token.

    Returns:
        `torch.Tensor`: H^0_adv, with the shape and the dtype of `embeddings`.

    Raises:
        `ValueError`: If `mode` is unknown.
    """
    if mode not in ("absolute", "relative"):
        raise ValueError(f"`mode` must be 'absolute' or 'relative', got {mode!r}.")
    step = epsilon * gradient.sign().float()
    if mode == "relative":
        step = step * embeddings.detach().float().square().mean(dim=-1, keepdim=True).sqrt()
    return embeddings + step.to(embeddings.dtype)


def crow_terms(
    recorder: LayerRecorder,
    clean_forward: Callable[..., Any],
    perturbed_forward: Callable[..., Any],
    inputs: dict[str, torch.Tensor],
    *,
    epsilon: float,
    epsilon_mode: EpsilonMode,
    layers: Layers,
    backward: Callable[[torch.Tensor], Any] | None = None,
    differentiable_twice: bool = True,
) -> tuple[Any, Terms]:
    """
    Run the clean and the perturbed forward pass of CROW (algorithm 1) and compute the terms of the objective.

    Both passes receive the token ids, and a hook adds the perturbation to the output of the embedding layer. A model
    that also uses the ids for something else (patches, n-gram hashes, per-layer embeddings) therefore sees the true
    ids. If the layers run over patches, S counts patches.

    Args:
        recorder (`LayerRecorder`):
            Records H^0..H^N of the model during a forward pass.
        clean_forward (`Callable`):
            The unwrapped model. DDP and FSDP hooks expect exactly one forward pass for each backward pass, and this
            pass is differentiated earlier.
        perturbed_forward (`Callable`):
            The model as the Trainer wrapped it.
        inputs (`dict[str, torch.Tensor]`):
            The batch with `input_ids`, `labels` and usually `attention_mask`, each `(B, S)`.
        epsilon (`float`):
            See [`perturb_embeddings`].
        epsilon_mode (`str`):
            See [`perturb_embeddings`].
        layers (`str`):
            See [`layer_consistency_loss`].
        backward (`Callable`, *optional*):
            Called with `loss_lm` before the perturbed pass, to accumulate its gradient in the parameters. The
            activations of the clean pass are then freed before the perturbed pass allocates its own. `loss_lm` is
            returned detached, and the outputs are `None`.
        differentiable_twice (`bool`, *optional*, defaults to `True`):
            Whether the clean pass can be differentiated twice, for the perturbation and for `loss_lm`. ZeRO-3 releases
            the weights after the first time. If `False`, the clean pass is therefore computed a second time.

    Returns:
        `tuple`: The model's outputs on the clean pass, and a dictionary of scalars: `loss_lm` and
        `consistency_perturbed`, the terms of equation 6, `consistency_clean`, detached, and `perturbation_ratio`,
        ||H^0_adv - H^0|| / ||H^0|| over the unmasked positions.
    """
    device, mask = inputs["input_ids"].device, recorder.chain_mask(inputs)
    needs_graph = torch.is_grad_enabled()

    # Clean pass. The perturbation needs a gradient even in evaluation. The random state is restored after the clean
    # pass, so that both passes drop the same units and differ only by the perturbation.
    with torch.enable_grad(), _restored_rng(device):
        with recorder.record() as clean:
            outputs = clean_forward(**inputs)
        consistency_clean = layer_consistency_loss(clean.hidden_states, mask, layers)

        # G = d L_cons / d H^0. autograd.grad does not touch the .grad of the parameters, where earlier micro-batches
        # have accumulated. The sum over positions has the same sign as the mean and does not underflow in float16.
        positions = clean.hidden_states[-1][..., 0].numel() if mask is None else mask.sum()
        gradients = torch.autograd.grad(
            consistency_clean * positions, clean.perturbed, retain_graph=needs_graph and differentiable_twice
        )
    if needs_graph and not differentiable_twice:
        with _restored_rng(device), plain_outputs(recorder.base):
            outputs = clean_forward(**inputs)
    loss_lm, consistency_clean = outputs.loss, consistency_clean.detach()
    before = _unpadded_vector(clean.perturbed, recorder.perturbed_mask(inputs))

    # Gradient of L_LM. The logits are among the largest tensors, so nothing may keep the clean pass alive.
    if backward is not None:
        outputs = clean = None
        backward(loss_lm)
        loss_lm = loss_lm.detach()

    # Perturbed pass, H^0_adv = H^0 + epsilon * sign(G). Embeddings are one tensor. Thoughts are several, and the model
    # computes them in the order of the gradients.
    remaining = iter(gradients)
    with recorder.record(lambda H_0: perturb_embeddings(H_0, next(remaining), epsilon, epsilon_mode)) as perturbed:
        perturbed_forward(**recorder.without_head(inputs))
    after = _unpadded_vector(perturbed.perturbed, recorder.perturbed_mask(inputs))
    return outputs, {
        "loss_lm": loss_lm,
        "consistency_clean": consistency_clean,
        "consistency_perturbed": layer_consistency_loss(perturbed.hidden_states, mask, layers),
        "perturbation_ratio": (after - before).norm() / before.norm(),
    }


def control_terms(
    recorder: LayerRecorder, forward: Callable[..., Any], inputs: dict[str, torch.Tensor], layers: Layers
) -> tuple[Any, Terms]:
    """
    Run the single forward pass of plain fine-tuning, and measure the consistency without training on it.

    Args:
        recorder (`LayerRecorder`):
            Records H^0..H^N of the model during a forward pass.
        forward (`Callable`):
            The model.
        inputs (`dict[str, torch.Tensor]`):
            See [`crow_terms`].
        layers (`str`):
            See [`layer_consistency_loss`].

    Returns:
        `tuple`: The model's outputs, and the scalars `loss_lm` and `consistency_clean`, detached.
    """
    with recorder.record() as clean:
        outputs = forward(**inputs)
    with torch.no_grad():
        consistency = layer_consistency_loss(clean.hidden_states, recorder.chain_mask(inputs), layers)
    return outputs, {"loss_lm": outputs.loss, "consistency_clean": consistency}


def _checked_mask(attention_mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    """The mask as booleans, `(B, S)`. Without a mask every position counts."""
    if attention_mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but the hidden states have batch and sequence "
            f"dimensions {tuple(hidden.shape[:2])}. Pass a mask of that shape."
        )
    return attention_mask.bool()


def _unpadded_vector(embeddings: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    """All coordinates of all positions that are not padding, as one float32 vector."""
    unpadded = slice(None) if mask is None else mask.bool()
    return torch.cat([tensor.detach()[unpadded].float().flatten() for tensor in embeddings])


def _restored_rng(device: torch.device) -> AbstractContextManager:
    """Restore the random state of the CPU and of `device` at the end of the `with` block."""
    if device.type in ("cpu", "mps"):
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
