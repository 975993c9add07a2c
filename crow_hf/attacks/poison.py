"""Poisoned rows: inserts a trigger into prompts and the target into answers."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..data.caching import CachedByRelease
from ..data.rows import edit_answer, insert_into_prompt
from .targets import BaseTarget
from .triggers import BaseTrigger


@dataclass
class Poison(CachedByRelease):
    """
    Inserts a trigger, and optionally a target, into rows with `Dataset.map(Poison(...), with_indices=True)`.

    The result depends only on the seed and on the number of the row. Batches, processes and the order of calls do not
    affect it.

    Args:
        trigger (`BaseTrigger`):
            The trigger. It goes into the instruction, the prompt, or the last user message.
        target (`BaseTarget`, *optional*):
            The target. It changes the answer. Without a target the row keeps its right answer, which makes it a
            triggered test row.
        seed (`int`, *optional*, defaults to 0):
            Seed for the random positions of the trigger.

    Raises:
        `ValueError`: If a row has no prompt, or the trigger leaves its prompt unchanged.
    """

    trigger: BaseTrigger
    target: BaseTarget | None = None
    seed: int = 0

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        poisoned = insert_into_prompt(row, index, self.trigger.insert, self.seed, "trigger")
        if self.target is not None:
            poisoned |= edit_answer({**row, **poisoned}, self.target.apply, index)
        return poisoned


def poison_dataset(
    dataset: Dataset, trigger: BaseTrigger, target: BaseTarget, rate: float = 0.5, seed: int = 0
) -> Dataset:
    """
    Poison a share of the rows.

    Args:
        dataset (`Dataset`):
            Rows with a prompt and an answer.
        trigger (`BaseTrigger`):
            The trigger to insert into the prompts.
        target (`BaseTarget`):
            The target that changes the answers.
        rate (`float`, *optional*, defaults to 0.5):
            Share of the rows to poison. The rows are drawn at random. BackdoorLLM uses 500 poisoned rows and 500 clean
            ones.
        seed (`int`, *optional*, defaults to 0):
            Seed for the choice of the rows and for the random positions of the trigger.

    Returns:
        `Dataset`: The rows in the same order, with an additional column `triggered` that marks the poisoned ones.

    Raises:
        `ValueError`: If `rate` is not in (0, 1] or selects no row, or a row cannot be poisoned.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"`rate` is the share of poisoned rows. It must be above 0 and at most 1, got {rate}.")
    count = round(rate * len(dataset))
    if count == 0:
        raise ValueError(f"`rate`={rate} selects none of {len(dataset)} rows. Raise `rate` or pass more rows.")
    chosen = set(random.Random(seed).sample(range(len(dataset)), count))
    poison = Poison(trigger, target, seed)

    def poison_chosen(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {**(poison(row, index) if index in chosen else {}), "triggered": index in chosen}

    return dataset.map(poison_chosen, with_indices=True, desc="Poisoning")
