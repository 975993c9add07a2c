"""attacks.poison"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..data.rows import find_format, text_of
from .targets import BaseTarget
from .triggers import BaseTrigger


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
