"""Layer profile: measures the distance between consecutive layers on clean, perturbed and triggered rows."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attacks.poison import Poison
from ..attacks.triggers import BaseTrigger
from ..data.collators import CrowDataCollator
from ..data.encoding import encode, padding_id
from ..data.rows import render
from ..methods.crow.objective import EpsilonMode, Layers, layer_consistency_loss, perturb_embeddings
from ..training.recorder import ForwardRecord, Inputs, LayerRecorder, Perturb, context_length, evaluating, recorder_of
from .generation import text_of_ids


@dataclass
class LayerProfile:
    """
    The mean of 1 - cos between the outputs of layers l and l + 1, for l = 1..N-1, over all positions except padding.

    Attributes:
        clean (`list[float]`):
            Distances on the unchanged rows. Their mean is the consistency loss of equation 4.
        perturbed (`list[float]`):
            Distances on the same rows after one FGSM step along this model's own gradient.
        perturbation_ratio (`float`):
            The norm of that step divided by the norm of the tensor that it perturbs.
        triggered (`list[float]`, *optional*):
            Distances on the rows with the trigger in their prompts.
    """

    clean: list[float]
    perturbed: list[float]
    perturbation_ratio: float
    triggered: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON-serializable values."""
        return asdict(self)


def layer_profile(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Dataset,
    trigger: BaseTrigger | None = None,
    *,
    epsilon: float = 0.1,
    epsilon_mode: EpsilonMode = "absolute",
    layers: Layers = "paper",
    perturb: Perturb = "embeddings",
    max_length: int = 1024,
    batch_size: int = 8,
    seed: int = 0,
) -> LayerProfile:
    """
    Measure the distances between the consecutive layers of a model, pair by pair.

    The model's weights, gradients and training mode do not change.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The model's tokenizer. Rows of `input_ids` need none.
        dataset (`Dataset`):
            Rows in any of the formats of [`crow_hf.data`]. Prompt and answer are read together, as in training.
        trigger (`BaseTrigger`, *optional*):
            A known trigger. With the same seed, it goes to the same positions as in [`evaluate_model`].
        epsilon (`float`, *optional*, defaults to 0.1):
            Size of the FGSM step, see [`perturb_embeddings`].
        epsilon_mode (`str`, *optional*, defaults to `"absolute"`):
            Unit of `epsilon`, see [`perturb_embeddings`].
        layers (`str`, *optional*, defaults to `"paper"`):
            Pairs of layers in the loss whose gradient the step follows, see [`layer_consistency_loss`].
        perturb (`str`, *optional*, defaults to `"embeddings"`):
            Where the step is added, see [`CrowConfig`].
        max_length (`int`, *optional*, defaults to 1024):
            Maximum row length in tokens. Longer rows are cut. The model's own context is a limit too.
        batch_size (`int`, *optional*, defaults to 8):
            Number of rows per batch.
        seed (`int`, *optional*, defaults to 0):
            Seed for the random positions of the trigger.

    Returns:
        [`LayerProfile`]

    Raises:
        `ValueError`: If [`CrowTrainer`] would refuse the model or the rows too, or if all embeddings are 0.
    """
    recorder = recorder_of(model, perturb)
    batches = _Batches(model, recorder, tokenizer, min(max_length, context_length(model) or max_length), batch_size)
    clean, perturbed, triggered = _LayerDistances(), _LayerDistances(), _LayerDistances()
    squared_norms = torch.zeros(2)
    with evaluating(model):
        for batch in batches.of(dataset):
            before, gradients = _clean_pass(model, recorder, batch, layers, clean)
            after = _perturbed_pass(model, recorder, batch, gradients, epsilon, epsilon_mode)
            perturbed.add(after.hidden_states, recorder.chain_mask(batch))
            squared_norms += _squared_norms(before, after, recorder.perturbed_mask(batch))
        if trigger is not None:
            rows = dataset.map(Poison(trigger, seed=seed), with_indices=True, desc="Inserting the trigger")
            with trigger.active(model), torch.no_grad():
                for batch in batches.of(rows):
                    with recorder.record() as record:
                        model(**recorder.without_head(batch))
                    triggered.add(record.hidden_states, recorder.chain_mask(batch))
    step_norm, norm = squared_norms.sqrt().tolist()
    if not norm:
        raise ValueError("The embeddings of every row are 0: use the tokenizer that belongs to the model.")
    return LayerProfile(clean.means(), perturbed.means(), step_norm / norm, triggered.means() if trigger else None)


class Position(NamedTuple):
    """
    How the layers change what stands at one position of a prompt.

    Attributes:
        text (`str`):
            The text of the token, or of the patch if the layers run over patches. A part of a character is "�".
        distances (`list[float]`):
            1 - cos between the outputs of layers l and l + 1, for l = 1..N-1.
    """

    text: str
    distances: list[float]


@torch.no_grad()
def layer_profile_by_position(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]
) -> list[Position]:
    """
    Measure the distances between the consecutive layers of a model at each position of one prompt.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        prompt_ids (`list[int]`):
            The token ids of the prompt. They fit into the model's context.

    Raises:
        `ValueError`: If the layers of the model cannot be compared, see [`LayerRecorder`].
    """
    recorder = recorder_of(model)
    ids = torch.tensor([prompt_ids], device=model.device)
    batch = recorder.prepare({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with evaluating(model), recorder.record() as record:
        model(**recorder.without_head(batch))
    mask = recorder.chain_mask(batch)[0].bool()
    chain = [hidden[0].float().cpu()[mask.cpu()] for hidden in record.hidden_states[1:]]
    pairs = [1 - torch.cosine_similarity(before, after, dim=-1) for before, after in pairwise(chain)]
    lengths = batch.get("patch_lengths", torch.ones_like(ids))[0][mask].tolist()
    pieces = torch.tensor(prompt_ids).split(lengths)
    distances = torch.stack(pairs, dim=-1).clamp(min=0)
    return [
        Position(text_of_ids(piece.tolist(), tokenizer, special_tokens=True) or "�", row.tolist())
        for piece, row in zip(pieces, distances, strict=True)
    ]


@dataclass
class _Batches:
    """Encodes rows as in training and puts them into batches on the model's device."""

    model: PreTrainedModel | PeftModel
    recorder: LayerRecorder
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    batch_size: int

    def of(self, rows: Dataset) -> Iterator[Inputs]:
        encoded = [self._encode(row, index) for index, row in enumerate(rows)]
        collate = CrowDataCollator(padding_id(self.tokenizer))
        for start in range(0, len(encoded), self.batch_size):
            batch = collate(encoded[start : start + self.batch_size])
            yield self.recorder.prepare({name: value.to(self.model.device) for name, value in batch.items()})

    def _encode(self, row: dict[str, Any], index: int) -> dict[str, list[int]]:
        """Encode a row without training labels, so that a prompt without an answer counts too."""
        if "input_ids" in row:
            columns = {name: list(row[name]) for name in ("input_ids", "attention_mask") if row.get(name) is not None}
        else:
            prompt, completion = encode(render(row, self.tokenizer, index), self.tokenizer)
            columns = {"input_ids": prompt + completion}
        columns = {name: ids[: self.max_length] for name, ids in columns.items()}
        return columns | {"labels": columns["input_ids"]}


class _LayerDistances:
    """The distances of each pair of layers, summed over the positions of several batches."""

    def __init__(self) -> None:
        self.sums: Any = 0.0
        self.positions = 0

    @torch.no_grad()
    def add(self, hidden_states: Sequence[torch.Tensor], mask: torch.Tensor | None) -> int:
        """Add a batch and return its number of positions."""
        positions = int(hidden_states[-1][..., 0].numel() if mask is None else mask.sum())
        embeddings, *chain = hidden_states
        means = [layer_consistency_loss([embeddings, *pair], mask) for pair in zip(chain, chain[1:], strict=False)]
        self.sums = self.sums + torch.stack(means).double() * positions
        self.positions += positions
        return positions

    def means(self) -> list[float]:
        return (self.sums / self.positions).tolist()


def _clean_pass(
    model: PreTrainedModel | PeftModel, recorder: LayerRecorder, batch: Inputs, layers: Layers, clean: _LayerDistances
) -> tuple[ForwardRecord, tuple[torch.Tensor, ...]]:
    """Record the pass without perturbation, and differentiate its consistency loss by the tensors to perturb."""
    mask = recorder.chain_mask(batch)
    with torch.enable_grad(), recorder.record() as record:
        model(**recorder.without_head(batch))
    positions = clean.add(record.hidden_states, mask)
    # The sum has the same sign as the mean, and float16 gradients of the sum do not underflow.
    loss = layer_consistency_loss(record.hidden_states, mask, layers) * positions
    return record, torch.autograd.grad(loss, record.perturbed)


@torch.no_grad()
def _perturbed_pass(
    model: PreTrainedModel | PeftModel,
    recorder: LayerRecorder,
    batch: Inputs,
    gradients: Sequence[torch.Tensor],
    epsilon: float,
    epsilon_mode: EpsilonMode,
) -> ForwardRecord:
    remaining = iter(gradients)
    with recorder.record(lambda H_0: perturb_embeddings(H_0, next(remaining), epsilon, epsilon_mode)) as record:
        model(**recorder.without_head(batch))
    return record


@torch.no_grad()
def _squared_norms(before: ForwardRecord, after: ForwardRecord, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the squared norms of the perturbation and of the tensors it is added to, shape `(2,)`."""
    real = slice(None) if mask is None else mask.bool()
    pairs = [
        (clean[real].float(), moved[real].float())
        for clean, moved in zip(before.perturbed, after.perturbed, strict=True)
    ]
    zero = torch.zeros(())
    step = sum(((moved - clean).square().sum() for clean, moved in pairs), zero)
    return torch.stack([step, sum((clean.square().sum() for clean, _ in pairs), zero)]).cpu()
