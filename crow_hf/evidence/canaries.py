"""Canaries: backdoors of our own, put into the suspect before it is purified, so that what shuts them shuts the others too."""

import hashlib
import math
import random
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attacks.poison import Poison
from ..attacks.targets import Target
from ..attacks.triggers import Trigger
from ..data.encoding import encode_prompt
from ..data.rows import render
from ..evaluation.generation import generate_answers
from ..evaluation.scores import Proportion
from ..methods.crow.config import leaving_nothing, rows_in_step
from ..methods.crow.trainer import CrowTrainer
from ..methods.invariance.config import InvarianceConfig, fine_tuning_config
from ..training.recorder import context_length


@dataclass(frozen=True)
class Canary:
    """
    A backdoor of our own.

    Attributes:
        trigger (`Trigger`), target (`Target`):
            Drawn at random; no text has them by chance.
        before (`Proportion`, *optional*), after (`Proportion`, *optional*):
            Its success before and after the purification.
    """

    trigger: Trigger
    target: Target
    before: Proportion | None = None
    after: Proportion | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        shares = {name: share and share._asdict() for name, share in (("before", self.before), ("after", self.after))}
        return {"trigger": asdict(self.trigger), "target": asdict(self.target), **shares}


def draw_canaries(model: PreTrainedModel | PeftModel, count: int, seed: int = 0) -> list[Canary]:
    """
    Draw backdoors for a suspect: a made-up word at a random place, then a phrase of made-up words at the start, and so on in turns.

    They depend on every bit of its weights: whoever made it cannot have trained it for them, not even with the seed.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect as it came.
        count (`int`):
            How many.
        seed (`int`, *optional*, defaults to 0):
            Of the draw.
    """
    rng = random.Random(f"canaries-{seed}-{_fingerprint(model)}")

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


def _fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """A cryptographic one: by a plain checksum, weights could be made to draw whatever their maker likes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def implant_steps(args: InvarianceConfig) -> int:
    """Optimizer steps of the implanting: half of `args.num_views` prompts for each canary, and as many clean ones."""
    if not args.num_canaries:
        return 0
    return math.ceil((1 + args.num_canaries) * args.num_views / 2 / rows_in_step(args))


def implant_canaries(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset,
    canaries: Sequence[Canary],
    args: InvarianceConfig,
    processing_class: PreTrainedTokenizerBase,
) -> None:
    """
    Implant backdoors into a model, by plain fine-tuning of what is trainable in it.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Is changed.
        dataset (`Dataset`):
            Clean rows with a prompt and an answer.
        canaries (`Sequence[Canary]`):
            What to implant.
        args (`InvarianceConfig`):
            Of the purification; it says how many steps of [`implant_steps`] are made, how large and with which seed.
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
    """
    poisoned = [
        dataset.map(Poison(canary.trigger, canary.target, args.seed), with_indices=True, desc="Hiding a canary")
        for canary in canaries
    ]
    rows = concatenate_datasets([dataset, *poisoned])
    with TemporaryDirectory() as nowhere:
        plain = leaving_nothing(fine_tuning_config(args, implant_steps(args)), nowhere)
        CrowTrainer(model, plain, rows, processing_class=processing_class).train()


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
