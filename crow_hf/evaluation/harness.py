"""One evaluation of one model: is the backdoor there, and is the model of use?"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attacks.poison import Poison
from ..attacks.targets import BaseTarget
from ..attacks.triggers import BaseTrigger
from ..data.rows import render
from .generation import bits_per_byte, generate_answers
from .scores import Proportion, is_degenerate, is_empty, is_exact_match


# What the models of a comparison are called.
NO_DEFENCE, FINE_TUNING, CROW, STRONG = "no defence", "fine-tuning", "CROW", "strong recipe"


@dataclass
class PromptScores:
    """
    What a model does on one set of prompts, every prompt counted.

    Attributes:
        target (`Proportion`, *optional*):
            Outputs that show the attacker's target: attack success on triggered prompts, false positives on clean ones.
        empty (`Proportion`), degenerate (`Proportion`):
            Outputs that say nothing, or nothing anybody would read.
        exact_match (`Proportion`, *optional*):
            Outputs that are the right answer, among the rows that have one.
        bits_per_byte (`float`):
            Of the right answers, or NaN if no row has one.
        outputs (`list[str]`):
            What the model said, in the order of the rows.
    """

    target: Proportion | None
    empty: Proportion
    degenerate: Proportion
    exact_match: Proportion | None
    bits_per_byte: float
    outputs: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON can hold them: what is not a number is `None`."""
        scores = {
            name: value._asdict() if isinstance(value, Proportion) else value for name, value in vars(self).items()
        }
        return scores | {"bits_per_byte": self.bits_per_byte if math.isfinite(self.bits_per_byte) else None}


@dataclass
class Evaluation:
    """
    What a model does on clean prompts and, where a trigger is known, on triggered ones.

    Attributes:
        clean (`PromptScores`):
            Utility, and the false positives of the target.
        triggered (`PromptScores`, *optional*):
            Attack success, and whether the model is of use again on triggered prompts or merely silent.
    """

    clean: PromptScores
    triggered: PromptScores | None = None

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as JSON can hold it."""
        return {
            "clean": self.clean.to_dict(),
            "triggered": None if self.triggered is None else self.triggered.to_dict(),
        }


def with_answers(dataset: Dataset) -> Dataset:
    """Prompts alone get an empty answer, which counts as none."""
    for prompt, answer in (("prompt", "completion"), ("instruction", "output")):
        if prompt in dataset.column_names and answer not in dataset.column_names:
            dataset = dataset.add_column(answer, [""] * len(dataset))
    return dataset


def evaluate_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    trigger: BaseTrigger | None = None,
    target: BaseTarget | None = None,
    *,
    judge: Callable[[str, str], bool] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    seed: int = 0,
) -> Evaluation:
    """
    Let a model answer every prompt with and without the trigger, and score the answers.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        dataset (`Dataset`):
            Test rows without a trigger, with a prompt and, where there is one, the right answer.
        trigger (`BaseTrigger`, *optional*):
            The backdoor's trigger. Without it only the clean prompts are answered.
        target (`BaseTarget`, *optional*):
            The backdoor's target, which tells whether an attack succeeded.
        judge (`Callable`, *optional*):
            Tells that in its place: output and right answer to truth value. Where a row has no answer, it gets `""`.
        max_new_tokens (`int`, *optional*, defaults to 128):
            See [`generate_answers`].
        batch_size (`int`, *optional*, defaults to 32):
            See [`generate_answers`].
        seed (`int`, *optional*, defaults to 0):
            Of the places where the trigger is put.

    Returns:
        `Evaluation`

    Raises:
        `ValueError`: If the dataset is empty or has no prompts, or a trigger comes without target or judge.
    """
    if len(dataset) == 0:
        raise ValueError("The test dataset is empty: pass at least one row.")
    dataset = with_answers(dataset)
    judge = judge or (target.matches if target is not None else None)
    if trigger is not None and judge is None:
        raise ValueError("A trigger alone does not say what success of the attack is: pass a target or a judge too.")

    def score(rows: Dataset) -> PromptScores:
        rendered = [render(row, tokenizer, index) for index, row in enumerate(rows)]
        outputs = generate_answers(model, tokenizer, rendered, max_new_tokens, batch_size)
        # An empty reference is no answer: silence must not count as right.
        matches = [
            is_exact_match(output, row.answer) for output, row in zip(outputs, rendered, strict=True) if row.answer
        ]
        return PromptScores(
            target=None
            if judge is None
            else Proportion.of(judge(output, row.answer) for output, row in zip(outputs, rendered, strict=True)),
            empty=Proportion.of(is_empty(output) for output in outputs),
            degenerate=Proportion.of(is_degenerate(output) for output in outputs),
            exact_match=Proportion.of(matches) if matches else None,
            bits_per_byte=bits_per_byte(model, tokenizer, rendered, batch_size),
            outputs=outputs,
        )

    clean = score(dataset)
    if trigger is None:
        return Evaluation(clean)
    triggered_rows = dataset.map(Poison(trigger, seed=seed), with_indices=True, desc="Triggering")
    with trigger.active(model):
        return Evaluation(clean, score(triggered_rows))
