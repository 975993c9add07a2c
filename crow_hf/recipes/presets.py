"""The recipes by name, and the configurations that belong to them.

| recipe | what it does |
|---|---|
| `"strong"` | screens the rows, lets the suspect write more, implants canaries, trains a LoRA by Invariance |
| `"paper"` | CROW with the published settings, on a fresh LoRA ([`CrowTrainer`]) |
| `"guide"` | CROW with the defaults of [`CrowConfig`], on all weights |

If the suspect is an adapter, every recipe trains this adapter.
"""

import math
from typing import Any, Literal, overload

from peft import LoraConfig

from ..evidence.canaries import implant_steps
from ..methods.crow.config import CrowConfig, rows_in_step
from ..methods.invariance.config import InvarianceConfig, fine_tuning_config


RECIPES = ("strong", "paper", "guide")
# Section 4.4 of the paper.
PAPER: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}
# The settings of form 4 of the recipe `strong`, see docs/recipe-development.md. It trained all weights.
FORM_4: dict[str, Any] = {
    "label_weight": 1.0,
    "learning_rate": 7e-4,
    "keep": 0.3,
    "num_written_rows": 0,
    "num_phrases": 0,
    "adversarial_weight": 1.0,
}
# The rank of the LoRA that a recipe trains, unless the suspect is an adapter.
LORA_RANKS = {"strong": 16, "paper": 8}
# The number of clean rows that a recipe uses, if nothing else is asked for.
MAX_ROWS = {"strong": 1000, "paper": 100, "guide": 100}


@overload
def recipe_config(recipe: Literal["strong"], output_dir: str, **changes: Any) -> InvarianceConfig: ...
@overload
def recipe_config(recipe: str, output_dir: str, **changes: Any) -> CrowConfig: ...
def recipe_config(recipe: str, output_dir: str, **changes: Any) -> CrowConfig:
    """
    Return the arguments of a recipe.

    Args:
        recipe (`str`):
            `"strong"` returns an [`InvarianceConfig`]. `"paper"` returns a [`CrowConfig`] with the published settings,
            and
            `"guide"` one with its defaults.
        output_dir (`str`):
            The folder for the model, its checkpoints and its report.
        **changes:
            Any arguments of that configuration.

    Returns:
        [`CrowConfig`]

    Raises:
        `ValueError`: If there is no such recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, got {recipe!r}.")
    if recipe == "strong":
        return InvarianceConfig(output_dir, **changes)
    return CrowConfig(output_dir, **((PAPER if recipe == "paper" else {}) | changes))


def lora_config(rank: int = 8) -> LoraConfig:
    """Return a LoRA on all linear layers, with an alpha of twice its rank."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def control_config(args: CrowConfig, num_rows: int) -> CrowConfig:
    """
    Return the arguments of plain fine-tuning with the learning rate, schedule, batch size and number of steps of a
    purification. The steps that implant canaries count too.

    Args:
        args (`CrowConfig`):
            The arguments of the purification.
        num_rows (`int`):
            The number of clean rows.

    Returns:
        [`CrowConfig`]
    """
    steps = args.max_steps
    if isinstance(args, InvarianceConfig):
        steps = num_steps(args, num_rows) + implant_steps(args)
    return fine_tuning_config(args, steps)


def num_steps(args: CrowConfig, num_rows: int) -> int:
    """Return the number of optimizer steps of a training on clean rows, without those that implant canaries."""
    if args.max_steps > 0:
        return args.max_steps
    views = num_rows
    if isinstance(args, InvarianceConfig):
        # Each row is seen at least once, those that the suspect writes too.
        views = max(args.num_views, num_rows + args.num_written_rows)
    return math.ceil(args.num_train_epochs * math.ceil(views / rows_in_step(args)))
