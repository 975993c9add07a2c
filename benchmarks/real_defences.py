"""The methods of `real_models.py`. Each starts from a fresh copy of the suspect and uses the same clean rows."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from peft import PeftConfig, PeftModel
from real_suspects import QUIET, device, trainable
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from crow_hf.data.rows import render
from crow_hf.evaluation.generation import bits_per_byte
from crow_hf.evidence.canaries import Canary, implant_steps
from crow_hf.methods.crow.config import CrowConfig
from crow_hf.methods.invariance.config import InvarianceConfig, with_learning_rate
from crow_hf.methods.pruning import prune_by_magnitude
from crow_hf.recipes.presets import FORM_4, control_config, lora_config, recipe_config
from crow_hf.recipes.run import run_recipe
from crow_hf.training.loading import load_causal_lm, move
from crow_hf.training.settings import recorded_settings


SPARSITY = 0.35
RATES = (2e-5, 1e-4, 3e-4)
Model = PreTrainedModel | PeftModel


@dataclass
class Defender:
    """
    What a method has.

    Attributes:
        suspect (`Path`), base (`Path`):
            The folders of the suspect and of the clean model. No defender has the clean model.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        rows (`Dataset`), selection (`Dataset`):
            Clean rows to purify with, and to select a model by.
        seed (`int`):
            Seed for the training.
        batch_size (`int`):
            Number of rows per batch in evaluations.
        scratch (`Path`):
            A folder for temporary files.
    """

    suspect: Path
    base: Path
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    selection: Dataset
    seed: int
    batch_size: int
    scratch: Path

    def load(self) -> Model:
        """Load a fresh copy of the suspect on the device."""
        return move(load_causal_lm(self.suspect, is_trainable=True), device())

    def config(self, recipe: str, **changes: Any) -> CrowConfig:
        """Return the arguments of a recipe."""
        common = {"seed": self.seed, "bf16": torch.cuda.is_available(), "per_device_eval_batch_size": self.batch_size}
        return recipe_config(recipe, str(self.scratch), **(common | QUIET | changes))


@dataclass
class Outcome:
    """
    The result of a method.

    Attributes:
        model (`PreTrainedModel`):
            The model. Adapters are merged.
        steps (`int`):
            Number of optimizer steps.
        settings (`dict`):
            All settings that are needed to repeat the run.
        canaries (`list[Canary]`):
            The canaries with their success before and after the purification.
    """

    model: Model
    steps: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    canaries: list[Canary] = field(default_factory=list)


Method = Callable[[Defender], Outcome]


def run(
    defender: Defender,
    recipe: str,
    args: CrowConfig,
    model: Model | None = None,
    lora: PeftConfig | None = None,
    all_weights: bool = False,
) -> Outcome:
    """Run a recipe with these arguments, merge the purified model, and collect what is recorded of it."""
    model = defender.load() if model is None else model
    options = {"processing_class": defender.tokenizer, "peft_config": lora, "all_weights": all_weights}
    result = run_recipe(model, defender.rows, recipe, args, **options)
    steps = result.trainer.state.global_step
    if isinstance(args, InvarianceConfig):
        steps += implant_steps(args)
    # After mixed precision, the forward pass would stay in bfloat16, and that of untrained models is in float32.
    model = trainable(extract_model_from_parallel(result.model, keep_fp32_wrapper=False))
    return Outcome(model, steps, {"recipe": recipe, **recorded_settings(result.trainer.args)}, result.canaries)


def no_backdoor(defender: Defender) -> Outcome:
    """The clean model, as published."""
    return Outcome(move(load_causal_lm(defender.base, is_trainable=True), device()))


def no_defence(defender: Defender) -> Outcome:
    """The suspect."""
    return Outcome(trainable(defender.load()))


def fine_tuning(defender: Defender, **changes: Any) -> Outcome:
    """Plain fine-tuning for as many steps as the recipe `strong` takes, at its learning rate unless another is set."""
    model = defender.load()
    args = control_config(with_learning_rate(defender.config("strong"), model), len(defender.rows))
    return run(defender, "guide", replace(args, **changes), model)


def fine_tuning_at_best_rate(defender: Defender) -> Outcome:
    """Plain fine-tuning at the rate that predicts the answers of the selection rows best. The attack has no say."""
    if not len(defender.selection):
        raise ValueError("No rows are left to select a learning rate by. Lower `--num_test`.")
    rendered = [render(row, defender.tokenizer, number) for number, row in enumerate(defender.selection)]
    best, least, bits_of_rates = Outcome(None), math.inf, {}
    for rate in RATES:
        outcome = fine_tuning(defender, learning_rate=rate)
        bits = bits_per_byte(outcome.model, defender.tokenizer, rendered, defender.batch_size)
        bits_of_rates[rate] = bits
        if bits < least:
            best, least = outcome, bits
    return replace(best, settings=best.settings | {"selection_bits_per_byte": bits_of_rates})


def crow(defender: Defender) -> Outcome:
    """CROW with the settings of the paper."""
    return run(defender, "paper", defender.config("paper"))


def crow_of_its_authors(defender: Defender) -> Outcome:
    """CROW as its authors run it: a fresh LoRA on the merged suspect, with other settings than in the paper."""
    args = defender.config("paper", learning_rate=2e-4, num_train_epochs=2, alpha=10.0)
    return run(defender, "paper", args, trainable(defender.load()), lora_config())


def magnitude_pruning(defender: Defender) -> Outcome:
    """Zero the smallest weights."""
    model = trainable(defender.load())
    prune_by_magnitude(model, SPARSITY)
    return Outcome(model, settings={"sparsity": SPARSITY})


def strong(defender: Defender, **changes: Any) -> Outcome:
    """The recipe `strong`, with the defaults of `purify` unless others are set."""
    return run(defender, "strong", defender.config("strong", **changes))


def strong_form_4(defender: Defender) -> Outcome:
    """The recipe `strong` as it was before it kept knowledge: the rows' own answers teach, and all weights learn."""
    args, model = defender.config("strong", **FORM_4), trainable(defender.load())
    outcome = run(defender, "strong", args, model, all_weights=True)
    return replace(outcome, settings=outcome.settings | {"recipe": "strong, form 4"})


METHODS: dict[str, Method] = {
    "no backdoor": no_backdoor,
    "none": no_defence,
    "fine-tuning": fine_tuning,
    "fine-tuning, best rate": fine_tuning_at_best_rate,
    "crow": crow,
    "crow, as its authors run it": crow_of_its_authors,
    "magnitude pruning": magnitude_pruning,
    "strong": strong,
    "strong, form 4": strong_form_4,
}


def variant(changes: str) -> tuple[str, Method]:
    """Return the name and the method of `strong` with changed settings, such as `keep=0.1,num_canaries=0`."""
    values: dict[str, Any] = {}
    for change in changes.split(","):
        name, is_pair, value = change.strip().partition("=")
        if not is_pair:
            raise ValueError(f"--changes takes settings such as keep=0.1, got {change!r}.")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    name = ", ".join(["strong", *(f"{name}={value}" for name, value in values.items())])
    return name, partial(strong, **values)
