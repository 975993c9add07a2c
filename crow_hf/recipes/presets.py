"""recipes.presets"""

import math
from typing import Any

from ..evidence.canaries import implant_steps
from ..methods.crow.config import CrowConfig, rows_in_step
from ..methods.invariance.config import InvarianceConfig, fine_tuning_config


RECIPES = ("strong", "paper", "guide")
# Section 4.4 of the paper.
PAPER = {
    "learning_rate": 1e-3,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}


def recipe_config(recipe: str, output_dir: str, **changes: Any) -> CrowConfig:
    """
    The arguments of a recipe.

    Args:
        recipe (`str`):
            `"strong"`: [`InvarianceConfig`]. `"paper"`: CROW as published. `"guide"`: the defaults of [`CrowConfig`].
        output_dir (`str`):
            See [`CrowConfig`].
        **changes:
            Any arguments of that configuration.

    Raises:
        `ValueError`: If there is no such recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, got {recipe!r}.")
    if recipe == "strong":
        return InvarianceConfig(output_dir, **changes)
    return CrowConfig(output_dir, **((PAPER if recipe == "paper" else {}) | changes))


def control_config(args: CrowConfig, num_rows: int) -> CrowConfig:
    """
    The arguments of plain fine-tuning with a purification's learning rate, schedule, batch size and number of steps, those
    that implant canaries among them.

    Args:
        args (`CrowConfig`):
            Of the purification.
        num_rows (`int`):
            How many clean rows there are.
    """
    steps = args.max_steps
    if isinstance(args, InvarianceConfig):
        if steps <= 0:
            batches = math.ceil(max(args.num_views, num_rows) / rows_in_step(args))
            steps = math.ceil(args.num_train_epochs * batches)
        steps += implant_steps(args)
    return fine_tuning_config(args, steps)
