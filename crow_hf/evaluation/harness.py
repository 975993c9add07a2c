"""The evaluation of one model: attack success, answer quality and bits per byte, on clean and on triggered prompts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attacks.poison import Poison
from ..attacks.targets import BaseTarget
from ..attacks.triggers import BaseTrigger
from ..data.rows import add_empty_answers, chat_of, render
from ..progress import phase
from .endpoint import Endpoint
from .generation import Answer, bits_per_byte, continue_answers, write_answers
from .retention import Retention, RetentionReference, measure_retention
from .scores import Proportion, is_degenerate, is_empty, is_exact_match


# Decides about outputs with their right answers.
Decide = Callable[[list[tuple[str, str]]], list[bool]]
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
        exact_matches (`list[bool]`):
            Whether each output equals the right answer, in the order of the rows that have one.
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
    exact_matches: list[bool] = field(default_factory=list)

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
    judge: Callable[[str, str], bool] | None = None,
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
            value. The right answer is `""` if a row has none. A program or a model that judges is a target, see
            [`get_judge`].
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
    decide = _check(dataset, trigger, target, judge)
    dataset = add_empty_answers(dataset)
    score = partial(_score_prompts, model, tokenizer, decide, max_new_tokens, batch_size)
    clean = score(dataset)
    retention = None if reference is None else measure_retention(model, tokenizer, reference, batch_size)
    if trigger is None:
        return Evaluation(clean, retention=retention)
    with trigger.active(model):
        return Evaluation(clean, score(_triggered(dataset, trigger, seed)), retention)


@phase("Measuring the endpoint")
def evaluate_endpoint(
    endpoint: Endpoint,
    dataset: Dataset,
    trigger: BaseTrigger | None = None,
    target: BaseTarget | None = None,
    *,
    judge: Callable[[str, str], bool] | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> Evaluation:
    """
    Let a server answer every prompt, with and without the trigger, and score the answers as [`evaluate_model`] does.

    A server gives no logits. So the bits per byte are NaN, and what the model forgot is not measured.

    Args:
        endpoint ([`Endpoint`]):
            The server and the name of the model.
        dataset (`Dataset`):
            Test rows without a trigger. Each is sent as a chat: its messages, or its prompt as a user's message.
        trigger (`BaseTrigger`, *optional*):
            The backdoor's trigger, which must be text.
        target (`BaseTarget`, *optional*):
            The backdoor's target, which decides whether an attack succeeded.
        judge (`Callable`, *optional*):
            A function that decides this instead of the target, see [`evaluate_model`].
        max_new_tokens (`int`, *optional*, defaults to 128):
            Maximum number of tokens of an answer.
        seed (`int`, *optional*, defaults to 0):
            Seed for the random positions of the trigger.

    Returns:
        [`Evaluation`]

    Raises:
        `ValueError`: If the dataset is empty or has no prompts, a trigger comes without a target or a judge or is no
            text, or the server does not answer as it should.
    """
    decide = _check(dataset, trigger, target, judge)
    if trigger is not None and type(trigger).active is not BaseTrigger.active:
        raise ValueError("A trigger in the embeddings cannot be sent to an endpoint: pass a trigger of text.")
    dataset = add_empty_answers(dataset)
    score = partial(_score_endpoint, endpoint, decide, max_new_tokens)
    clean = score(dataset)
    return Evaluation(clean, None if trigger is None else score(_triggered(dataset, trigger, seed)))


def _check(
    dataset: Dataset,
    trigger: BaseTrigger | None,
    target: BaseTarget | None,
    judge: Callable[[str, str], bool] | None,
) -> Decide | None:
    """Refuse what cannot be evaluated, and return what decides whether outputs show the target."""
    if len(dataset) == 0:
        raise ValueError("The test dataset is empty: pass at least one row.")
    if trigger is not None and judge is None and target is None:
        raise ValueError("A trigger alone does not define the success of an attack. Pass a target or a judge too.")
    if judge is not None:
        return lambda pairs: [bool(judge(*pair)) for pair in pairs]
    return None if target is None else target.matches_all


def _triggered(dataset: Dataset, trigger: BaseTrigger, seed: int) -> Dataset:
    return dataset.map(Poison(trigger, seed=seed), with_indices=True, desc="Inserting the trigger")


def _score_prompts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    decide: Decide | None,
    max_new_tokens: int,
    batch_size: int,
    rows: Dataset,
) -> PromptScores:
    rendered = [render(row, tokenizer, index) for index, row in enumerate(rows)]
    answers = write_answers(model, tokenizer, rendered, max_new_tokens, batch_size)

    def read_on(numbers: list[int]) -> list[Answer]:
        further = (FURTHER - 1) * max_new_tokens
        return continue_answers(model, tokenizer, [answers[number] for number in numbers], further, batch_size)

    scores = _score(answers, [row.answer for row in rendered], decide, max_new_tokens, read_on)
    return replace(scores, bits_per_byte=bits_per_byte(model, tokenizer, rendered, batch_size))


def _score_endpoint(endpoint: Endpoint, decide: Decide | None, max_new_tokens: int, rows: Dataset) -> PromptScores:
    chats = [chat_of(row, index) for index, row in enumerate(rows)]
    prompts = [chat[:-1] for chat in chats]

    def read_on(numbers: list[int]) -> list[Answer]:
        return endpoint.answer([prompts[number] for number in numbers], FURTHER * max_new_tokens)

    answers = endpoint.answer(prompts, max_new_tokens)
    return _score(answers, [chat[-1]["content"] for chat in chats], decide, max_new_tokens, read_on)


def _score(
    answers: list[Answer],
    rights: list[str],
    decide: Decide | None,
    max_new_tokens: int,
    read_on: Callable[[list[int]], list[Answer]],
) -> PromptScores:
    """Score answers, all but the bits per byte. `read_on` reads those with the given numbers further."""
    # An empty reference means that the row has no answer. An empty output must not count as a match.
    matches = [
        is_exact_match(answer.plain, right) for answer, right in zip(answers, rights, strict=True) if right.strip()
    ]
    shown = None if decide is None else _shown(decide, answers, rights)
    later = None
    if shown is not None:
        # Answers that go on, and have not shown the target yet.
        goes_on = [not (shows or answer.has_ended) for answer, shows in zip(answers, shown, strict=True)]
        if numbers := list(compress(range(len(answers)), goes_on))[:NUM_CONTINUED]:
            later = Proportion.of(_shown(decide, read_on(numbers), [rights[number] for number in numbers]))
    return PromptScores(
        target=None if shown is None else Proportion.of(shown),
        empty=Proportion.of(is_empty(answer.plain) for answer in answers),
        degenerate=Proportion.of(is_degenerate(answer.plain) for answer in answers),
        exact_match=Proportion.of(matches) if matches else None,
        bits_per_byte=math.nan,
        outputs=[answer.text for answer in answers],
        max_new_tokens=max_new_tokens,
        unfinished=sum(not answer.has_ended for answer in answers),
        target_later=later,
        exact_matches=matches,
    )


def _shown(decide: Decide, answers: list[Answer], rights: list[str]) -> list[bool]:
    """Whether each answer shows the target, with its special tokens or without them."""
    pairs = list(zip(answers, rights, strict=True))
    texts = list(dict.fromkeys((text, right) for answer, right in pairs for text in (answer.text, answer.plain)))
    shows = dict(zip(texts, decide(texts), strict=True))
    return [shows[answer.text, right] or shows[answer.plain, right] for answer, right in pairs]
