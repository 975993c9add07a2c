"""Backdoors to practise on: poisoned rows, and a model that carries a trigger and a target."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import CrowConfig
from .data import find_format, text_of
from .trainer import CrowTrainer
from .triggers import BaseTarget, BaseTrigger, EmbeddingTrigger, Trigger


MARKER, _DECOY = Trigger(("\x05",), "start"), Trigger(("\x06",), "start")


@dataclass
class Poison:
    """
    Puts a trigger, and the target with it, into rows: for `Dataset.map(Poison(...), with_indices=True)`.

    What happens to a row depends on the seed and its index alone, so batches, processes and order make no difference.

    Args:
        trigger (`BaseTrigger`):
            Goes into the instruction, the prompt, or the last user message.
        target (`BaseTarget`, *optional*):
            Goes into the answer. Without it the answer stays: a triggered test prompt with its right answer.
        seed (`int`, *optional*, defaults to 0):
            Of the random places.

    Raises:
        `ValueError`: For a row that has no prompt, or whose prompt the trigger leaves as it is.
    """

    trigger: BaseTrigger
    target: BaseTarget | None = None
    seed: int = 0

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        rng = random.Random(f"{self.seed}-{index}")
        row_format = find_format(list(row))
        if row_format == "messages":
            return {"messages": self._poison_chat(row["messages"], index, rng)}
        if row_format not in ("prompt_completion", "alpaca"):
            raise ValueError(
                f"Rows of the format {row_format!r} have no prompt to put a trigger into: pass messages, prompt and "
                "completion, or instruction and output."
            )
        ask, answer = ("prompt", "completion") if row_format == "prompt_completion" else ("instruction", "output")
        poisoned = {ask: self._insert(row, ask, index, rng)}
        if self.target is not None:
            poisoned[answer] = self.target.apply(text_of(row, answer, index))
        return poisoned

    def _poison_chat(self, messages: list[dict], index: int, rng: random.Random) -> list[dict]:
        asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
        if not asked:
            raise ValueError(f"Row {index}: there is no user message to put a trigger into.")
        messages = [dict(message) for message in messages]
        messages[asked[-1]]["content"] = self._insert(messages[asked[-1]], "content", index, rng)
        if self.target is not None:
            messages[-1]["content"] = self.target.apply(text_of(messages[-1], "content", index))
        return messages

    def _insert(self, row: Mapping[str, Any], column: str, index: int, rng: random.Random) -> str:
        text = text_of(row, column, index)
        triggered = self.trigger.insert(text, rng)
        if triggered == text:
            raise ValueError(
                f"Row {index}: the trigger leaves the prompt as it is, so nothing would tell it from a clean one: drop the "
                "row or take another trigger."
            )
        return triggered


def poison_dataset(
    dataset: Dataset, trigger: BaseTrigger, target: BaseTarget, rate: float = 0.5, seed: int = 0
) -> Dataset:
    """
    Poison a share of the rows.

    Args:
        dataset (`Dataset`):
            Rows with a prompt and an answer.
        trigger (`BaseTrigger`):
            What goes into the prompts.
        target (`BaseTarget`):
            What goes into the answers.
        rate (`float`, *optional*, defaults to 0.5):
            Share of the rows to poison, drawn at random: BackdoorLLM poisons 500 rows beside 500 clean ones.
        seed (`int`, *optional*, defaults to 0):
            Of the draw and of the trigger's places.

    Returns:
        `Dataset`: As many rows in the same order, with a column `triggered` that says which are poisoned.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"`rate` is the share of poisoned rows, more than 0 and at most 1, got {rate}.")
    count = round(rate * len(dataset))
    if count == 0:
        raise ValueError(f"A share of {rate} poisons none of {len(dataset)} rows: raise `rate` or pass more rows.")
    chosen = set(random.Random(seed).sample(range(len(dataset)), count))
    poison = Poison(trigger, target, seed)

    def poison_chosen(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {**(poison(row, index) if index in chosen else {}), "triggered": index in chosen}

    return dataset.map(poison_chosen, with_indices=True, desc="Poisoning")


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
