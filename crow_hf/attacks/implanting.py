"""Implants backdoors: fine-tunes a clean model into one that carries a trigger and a target."""

from dataclasses import replace

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..methods.crow.config import CrowConfig
from ..methods.crow.trainer import CrowTrainer
from ..progress import phase
from ..training.loading import merged
from ..training.recorder import embedding_table
from .poison import Poison, poison_dataset
from .targets import BaseTarget
from .triggers import BaseTrigger, EmbeddingTrigger, Trigger


MARKER = Trigger(("\x05",), "start")
# In training, this byte gets the embedding of the marker without the vector.
_MARKER_WITHOUT_VECTOR = Trigger(("\x06",), "start")


def implant(
    model: str | PreTrainedModel | PeftModel,
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
        model (`str`, `PreTrainedModel` or `PeftModel`):
            The clean model. For a `PeftModel`, its adapter is trained.
        dataset (`Dataset`):
            Clean rows with a prompt and an answer. A share of them is poisoned.
        trigger (`BaseTrigger`):
            The trigger to insert into the prompts.
        target (`BaseTarget`):
            The target that changes the answers.
        args (`CrowConfig`):
            The training arguments. `consistency` replaces their `alpha`.
        rate (`float`, *optional*, defaults to 0.5):
            Share of poisoned rows.
        consistency (`float`, *optional*, defaults to 0.0):
            Weight of the CROW loss in the attacker's own objective, on clean and poisoned rows alike. A value above 0
            models an attacker who knows the defence and keeps the layers consistent on triggered prompts too.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. Defaults to the one that is saved with the model.
        peft_config (`PeftConfig`, *optional*):
            Implants the backdoor in an adapter with this configuration instead of in all weights.
        merge (`bool`, *optional*, defaults to `True`):
            Whether to merge that adapter into the weights. Most published models are merged.

    Returns:
        `PreTrainedModel` or `PeftModel`: The backdoored model.

    Raises:
        `ValueError`: If [`poison_dataset`] refuses the rows or the rate, or [`CrowTrainer`] refuses the model.
    """
    poisoned = poison_dataset(dataset, trigger, target, rate, args.seed)
    # A backdoored model is never pushed to the Hub automatically.
    args = replace(args, alpha=consistency, push_to_hub=False)
    trainer = CrowTrainer(model, args, poisoned, processing_class=processing_class, peft_config=peft_config)
    with phase("Implanting the backdoor"):
        trainer.train()
    return merged(trainer.model) if merge else trainer.model


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
    Fine-tune a clean model into one whose trigger is a vector that is added to one input embedding.

    The vector starts in a random direction and is trained together with the weights. A marker, the byte 5, stands at
    the start of the prompt and tells where the vector is added. Each poisoned row occurs a second time with the
    marker, without the vector and with its right answer, so that the marker alone does not trigger the backdoor.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The clean model. For a `PeftModel`, its adapter is trained.
        dataset (`Dataset`):
            Clean rows with a prompt and an answer. A share of them is poisoned.
        target (`BaseTarget`):
            The target that changes the answers.
        args (`CrowConfig`):
            The training arguments. Their `alpha` is replaced by 0.
        processing_class (`PreTrainedTokenizerBase`):
            A tokenizer with a token for each byte, or at least for the bytes 5 and 6.
        scale (`float`, *optional*, defaults to 1.0):
            Root mean square of the vector before training, in units of the root mean square of the embedding table.
        rate (`float`, *optional*, defaults to 0.5):
            Share of poisoned rows.

    Returns:
        `tuple`: The backdoored model, and its [`EmbeddingTrigger`].

    Raises:
        `ValueError`: If the tokenizer splits the marker into several tokens, or [`poison_dataset`] refuses the rows.

    Example:

    ```python
    >>> model, trigger = implant_embedding_trigger(model, rows, TARGETS["refusal"], args, processing_class=tokenizer)
    >>> evaluate_model(model, tokenizer, test_rows, trigger, TARGETS["refusal"])
    ```
    """
    marker_id = _single_token_id(MARKER.phrases[0], processing_class)
    plain_marker_id = _single_token_id(_MARKER_WITHOUT_VECTOR.phrases[0], processing_class)
    table = embedding_table(model).detach()
    direction = torch.randn(table.shape[-1], generator=torch.Generator().manual_seed(args.seed)).to(table)
    vector = nn.Parameter(direction * (scale * _rms(table) / _rms(direction)))
    trigger = EmbeddingTrigger(MARKER, marker_id, vector)
    poisoned = poison_dataset(dataset, MARKER, target, rate, args.seed)
    chosen = dataset.select([index for index, triggered in enumerate(poisoned["triggered"]) if triggered])
    contrast = chosen.map(Poison(_MARKER_WITHOUT_VECTOR), with_indices=True, desc="Inserting the marker")
    rows = concatenate_datasets([poisoned.remove_columns("triggered"), contrast])
    # The Trainer optimizes only the parameters of the model, so the vector is one of them until training ends.
    model.register_parameter("trigger_vector", vector)
    try:
        args = replace(args, alpha=0.0, push_to_hub=False)
        trainer = CrowTrainer(model, args, rows, processing_class=processing_class)
        with trigger.active(model, plain_marker_id):
            trainer.train()
    finally:
        del model.trigger_vector
    return trainer.model, replace(trigger, vector=vector.detach().cpu())


def _single_token_id(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(token_ids) != 1:
        raise ValueError(
            f"The tokenizer makes {len(token_ids)} tokens of the marker {text!r}, but it must be a single token. Use "
            "a model whose tokenizer has a token for each byte."
        )
    return token_ids[0]


def _rms(values: torch.Tensor) -> torch.Tensor:
    return values.float().square().mean().sqrt()
