"""What a purification cost, measured on clean rows that it does not see, and on running text."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoding import encode_prompt
from ..data.rows import add_empty_answers, has_prompts, render
from ..evaluation.harness import Evaluation, evaluate_model
from ..evaluation.own_text import can_write_prompts
from ..evaluation.retention import Retention, RetentionReference, retention_reference
from ..training.recorder import context_length


# A tenth of the rows is held out. Of fewer than 40 rows, the training needs all.
MIN_ROWS, MIN_HELD_OUT, MAX_HELD_OUT = 40, 8, 50
# Longer answers hardly ever equal the right one, and take long to generate.
MAX_ANSWER_TOKENS = 32
# Windows of running text on which it is measured what a purification forgets.
RETENTION_WINDOWS = 16


def hold_out(dataset: Dataset | IterableDataset, seed: int) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """
    Hold out a tenth of the clean rows: at least 8 and at most 50. Rows that are equal stay together.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The clean rows.
        seed (`int`):
            Seed for the choice.

    Returns:
        `tuple`: The rows to train on and the held-out rows, both in their order. Nothing is held out (`None`) of a
        stream, of fewer than 40 rows, and if there are not enough different rows.
    """
    if not isinstance(dataset, Dataset) or len(dataset) < MIN_ROWS:
        return dataset, None
    equal: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(dataset.with_format(None)):
        equal[json.dumps(row, sort_keys=True, default=repr)].append(number)
    groups = list(equal.values())
    Random(f"hold out-{seed}").shuffle(groups)
    size = min(MAX_HELD_OUT, max(MIN_HELD_OUT, len(dataset) // 10))
    held_out: list[int] = []
    for numbers in groups:
        if len(held_out) + len(numbers) <= size:
            held_out += numbers
    if len(held_out) < MIN_HELD_OUT:
        return dataset, None
    rest = sorted(set(range(len(dataset))) - set(held_out))
    return dataset.select(rest), dataset.select(sorted(held_out))


def reference_of(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    text: Sequence[str] | Dataset | None,
    seed: int,
    batch_size: int,
) -> RetentionReference:
    """
    Record what the suspect says, as [`retention_reference`] does, on few windows of running text. What a suspect
    writes that was never taught to write would be noise, and is left out.
    """
    rows = add_empty_answers(rows)
    cannot_write = text is None and has_prompts(rows.column_names) and not can_write_prompts(model, tokenizer, rows)
    windows = 0 if cannot_write else RETENTION_WINDOWS
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "max_windows": windows}
    return retention_reference(model, tokenizer, rows, text, **options)


def evaluate_held_out(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    batch_size: int,
    retention: Retention | None = None,
) -> Evaluation | None:
    """
    Score the answers to held-out rows. Prompts that do not fit into the model's context are left out.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        rows (`Dataset`):
            The held-out rows.
        batch_size (`int`):
            Number of prompts per batch.
        retention ([`Retention`], *optional*):
            What the model has kept of the suspect.

    Returns:
        [`Evaluation`]: Without right answers if one has more than 32 tokens. `None` if the rows have no prompts, or
        none that fits.
    """
    rows = add_empty_answers(rows)
    if not has_prompts(rows.column_names):
        return None
    rendered = [render(row, tokenizer, index) for index, row in enumerate(rows)]
    longest = max(len(tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in rendered)
    is_short = 0 < longest <= MAX_ANSWER_TOKENS
    # One token more shows whether the model ends its answer.
    new_tokens = longest + 1 if is_short else MAX_ANSWER_TOKENS
    room = (context_length(model) or math.inf) - new_tokens
    numbers = [number for number, row in enumerate(rendered) if 0 < len(encode_prompt(row, tokenizer)) <= room]
    if not numbers:
        return None
    evaluation = evaluate_model(
        model, tokenizer, rows.select(numbers), max_new_tokens=new_tokens, batch_size=batch_size
    )
    clean = evaluation.clean if is_short else replace(evaluation.clean, exact_match=None, exact_matches=[])
    return replace(evaluation, clean=clean, retention=retention)
