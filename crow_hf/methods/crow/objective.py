"""The CROW objective (Min et al., ICML 2025, arXiv 2411.12768), to be read beside section 3.2 of the paper.

A backdoor makes consecutive layers disagree on a triggered input. CROW perturbs the input embeddings in the direction
in which the layers disagree most and fine-tunes the model to keep them in agreement:

    L = L_LM(clean) + alpha * L_cons(perturbed)                                                        (equation 6)

Notation: H^0 are the input embeddings, H^l the output of layer l = 1..N, B rows, S positions, D hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, Literal

import torch

from ...training.recorder import LayerRecorder
from .cosine import summed_cosine_distance


Layers = Literal["paper", "reference"]
EpsilonMode = Literal["absolute", "relative"]


def layer_consistency_loss(
    hidden_states: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    layers: Layers = "paper",
) -> torch.Tensor:
    """
    Mean cosine distance between the outputs of consecutive layers (equations 3 and 4).

    The tuple is taken at its word: nothing is added to it or normalised. `CrowTrainer` passes the outputs of the layers
    as they leave them; `hidden_states[-1]` of most transformers models is the last of them *after* the final norm.

    Args:
        hidden_states (`Sequence[torch.Tensor]`):
            H^0..H^N, the embeddings first: N + 1 tensors of shape `(B, S, D)` in any floating dtype.
        attention_mask (`torch.Tensor`, *optional*):
            Shape `(B, S)`; positions with 0 never count, whatever they hold. Without a mask every position counts.
        layers (`str`, *optional*, defaults to `"paper"`):
            `"paper"` compares the pairs (1, 2)..(N-1, N) of equation 4; `"reference"` those of the published code,
            `hidden_states[1:-2]` against `hidden_states[2:-1]`, which leaves out the last layer.

    Returns:
        `torch.Tensor`: A float32 scalar in [0, 2], the mean over the pairs and over the unmasked positions of all rows.

    Raises:
        `ValueError`: If there are too few layers for one pair, or the mask has another shape than `(B, S)`.
    """
    if layers not in ("paper", "reference"):
        raise ValueError(f"`layers` must be 'paper' or 'reference', got {layers!r}.")
    chain = hidden_states[1:] if layers == "paper" else hidden_states[1:-1]
    if len(chain) < 2:
        raise ValueError(
            f"layers={layers!r} leaves {len(chain)} of {len(hidden_states)} hidden states, but one pair needs two: pass "
            "the embeddings and the outputs of all layers of a model with at least 3 layers."
        )
    if attention_mask is None:
        mask = torch.ones(chain[0].shape[:2], dtype=torch.bool, device=chain[0].device)
    elif attention_mask.shape == chain[0].shape[:2]:
        mask = attention_mask.bool()
    else:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but the hidden states have batch and sequence "
            f"dimensions {tuple(chain[0].shape[:2])}: pass a mask of that shape."
        )

    total = sum(summed_cosine_distance(previous, current, mask) for previous, current in pairwise(chain))
    return total / ((len(chain) - 1) * mask.sum().clamp(min=1))


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
            Step per coordinate, in the units of the embeddings or of their RMS.
        mode (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"` as published; `"relative"` multiplies epsilon by the root mean square of each token's own
            embedding, so that ||perturbation|| / ||embedding|| is epsilon for every model and every token.

    Returns:
        `torch.Tensor`: H^0_adv, shape and dtype of `embeddings`.
    """
    if mode not in ("absolute", "relative"):
        raise ValueError(f"`mode` must be 'absolute' or 'relative', got {mode!r}.")
    step = epsilon * gradient.sign().float()
    if mode == "relative":
        step = step * embeddings.detach().float().square().mean(dim=-1, keepdim=True).sqrt()
    return embeddings + step.to(embeddings.dtype)


Terms = dict[str, torch.Tensor]


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
    The two forward passes of CROW (algorithm 1), and what comes between them.

    Both passes get the token ids, and the perturbation is added to what the embedding layer returns: a model that reads
    the ids for something else (patches, n-gram hashes, per-layer embeddings) sees the true ones. Where the layers run over
    patches, positions are patches.

    Args:
        recorder (`LayerRecorder`):
            Records H^0..H^N of the model during a forward pass.
        clean_forward (`Callable`):
            The model without its distributed wrapper: the wrapper's hooks belong to the one forward pass that the last
            backward pass of a step answers, and this one is differentiated before.
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
            Called with `loss_lm` before the perturbed pass, to add its gradient to the parameters' own. The activations of the
            clean pass are gone then before those of the perturbed one come; `loss_lm` is returned detached, and no outputs.
        differentiable_twice (`bool`, *optional*, defaults to `True`):
            Whether one pass can be, for the perturbation and then for `loss_lm`. Where it cannot, because the weights are let go of
            in between (ZeRO-3), the clean pass is made a second time.

    Returns:
        `tuple`: The model's outputs on the clean pass, and scalars: `loss_lm` and `consistency_perturbed`, the terms of
        equation 6; `consistency_clean`, detached; `perturbation_ratio`, ||H^0_adv - H^0|| / ||H^0|| over the unmasked positions.
    """
    mask = recorder.chain_mask(inputs)
    needs_graph = torch.is_grad_enabled()

    # The attack is a gradient also where the caller wants none, in evaluation. The random state is put back after the
    # clean pass, so that both passes drop the same units and differ by the perturbation alone.
    with torch.enable_grad(), _restored_rng(inputs["input_ids"].device):
        with recorder.record() as clean:
            outputs = clean_forward(**inputs)
        consistency_clean = layer_consistency_loss(clean.hidden_states, mask, layers)
        # autograd.grad reaches no parameter: what earlier micro-batches accumulated in .grad stays. The sum over the
        # positions has the same sign as the mean and keeps float16 gradients from underflowing.
        positions = clean.hidden_states[-1][..., 0].numel() if mask is None else mask.sum()
        gradients = torch.autograd.grad(
            consistency_clean * positions, clean.perturbed, retain_graph=needs_graph and differentiable_twice
        )
    if needs_graph and not differentiable_twice:
        with _restored_rng(inputs["input_ids"].device):
            outputs = clean_forward(**inputs)
    loss_lm, consistency_clean = outputs.loss, consistency_clean.detach()
    before = _real(clean.perturbed, recorder.perturbed_mask(inputs))
    if backward is not None:
        # The logits are as large as anything, and nothing else may hold on to the clean pass.
        outputs = clean = None
        backward(loss_lm)
        loss_lm = loss_lm.detach()

    # In the order in which the model comes to them: embeddings are one tensor, thoughts are several.
    remaining = iter(gradients)
    with recorder.record(lambda H_0: perturb_embeddings(H_0, next(remaining), epsilon, epsilon_mode)) as perturbed:
        perturbed_forward(**recorder.without_head(inputs))
    after = _real(perturbed.perturbed, recorder.perturbed_mask(inputs))
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
    The one forward pass of plain fine-tuning, with the consistency it has beside its loss. Arguments and returned values
    as in [`crow_terms`], but for the terms of the perturbed pass.
    """
    with recorder.record() as clean:
        outputs = forward(**inputs)
    with torch.no_grad():
        consistency = layer_consistency_loss(clean.hidden_states, recorder.chain_mask(inputs), layers)
    return outputs, {"loss_lm": outputs.loss, "consistency_clean": consistency}


def _real(embeddings: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    """All coordinates that are not padding, as one vector."""
    real = slice(None) if mask is None else mask.bool()
    return torch.cat([tensor.detach()[real].float().flatten() for tensor in embeddings])


def _restored_rng(device: torch.device) -> AbstractContextManager:
    """Leave the random state as it was found, on the CPU and on `device`."""
    if device.type in ("cpu", "mps"):
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
