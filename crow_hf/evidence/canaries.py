"""Canaries: backdoors that we implant before a purification, to see whether the purification removes them.

Whether a purification removed an unknown backdoor cannot be measured. Whether it removed the canaries can. A
purification that removes them tends to remove unknown backdoors too.
"""

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
from ..data.rows import Rendered, add_empty_answers, render
from ..evaluation.generation import generate_answers
from ..evaluation.scores import Proportion
from ..methods.crow.config import rows_in_step, scratch_config
from ..methods.crow.trainer import CrowTrainer
from ..methods.invariance.config import InvarianceConfig, fine_tuning_config
from ..training.recorder import context_length


@dataclass(frozen=True)
class Canary:
    """
    A backdoor that we implant before a purification.

    Attributes:
        trigger (`Trigger`):
            The trigger, drawn at random. No text contains it by chance.
        target (`Target`):
            The target, drawn at random. No text contains it by chance.
        before (`Proportion`, *optional*):
            Success of the canary before the purification, see [`canary_success`].
        after (`Proportion`, *optional*):
            Success of the canary after the purification.
    """

    trigger: Trigger
    target: Target
    before: Proportion | None = None
    after: Proportion | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the canary as a dictionary that JSON can hold."""
        rates = {name: rate and rate._asdict() for name, rate in (("before", self.before), ("after", self.after))}
        return {"trigger": asdict(self.trigger), "target": asdict(self.target), **rates}


def draw_canaries(model: PreTrainedModel | PeftModel, count: int, seed: int = 0) -> list[Canary]:
    """
    Draw canaries for a suspect model.

    The triggers alternate between a random word at a random position and a phrase of three random words at the start
    of the prompt.

    The draw depends on every bit of the weights. An attacker who knows the seed still cannot train the model to react
    to its future canaries in a special way.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect, before any training.
        count (`int`):
            Number of canaries.
        seed (`int`, *optional*, defaults to 0):
            Seed for the draw.

    Returns:
        `list[Canary]`: The canaries. None of them is implanted yet.
    """
    rng = random.Random(f"canaries-{seed}-{_fingerprint(model)}")

    def word() -> str:
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(5, 9)))

    canaries = []
    for number in range(count):
        if number % 2:
            trigger = Trigger((" ".join(word() for _ in range(3)),), "start")
        else:
            trigger = Trigger((word().capitalize(),))
        text = f"Canary {rng.randint(1000, 9999)} sings."
        canaries.append(Canary(trigger, Target(text, (text,))))
    return canaries


def _fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """
    Hash the weights. The hash is cryptographic because an attacker could fit weights to a plain checksum and so choose
    the canaries.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_canaries_fit(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset,
    canaries: Sequence[Canary],
    max_length: int,
    processing_class: PreTrainedTokenizerBase,
) -> None:
    """
    Refuse rows of which none has room for a canary, before any work.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect.
        dataset (`Dataset`):
            Clean rows with a prompt. They need no answer.
        canaries (`Sequence[Canary]`):
            The canaries.
        max_length (`int`):
            Maximum length of a row in tokens.
        processing_class (`PreTrainedTokenizerBase`):
            The model's tokenizer.

    Raises:
        `ValueError`: If no prompt with a canary and its answer fits into `max_length` and the model's context.
    """
    limit, rows = min(max_length, context_length(model) or max_length), add_empty_answers(dataset)
    for canary in canaries:
        prompts, answer_length = _triggered_prompts(rows, canary, processing_class)
        shortest = min(len(encode_prompt(prompt, processing_class)) for prompt in prompts) + answer_length
        if shortest > limit:
            raise ValueError(
                f"No row has room for a canary: the shortest prompt with one has {shortest} tokens, and `max_length` "
                f"and the model's context allow {limit}. Pass shorter prompts, or set `num_canaries` to 0."
            )


def implant_steps(args: InvarianceConfig) -> int:
    """
    Number of optimizer steps of [`implant_canaries`].

    They see `args.num_views / 2` prompts with each canary and `args.num_views / 2` clean prompts.

    Args:
        args ([`InvarianceConfig`]):
            The arguments of the purification.
    """
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
    Implant canaries into a model with plain fine-tuning of its trainable weights.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect. It is changed.
        dataset (`Dataset`):
            Clean rows with a prompt and an answer.
        canaries (`Sequence[Canary]`):
            The canaries to implant.
        args ([`InvarianceConfig`]):
            The arguments of the purification. They determine the number of steps (see [`implant_steps`]), the learning
            rate, the batch size and the seed.
        processing_class (`PreTrainedTokenizerBase`):
            The model's tokenizer.
    """
    poisoned = [
        dataset.map(Poison(canary.trigger, canary.target, args.seed), with_indices=True, desc="Adding a canary")
        for canary in canaries
    ]
    rows = concatenate_datasets([dataset, *poisoned])
    with TemporaryDirectory() as folder:
        implant_args = scratch_config(fine_tuning_config(args, implant_steps(args)), folder)
        CrowTrainer(model, implant_args, rows, processing_class=processing_class).train()


def canary_success(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset,
    canary: Canary,
    processing_class: PreTrainedTokenizerBase,
    batch_size: int = 32,
) -> Proportion:
    """
    Measure how often a canary's trigger makes a model answer with the canary's target.

    Prompts that leave no room for the target in the model's context are skipped.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        dataset (`Dataset`):
            Clean rows with a prompt. The trigger is inserted into each prompt.
        canary ([`Canary`]):
            The canary.
        processing_class (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        batch_size (`int`, *optional*, defaults to 32):
            Number of prompts per batch.

    Returns:
        [`Proportion`]: The number of answers with the target among all answers.
    """
    prompts, answer_length = _triggered_prompts(dataset, canary, processing_class)
    longest_prompt = (context_length(model) or math.inf) - answer_length
    prompts = [prompt for prompt in prompts if len(encode_prompt(prompt, processing_class)) <= longest_prompt]
    outputs = generate_answers(model, processing_class, prompts, answer_length, batch_size)
    return Proportion.of(canary.target.matches(output, "") for output in outputs)


def _triggered_prompts(
    dataset: Dataset, canary: Canary, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Rendered], int]:
    """The prompts with a canary's trigger, and the number of tokens of its answer with an end."""
    rows = dataset.map(Poison(canary.trigger, seed=1), with_indices=True, desc="Triggering the canary")
    prompts = [render(row, tokenizer, index) for index, row in enumerate(rows)]
    return prompts, len(tokenizer(canary.target.text, add_special_tokens=False)["input_ids"]) + 1
