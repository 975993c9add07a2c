"""`crow-hf guard`: find the prompts that lead a model where no clean prompt does."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ...data.load import load_rows
from ...data.rows import add_empty_answers, prompt_of
from ...data.visible import printable
from ...detection.completions import has_tokens_of
from ...detection.guard import ConsistencyGuard
from ...files import is_unused, write_text
from ...progress import phase
from ...reporting.tables import with_interval
from ...training.loading import load_causal_lm, load_tokenizer
from ..options import GuardArguments
from ..shared import check_new_file


# Alarms that are printed, the highest scores first.
NUM_SHOWN = 10


def run(arguments: GuardArguments) -> int:
    folder = Path(arguments.guard_dir)
    _check(arguments, folder)
    clean = None if arguments.dataset is None else load_rows(arguments.dataset, arguments.split)
    rows = None if arguments.inputs is None else add_empty_answers(load_rows(arguments.inputs, arguments.split))
    tokenizer = load_tokenizer(arguments.model)
    reference = None
    if arguments.reference is not None:
        if not has_tokens_of(load_tokenizer(arguments.reference), tokenizer):
            raise ValueError(
                f"{arguments.reference} lacks tokens of the model: pass a reference with the same tokens."
            )
        reference = load_causal_lm(arguments.reference, device_map="auto")
    model = load_causal_lm(arguments.model, device_map="auto")
    if clean is None:
        guard = ConsistencyGuard.from_pretrained(folder, model, tokenizer, reference)
    else:
        with phase("Fitting the guard"):
            rate, size = arguments.false_alarm_rate, arguments.batch_size
            guard = ConsistencyGuard.fit(
                model, clean, tokenizer, false_alarm_rate=rate, reference=reference, batch_size=size
            )
        guard.save_pretrained(folder)
        some = guard.false_alarms
        share = with_interval(some, ", 95 % interval {:.1f} to {:.1f} %")
        by_others = ", each judged by the others" if reference is None else ""
        alarms = f"{some.hits} of {some.total} clean prompts are alarms{by_others} ({share})."
        print(f"The guard is in {printable(str(folder))}. {alarms}")
    if rows is None:
        return 0
    with phase("Scoring the prompts"):
        # A score takes the first token of an answer anyway.
        answers = guard.generate(rows, max_new_tokens=1, batch_size=arguments.batch_size)
    judged: list[dict[str, Any]] = [
        {"prompt": prompt_of(row, index), "score": answer.score, "is_alarm": answer.is_alarm}
        for index, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]
    if arguments.output is not None:
        write_text(Path(arguments.output), "".join(f"{json.dumps(each)}\n" for each in judged))
    found = sorted((each for each in judged if each["is_alarm"]), key=lambda each: -each["score"])
    table = Table("score", Column("prompt", overflow="fold"), box=None, pad_edge=False)
    for each in found[:NUM_SHOWN]:
        table.add_row(f"{each['score']:.3f}", Text(printable(each["prompt"])))
    if found:
        Console().print(table)
    print(f"GUARD: {len(found)} of {len(judged)} prompts are alarms (scores above {guard.threshold:.3f}).")
    return int(bool(found))


def _check(arguments: GuardArguments, folder: Path) -> None:
    """Refuse what would replace something, and what would do nothing, before the model is loaded."""
    if arguments.dataset is None and arguments.inputs is None:
        raise ValueError("There is nothing to do: pass --dataset to fit a guard, --inputs to check prompts, or both.")
    if arguments.dataset is None and is_unused(folder):
        raise ValueError(f"There is no guard in {folder}: pass --dataset to fit one.")
    if arguments.dataset is not None and not is_unused(folder):
        raise ValueError(
            f"{folder} is not empty: choose another --guard_dir, or leave out --dataset to use its guard."
        )
    check_new_file(arguments.output)
