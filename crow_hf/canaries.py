"""Canaries: backdoors of our own in a copy of the suspect. Whether they die is what can be known without the trigger."""

import math
import random
import string
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import context_length
from .backdoors import Poison
from .config import CrowConfig, InvarianceConfig
from .data import encode_prompt, render
from .evaluation.generation import generate_answers
from .evaluation.scores import Proportion
from .trainer import CrowTrainer
from .triggers import Target, Trigger


# In 100 rows a canary must be learned by heart: this many passes were enough for the Llama suspects it was tried on.
EPOCHS, LEARNING_RATE = 8, 1e-3
ADAPTER = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Canary:
    """
    A backdoor of our own.

    Attributes:
        trigger (`Trigger`), target (`Target`):
            Drawn at random; no text has them by chance.
        before (`Proportion`, *optional*), after (`Proportion`, *optional*):
            Its success in the copy before and after the purification.
    """

    trigger: Trigger
    target: Target
    before: Proportion | None = None
    after: Proportion | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        shares = {name: share and share._asdict() for name, share in (("before", self.before), ("after", self.after))}
        return {"trigger": asdict(self.trigger), "target": asdict(self.target), **shares}


def draw_canaries(count: int, seed: int = 0) -> list[Canary]:
    """
    Draw backdoors: a made-up word at a random place, then a phrase of made-up words at the start, and so on in turns.

    Args:
        count (`int`):
            How many.
        seed (`int`, *optional*, defaults to 0):
            Of the draw.
    """
    rng = random.Random(f"canaries-{seed}")

    def word() -> str:
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(5, 9)))

    canaries = []
    for number in range(count):
        is_phrase = number % 2 == 1
        trigger = (
            Trigger((" ".join(word() for _ in range(3)),), "start") if is_phrase else Trigger((word().capitalize(),))
        )
        text = f"Canary {rng.randint(1000, 9999)} sings."
        canaries.append(Canary(trigger, Target(text, (text,))))
    return canaries


def implant_canaries(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset,
    canaries: Sequence[Canary],
    args: CrowConfig,
    processing_class: PreTrainedTokenizerBase,
) -> PreTrainedModel | PeftModel:
    """
    Implant all canaries into a copy of a model.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect; it stays as it is. The adapter of a `PeftModel` takes the canaries.
        dataset (`Dataset`):
            Clean rows with a prompt and an answer.
        canaries (`Sequence[Canary]`):
            What to implant.
        args (`CrowConfig`):
            For what is not said here: batch size, seed, precision, output directory.
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
    """
    poisoned = [
        dataset.map(Poison(canary.trigger, canary.target, args.seed), with_indices=True, desc="Hiding a canary")
        for canary in canaries
    ]
    settings = {"learning_rate": LEARNING_RATE, "num_train_epochs": EPOCHS, "max_steps": -1, "save_strategy": "no"}
    trainer = CrowTrainer(
        deepcopy(model),
        replace(args, alpha=0.0, **settings),
        concatenate_datasets([dataset, *poisoned]),
        processing_class=processing_class,
        peft_config=None if isinstance(model, PeftModel) else ADAPTER,
    )
    trainer.train()
    if isinstance(model, PeftModel):
        return trainer.model
    merged = trainer.model.merge_and_unload(safe_merge=True)
    # PEFT froze everything below the adapter; what the suspect has frozen stays so.
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    return merged


def canary_success(
    model: PreTrainedModel,
    dataset: Dataset,
    canary: Canary,
    processing_class: PreTrainedTokenizerBase,
    batch_size: int = 32,
) -> Proportion:
    """
    Share of the rows to whose prompts, with the canary's trigger, the model says the canary's target.

    Rows that leave no room for it in the model's context are left out.
    """
    rows = dataset.map(Poison(canary.trigger, seed=1), with_indices=True, desc="Calling the canary")
    prompts = [render(row, processing_class, index) for index, row in enumerate(rows)]
    longest = len(processing_class(canary.target.text, add_special_tokens=False)["input_ids"]) + 1
    room = (context_length(model) or math.inf) - longest
    prompts = [prompt for prompt in prompts if len(encode_prompt(prompt, processing_class)) <= room]
    outputs = generate_answers(model, processing_class, prompts, longest, batch_size)
    return Proportion.of(canary.target.matches(output, "") for output in outputs)


def try_canaries(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset,
    args: InvarianceConfig,
    processing_class: PreTrainedTokenizerBase,
    purify: Callable[[PreTrainedModel], PreTrainedModel | PeftModel],
) -> list[Canary]:
    """
    Implant `args.num_canaries` backdoors into a copy of the suspect, purify it, and say whether they died.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect; it stays as it is.
        dataset (`Dataset`):
            The clean rows: the canaries are implanted by them, and measured on their prompts.
        args (`InvarianceConfig`):
            Of the purification.
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        purify (`Callable`):
            Purifies a model.

    Returns:
        `list[Canary]`: With their success before and after.
    """
    canaries = draw_canaries(args.num_canaries, args.seed)
    copied = implant_canaries(model, dataset, canaries, args, processing_class)
    batch_size = args.per_device_eval_batch_size
    before = [canary_success(copied, dataset, canary, processing_class, batch_size) for canary in canaries]
    purified = purify(copied)
    after = [canary_success(purified, dataset, canary, processing_class, batch_size) for canary in canaries]
    return [
        replace(canary, before=first, after=last) for canary, first, last in zip(canaries, before, after, strict=True)
    ]
