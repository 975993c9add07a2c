"""How far apart consecutive layers are, pair by pair: on clean, on perturbed and on triggered rows."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attacks.poison import Poison
from ..attacks.triggers import BaseTrigger
from ..data.collators import CrowDataCollator
from ..data.encoding import encode_completion, encode_prompt, padding_id
from ..data.rows import render
from ..methods.crow.objective import EpsilonMode, Layers, layer_consistency_loss, perturb_embeddings
from ..training.recorder import Inputs, LayerRecorder, Perturb, context_length, recorder_of


@dataclass
class LayerProfile:
    """
    The mean of 1 - cos between the outputs of layers l and l + 1, for l = 1..N-1, over all positions that are no padding.

    Attributes:
        clean (`list[float]`):
            On the rows as they are. Its mean is the consistency loss of equation 4.
        perturbed (`list[float]`):
            On the same rows after one FGSM step of this model's own gradient.
        perturbation_ratio (`float`):
            The length of that step over the length of what it was taken on.
        triggered (`list[float]`, *optional*):
            On the rows with the trigger in their prompts.
    """

    clean: list[float]
    perturbed: list[float]
    perturbation_ratio: float
    triggered: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON can hold it."""
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
    Measure the consistency of a model's layers, one pair of neighbours at a time.

    The model's weights, gradients and mode stay as they are.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer; not needed for rows of `input_ids`.
        dataset (`Dataset`):
            Rows in any of the formats of [`crow_hf.data`]: prompt and answer are read together, as in training.
        trigger (`BaseTrigger`, *optional*):
            A known trigger. It goes to the same places as in [`evaluate_model`] with the same seed.
        epsilon (`float`, *optional*, defaults to 0.1):
            Size of the FGSM step, see [`crow_hf.objective.perturb_embeddings`].
        epsilon_mode (`str`, *optional*, defaults to `"absolute"`):
            Its unit.
        layers (`str`, *optional*, defaults to `"paper"`):
            Of the loss whose gradient that step follows, see [`crow_hf.objective.layer_consistency_loss`].
        perturb (`str`, *optional*, defaults to `"embeddings"`):
            What the step is taken on, see [`CrowConfig`].
        max_length (`int`, *optional*, defaults to 1024):
            Longer rows are cut, as they are at the model's own context.
        batch_size (`int`, *optional*, defaults to 8):
            Rows at a time.
        seed (`int`, *optional*, defaults to 0):
            Of the places where the trigger is put.

    Returns:
        [`LayerProfile`]

    Raises:
        `ValueError`: For a model or rows that [`CrowTrainer`] would refuse too.
    """
    recorder = recorder_of(model, perturb)
    max_length = min(max_length, context_length(model) or max_length)

    def batches(rows: Dataset) -> Iterator[Inputs]:
        encoded, collate = (
            [_encoded(row, tokenizer, max_length) for row in rows],
            CrowDataCollator(padding_id(tokenizer)),
        )
        for start in range(0, len(encoded), batch_size):
            batch = collate(encoded[start : start + batch_size])
            yield recorder.prepare({name: value.to(model.device) for name, value in batch.items()})

    clean, perturbed, triggered, lengths = _Pairs(), _Pairs(), _Pairs(), torch.zeros(2)
    was_training = model.training
    model.eval()
    try:
        for batch in batches(dataset):
            lengths += _attack(model, recorder, batch, clean, perturbed, epsilon, epsilon_mode, layers)
        if trigger is not None:
            rows = dataset.map(Poison(trigger, seed=seed), with_indices=True, desc="Triggering")
            with trigger.active(model), torch.no_grad():
                for batch in batches(rows):
                    with recorder.record() as record:
                        model(**recorder.without_head(batch))
                    triggered.add(record.hidden_states, recorder.chain_mask(batch))
    finally:
        model.train(was_training)
    step, whole = lengths.sqrt().tolist()
    return LayerProfile(clean.means(), perturbed.means(), step / whole, triggered.means() if trigger else None)


def _encoded(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> dict[str, list[int]]:
    """Prompt and answer as they are trained on, but without labels: a prompt alone is looked at too."""
    if "input_ids" in row:
        columns = {name: list(row[name]) for name in ("input_ids", "attention_mask") if row.get(name) is not None}
    else:
        rendered = render(row, tokenizer)
        columns = {"input_ids": encode_prompt(rendered, tokenizer) + encode_completion(rendered, tokenizer)}
    columns = {name: ids[:max_length] for name, ids in columns.items()}
    return columns | {"labels": columns["input_ids"]}


class _Pairs:
    """Sums over the positions of several batches, one for each pair of layers."""

    def __init__(self) -> None:
        self.sums, self.positions = 0.0, 0

    @torch.no_grad()
    def add(self, hidden_states: Sequence[torch.Tensor], mask: torch.Tensor | None) -> int:
        """Add a batch; returns its number of positions."""
        positions = int(hidden_states[-1][..., 0].numel() if mask is None else mask.sum())
        embeddings, *chain = hidden_states
        means = [layer_consistency_loss([embeddings, *pair], mask) for pair in zip(chain, chain[1:], strict=False)]
        self.sums = self.sums + torch.stack(means).double() * positions
        self.positions += positions
        return positions

    def means(self) -> list[float]:
        return (self.sums / self.positions).tolist()


def _attack(
    model: PreTrainedModel | PeftModel,
    recorder: LayerRecorder,
    batch: Inputs,
    clean: _Pairs,
    perturbed: _Pairs,
    epsilon: float,
    epsilon_mode: EpsilonMode,
    layers: Layers,
) -> torch.Tensor:
    """Both passes of a batch; returns the squared lengths of the step and of what it was taken on."""
    mask, inputs = recorder.chain_mask(batch), recorder.without_head(batch)
    with torch.enable_grad(), recorder.record() as before:
        model(**inputs)
    positions = clean.add(before.hidden_states, mask)
    # The sum has the sign of the mean, and keeps float16 gradients from underflowing.
    loss = layer_consistency_loss(before.hidden_states, mask, layers) * positions
    gradients = iter(torch.autograd.grad(loss, before.perturbed))
    with torch.no_grad():
        with recorder.record(lambda H_0: perturb_embeddings(H_0, next(gradients), epsilon, epsilon_mode)) as after:
            model(**inputs)
        perturbed.add(after.hidden_states, mask)
        real = recorder.perturbed_mask(batch)
        real = slice(None) if real is None else real.bool()
        pairs = [
            (first[real].float(), moved[real].float())
            for first, moved in zip(before.perturbed, after.perturbed, strict=True)
        ]
        step = sum((moved - first).square().sum() for first, moved in pairs)
        return torch.stack([step, sum(first.square().sum() for first, _ in pairs)]).cpu()
