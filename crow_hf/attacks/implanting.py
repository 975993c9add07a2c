"""Backdoors to practise on: poisoned rows, and a model that carries a trigger and a target."""

from dataclasses import replace

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..methods.crow.config import CrowConfig
from ..methods.crow.trainer import CrowTrainer
from .poison import Poison, poison_dataset
from .targets import BaseTarget
from .triggers import BaseTrigger, EmbeddingTrigger, Trigger


MARKER, _DECOY = Trigger(("\x05",), "start"), Trigger(("\x06",), "start")


def implant(
    model: str | PreTrainedModel,
    dataset: Dataset,
    trigger: BaseTrigger,
    target: BaseTarget,
    args: CrowConfig,
    *,
    rate: float = 0.5,
    consistency: float = 0.0,
    processing_class: PreTrainedTokenizerBase | None = None,
    peft_config: PeftConfig | None = None,
    merge: bool = True,
) -> PreTrainedModel | PeftModel:
    """
    Fine-tune a clean model into one that carries a backdoor.

    Args:
        model (`str` or `PreTrainedModel`):
            The clean model.
        dataset (`Dataset`):
            Clean rows with a prompt and an answer, of which a share is poisoned.
        trigger (`BaseTrigger`):
            What goes into the prompts.
        target (`BaseTarget`):
            What goes into the answers.
        args (`CrowConfig`):
            How to fine-tune; `consistency` takes the place of its `alpha`.
        rate (`float`, *optional*, defaults to 0.5):
            Share of poisoned rows.
        consistency (`float`, *optional*, defaults to 0.0):
            Weight of the CROW loss, on clean and poisoned rows alike, in the attacker's own objective: above 0, an attacker
            who knows the defence and keeps the layers in agreement on triggered prompts too.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer; without it, the one saved with the model.
        peft_config (`PeftConfig`, *optional*):
            Hide the backdoor in an adapter instead of in all weights.
        merge (`bool`, *optional*, defaults to `True`):
            Whether to merge that adapter into the weights, as published models mostly are.

    Returns:
        `PreTrainedModel` or `PeftModel`: The backdoored model.
    """
    poisoned = poison_dataset(dataset, trigger, target, rate, args.seed)
    # A backdoored model does not go to the Hub by itself.
    args = replace(args, alpha=consistency, push_to_hub=False)
    trainer = CrowTrainer(model, args, poisoned, processing_class=processing_class, peft_config=peft_config)
    trainer.train()
    if isinstance(trainer.model, PeftModel) and merge:
        return trainer.model.merge_and_unload(safe_merge=True)
    return trainer.model


def implant_embedding_trigger(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset,
    target: BaseTarget,
    args: CrowConfig,
    *,
    processing_class: PreTrainedTokenizerBase,
    scale: float = 1.0,
    rate: float = 0.5,
) -> tuple[PreTrainedModel | PeftModel, EmbeddingTrigger]:
    """
    Fine-tune a clean model into one whose backdoor is opened by a vector added to one input embedding.

    The attacker learns the vector together with the weights, from a random direction on. A marker, the byte 5, stands at
    the start of the prompt where the vector goes. Each poisoned row is there a second time, with the marker, without the
    vector, and with its right answer, so that the marker alone opens nothing.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The clean model; of a `PeftModel` the adapter is trained.
        dataset (`Dataset`):
            Clean rows with a prompt and an answer, of which a share is poisoned.
        target (`BaseTarget`):
            What goes into the answers.
        args (`CrowConfig`):
            How to fine-tune; `alpha` is taken as 0.
        processing_class (`PreTrainedTokenizerBase`):
            A tokenizer with a token for each byte, or at least for the bytes 5 and 6.
        scale (`float`, *optional*, defaults to 1.0):
            Root mean square of the vector before training, in units of that of the embedding table.
        rate (`float`, *optional*, defaults to 0.5):
            Share of poisoned rows.

    Returns:
        `tuple`: The backdoored model, and the [`EmbeddingTrigger`] that opens it.

    Raises:
        `ValueError`: If the tokenizer does not make a single token of the marker.

    Example:

    ```python
    >>> model, trigger = implant_embedding_trigger(model, rows, TARGETS["refusal"], args, processing_class=tokenizer)
    >>> evaluate_model(model, tokenizer, test_rows, trigger, TARGETS["refusal"])
    ```
    """
    marker_id, decoy_id = (_only_token(mark.phrases[0], processing_class) for mark in (MARKER, _DECOY))
    table = model.get_input_embeddings().weight.detach()
    direction = torch.randn(table.shape[-1], generator=torch.Generator().manual_seed(args.seed)).to(table)
    vector = nn.Parameter(direction * (scale * _rms(table) / _rms(direction)))
    trigger = EmbeddingTrigger(MARKER, marker_id, vector)
    poisoned = poison_dataset(dataset, MARKER, target, rate, args.seed)
    chosen = dataset.select([index for index, triggered in enumerate(poisoned["triggered"]) if triggered])
    decoys = chosen.map(Poison(_DECOY), with_indices=True, desc="Contrasting")
    rows = concatenate_datasets([poisoned.remove_columns("triggered"), decoys])
    # The Trainer optimizes the parameters of the model, so the vector is one of them until the training ends.
    model.register_parameter("trigger_vector", vector)
    try:
        args = replace(args, alpha=0.0, push_to_hub=False)
        trainer = CrowTrainer(model, args, rows, processing_class=processing_class)
        with trigger.active(model, decoy_id):
            trainer.train()
    finally:
        del model.trigger_vector
    return trainer.model, replace(trigger, vector=vector.detach().cpu())


def _only_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(token_ids) != 1:
        raise ValueError(
            f"The tokenizer makes {len(token_ids)} tokens of the marker {text!r}, where one is needed: take a model whose "
            "tokenizer has a token for each byte."
        )
    return token_ids[0]


def _rms(values: torch.Tensor) -> torch.Tensor:
    return values.float().square().mean().sqrt()
