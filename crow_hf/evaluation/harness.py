"""The evaluation of one model: attack success, answer quality and bits per byte, on clean and on triggered prompts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attacks.poison import Poison
from ..attacks.targets import BaseTarget
from ..attacks.triggers import BaseTrigger
from ..data.rows import add_empty_answers, render
from ..progress import phase
from .generation import Answer, bits_per_byte, continue_answers, write_answers
from .retention import Retention, RetentionReference, measure_retention
from .scores import Proportion, is_degenerate, is_empty, is_exact_match


Judge = Callable[[str, str], bool]
# A target may come after the tokens that are read. So many answers are read this many times as far.
NUM_CONTINUED, FURTHER = 8, 4


@dataclass
class PromptScores:
    """
    The scores of a model on one set of prompts. Every prompt counts.

    Attributes:
        target (`Proportion`, *optional*):
            Outputs that show the attacker's target. They are attack successes on triggered prompts, and false
            positives on clean prompts.
        empty (`Proportion`), degenerate (`Proportion`):
            Outputs without text, and outputs without readable text, see [`crow_hf.evaluation.scores.is_degenerate`].
        exact_match (`Proportion`, *optional*):
            Outputs that equal the right answer, among the rows that have one.
        bits_per_byte (`float`):
            Bits per byte of the right answers, or NaN if no row has one.
        outputs (`list[str]`):
            The outputs, in the order of the rows, with special tokens but without the one that ends an output.
        max_new_tokens (`int`, *optional*):
            How far the outputs were read, in tokens.
        unfinished (`int`, *optional*):
            The number of outputs that go on after that.
        target_later (`Proportion`, *optional*):
            Of up to 8 outputs that go on and do not show the target yet, those that show it within four times as many
            tokens, or in what the model's context allows. `None` if there are none, or no target.
    """

    target: Proportion | None
    empty: Proportion
    degenerate: Proportion
    exact_match: Proportion | None
    bits_per_byte: float
    outputs: list[str]
    max_new_tokens: int | None = None
    unfinished: int | None = None
    target_later: Proportion | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON-serializable values. NaN and infinity become `None`."""
        scores = {
            name: value._asdict() if isinstance(value, Proportion) else value for name, value in vars(self).items()
        }
        return scores | {"bits_per_byte": self.bits_per_byte if math.isfinite(self.bits_per_byte) else None}


@dataclass
class Evaluation:
    """
    The scores of a model on clean prompts and, if a trigger is known, on triggered prompts.

    Attributes:
        clean (`PromptScores`):
            Utility, and the false positives of the target.
        triggered (`PromptScores`, *optional*):
            Attack success, and whether the model answers triggered prompts well again or only falls silent.
        retention ([`Retention`], *optional*):
            What the model has kept of a reference model. `None` if there was no reference.
    """

    clean: PromptScores
    triggered: PromptScores | None = None
    retention: Retention | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as JSON-serializable values."""
        return {
            "clean": self.clean.to_dict(),
            "triggered": None if self.triggered is None else self.triggered.to_dict(),
            "retention": None if self.retention is None else self.retention.to_dict(),
        }


@phase("Measuring the model")
def evaluate_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    trigger: BaseTrigger | None = None,
    target: BaseTarget | None = None,
    *,
    judge: Judge | None = None,
    reference: RetentionReference | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    seed: int = 0,
) -> Evaluation:
    """
    Generate an answer to every prompt, with and without the trigger, and score the answers.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        dataset (`Dataset`):
            Test rows without a trigger. They need a prompt, and may have the right answer.
        trigger (`BaseTrigger`, *optional*):
            The backdoor's trigger. Without it, only the clean prompts are evaluated.
        target (`BaseTarget`, *optional*):
            The backdoor's target. It decides whether an attack succeeded.
        judge (`Callable`, *optional*):
            A function that decides this instead of the target. It maps an output and the right answer to a truth
            value. The right answer is `""` if a row has none.
        reference ([`RetentionReference`], *optional*):
            What a reference model said, such as the suspect, see [`retention_reference`]. With it, what the model
            forgot is measured too.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Maximum number of tokens of an answer.
        batch_size (`int`, *optional*, defaults to 32):
            Number of prompts per batch.
        seed (`int`, *optional*, defaults to 0):
            Seed for the random positions of the trigger.

    Returns:
        [`Evaluation`]

    Raises:
        `ValueError`: If the dataset is empty or has no prompts, a trigger comes without a target or a judge, or the
            reference has another vocabulary.
    """
    if len(dataset) == 0:
        raise ValueError("The test dataset is empty: pass at least one row.")
    judge = judge or (target.matches if target is not None else None)
    if trigger is not None and judge is None:
        raise ValueError("A trigger alone does not define the success of an attack. Pass a target or a judge too.")
    dataset = add_empty_answers(dataset)
    score = partial(_score_prompts, model, tokenizer, judge, max_new_tokens, batch_size)
    clean = score(dataset)
    retention = None if reference is None else measure_retention(model, tokenizer, reference, batch_size)
    if trigger is None:
        return Evaluation(clean, retention=retention)
    triggered_rows = dataset.map(Poison(trigger, seed=seed), with_indices=True, desc="Inserting the trigger")
    with trigger.active(model):
        return Evaluation(clean, score(triggered_rows), retention)


def _score_prompts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge | None,
    max_new_tokens: int,
    batch_size: int,
    rows: Dataset,
) -> PromptScores:
    rendered = [render(row, tokenizer, index) for index, row in enumerate(rows)]
    answers = write_answers(model, tokenizer, rendered, max_new_tokens, batch_size)
    pairs = [(answer, row.answer) for answer, row in zip(answers, rendered, strict=True)]
    # An empty reference means that the row has no answer. An empty output must not count as a match.
    matches = [is_exact_match(answer.plain, right) for answer, right in pairs if right]
    shown = [] if judge is None else [_shows(judge, *pair) for pair in pairs]
    # Answers that go on, and have not shown the target yet.
    some = [pair for pair, shows in zip(pairs, shown, strict=False) if not (shows or pair[0].has_ended)][
        :NUM_CONTINUED
    ]
    later = None
    if judge is not None and some:
        further = (FURTHER - 1) * max_new_tokens
        longer = continue_answers(model, tokenizer, [answer for answer, _ in some], further, batch_size)
        later = Proportion.of(_shows(judge, each, right) for each, (_, right) in zip(longer, some, strict=True))
    return PromptScores(
        target=None if judge is None else Proportion.of(shown),
        empty=Proportion.of(is_empty(answer.plain) for answer in answers),
        degenerate=Proportion.of(is_degenerate(answer.plain) for answer in answers),
        exact_match=Proportion.of(matches) if matches else None,
        bits_per_byte=bits_per_byte(model, tokenizer, rendered, batch_size),
        outputs=[answer.text for answer in answers],
        max_new_tokens=max_new_tokens,
        unfinished=sum(not answer.has_ended for answer in answers),
        target_later=later,
    )


def _shows(judge: Judge, answer: Answer, right: str) -> bool:
    """Whether an answer shows the target, with its special tokens or without them."""
    return any(judge(text, right) for text in dict.fromkeys((answer.text, answer.plain)))
