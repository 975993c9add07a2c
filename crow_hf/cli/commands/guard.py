"""`crow-hf guard`: find the prompts that lead a model where no clean prompt does."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ...data.load import load_rows
from ...data.rows import add_empty_answers, prompt_of
from ...data.visible import printable
from ...detection.guard import ConsistencyGuard
from ...evaluation.scores import Proportion
from ...files import is_unused, write_text
from ...progress import phase
from ...training.loading import load_causal_lm, load_tokenizer
from ..options import GuardArguments


# Alarms that are printed, the highest scores first.
NUM_SHOWN = 10


def run(arguments: GuardArguments) -> int:
    folder = Path(arguments.guard_dir)
    is_new = arguments.dataset is not None
    _check(arguments, folder)
    clean = load_rows(arguments.dataset, arguments.split) if is_new else None
    rows = None if arguments.inputs is None else add_empty_answers(load_rows(arguments.inputs, arguments.split))
    tokenizer = load_tokenizer(arguments.model)
    model = load_causal_lm(arguments.model, device_map="auto")
    if clean is None:
        guard = ConsistencyGuard.from_pretrained(folder, model, tokenizer)
    else:
        with phase("Fitting the guard"):
            rate, size = arguments.false_alarm_rate, arguments.batch_size
            guard = ConsistencyGuard.fit(model, clean, tokenizer, false_alarm_rate=rate, batch_size=size)
        guard.save_pretrained(folder)
        print(f"The guard is in {printable(str(folder))}. {_share(guard.false_alarms)}")
    if rows is None:
        return 0
    with phase("Scoring the prompts"):
        scores = guard.score(rows, arguments.batch_size).tolist()
    judged = [
        {"prompt": prompt_of(row, index), "score": score, "is_alarm": not score <= guard.threshold}
        for index, (row, score) in enumerate(zip(rows, scores, strict=True))
    ]
    if arguments.output is not None:
        write_text(Path(arguments.output), "".join(f"{json.dumps(each)}\n" for each in judged))
    alarms = sorted((each for each in judged if each["is_alarm"]), key=lambda each: -each["score"])
    table = Table("score", Column("prompt", overflow="fold"), box=None, pad_edge=False)
    for each in alarms[:NUM_SHOWN]:
        table.add_row(f"{each['score']:.3f}", Text(printable(each["prompt"])))
    if alarms:
        Console().print(table)
    print(f"GUARD: {len(alarms)} of {len(judged)} prompts are alarms (scores above {guard.threshold:.3f}).")
    return int(bool(alarms))


def _share(alarms: Proportion) -> str:
    interval = f"95 % interval {100 * alarms.low:.1f} to {100 * alarms.high:.1f} %"
    counts = f"{alarms.hits} of {alarms.total} clean prompts are alarms"
    return f"{counts}, each judged by the others ({100 * alarms.rate:.1f} %, {interval})."


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
    if arguments.output is not None and Path(arguments.output).exists():
        raise ValueError(f"{arguments.output} exists: choose another --output, or delete it.")
