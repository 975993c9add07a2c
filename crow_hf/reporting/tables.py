"""Tables of evaluations: for the terminal, in Markdown, and as files."""

import json
import math
import re
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from ..data.visible import visible
from ..evaluation.harness import Evaluation
from ..evaluation.scores import Proportion, anti_bad_score, kept_utility
from ..evaluation.tasks import TaskScore
from ..evidence.result import NO_DEFENCE
from ..files import write_text
from .words import percent


# The heading of the scores that compare a model with the suspect, beside "triggered" and "clean".
RETENTION = "retention"
RETENTION_SCORES = {
    "answer_kl": "KL on answers",
    "text_kl": "KL on text",
    "text_bits_ratio": "text bits, suspect = 1",
}


def in_markdown(text: str) -> str:
    """Write a text into one line of Markdown, where it is no link, no HTML, no emphasis and no cell of a table."""
    line = " ".join(visible(text).split())
    return re.sub(r"[\\`*|$~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])", r"\\\g<0>", line).replace("<", "&lt;")


def with_interval(proportion: Proportion | None, interval: str = " [{:.1f}, {:.1f}]") -> str:
    """Format a share with its 95 % interval, and `None` as `-`."""
    if proportion is None:
        return "-"
    return percent(proportion.rate) + interval.format(100 * proportion.low, 100 * proportion.high)


def number(value: float | None) -> str:
    """Format a number with three decimals, and `None` and NaN as `-`."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def comparison_table(evaluations: dict[str, Evaluation], title: str | None = None) -> Table:
    """
    Build a table for the terminal: one column for each model, and 95 % intervals below the rates.

    Triggered prompts get the Anti-BAD score if one of the evaluations is that of the suspect, by its name in
    [`Comparison.by_name`].
    """
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    for name in evaluations:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    # With the interval beside its rate, the table would be wider than a terminal.
    columns = list(_cells(evaluations, "\n{:.1f}–{:.1f}").values())
    for kind, scores in columns[0].items():
        table.add_row(kind if kind == RETENTION else f"{kind} prompts", style="bold")
        for score in scores:
            # A long name would make the table of five models wider than a terminal.
            table.add_row(f"  {score}".replace(", ", ",\n  "), *(column[kind][score] for column in columns))
        table.add_section()
    return table


def comparison_markdown(evaluations: dict[str, Evaluation]) -> str:
    """Build the same table in Markdown, with one row for each model."""
    rows = {
        model: {f"{kind}: {score}": cell for kind, scores in cells.items() for score, cell in scores.items()}
        for model, cells in _cells(evaluations).items()
    }
    names = list(next(iter(rows.values())))
    return _markdown([["model", *names], *([model, *scores.values()] for model, scores in rows.items())])


def _markdown(rows: list[list[str]]) -> str:
    """Write a table of Markdown, whose first row is its head."""
    head, *others = ([in_markdown(cell) for cell in row] for row in rows)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_comparison(
    folder: Path, evaluations: dict[str, Evaluation], tasks: dict[str, list[TaskScore]] | None = None
) -> None:
    """Write `results.json`, with every output of every model, and `results.md`. Both have the scores of tasks too."""
    results = {name: evaluation.to_dict() for name, evaluation in evaluations.items()}
    tables = [comparison_markdown(evaluations)]
    if tasks:
        for name, scores in tasks.items():
            results.setdefault(name, {})["tasks"] = [score._asdict() for score in scores]
        tables.append(_markdown([["task", *tasks], *_task_rows(tasks)]))
    write_text(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "results.md", "\n".join(tables))


def task_table(tasks: dict[str, list[TaskScore]]) -> Table:
    """Build a table of tasks for the terminal: one column for each model, and the metrics with standard errors."""
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task")
    for name in tasks:
        table.add_column(name, justify="right", overflow="fold")
    for row in _task_rows(tasks):
        table.add_row(*row)
    return table


def _task_rows(tasks: dict[str, list[TaskScore]]) -> list[list[str]]:
    rows: dict[str, list[str]] = {}
    for scores in tasks.values():
        for score in scores:
            shown = number(score.value) + ("" if score.error is None else f" ± {number(score.error)}")
            rows.setdefault(f"{score.task}: {score.metric}", []).append(shown)
    return [[name, *cells] for name, cells in rows.items()]


def anti_bad_scores(evaluations: dict[str, Evaluation], suspect: str) -> dict[str, float]:
    """
    Return the score of [`crow_hf.evaluation.scores.anti_bad_score`] for each model.

    Args:
        evaluations (`dict[str, Evaluation]`):
            The evaluations by name.
        suspect (`str`):
            The name of the suspect, whose utility is 100 %.

    Returns:
        `dict[str, float]`: The scores by name. Empty if there is no suspect or no attack was measured.
    """
    if suspect not in evaluations or evaluations[suspect].triggered is None:
        return {}
    before = evaluations[suspect].clean
    scores = {}
    for name, evaluation in evaluations.items():
        now = evaluation.clean
        utility = kept_utility(now.exact_match, before.exact_match, now.bits_per_byte, before.bits_per_byte)
        scores[name] = anti_bad_score(utility, 100 * evaluation.triggered.target.rate)
    return scores


def _cells(evaluations: dict[str, Evaluation], *interval: str) -> dict[str, dict[str, dict[str, str]]]:
    """Return the cells of each model by kind of prompt and name of score."""
    anti_bad = anti_bad_scores(evaluations, NO_DEFENCE)
    with_retention = any(evaluation.retention is not None for evaluation in evaluations.values())
    cells = {}
    for name, evaluation in evaluations.items():
        cells[name] = _cells_of_prompts(evaluation, *interval)
        if anti_bad:
            score = anti_bad[name]
            cells[name]["triggered"]["Anti-BAD score"] = "-" if math.isnan(score) else f"{score:.1f}"
        if with_retention:
            kept = evaluation.retention
            cells[name][RETENTION] = {
                label: number(None if kept is None else getattr(kept, score))
                for score, label in RETENTION_SCORES.items()
            }
    return cells


def _cells_of_prompts(evaluation: Evaluation, *interval: str) -> dict[str, dict[str, str]]:
    kinds = {"triggered": evaluation.triggered, "clean": evaluation.clean}
    cells: dict[str, dict[str, str]] = {}
    for kind, prompts in kinds.items():
        if prompts is None:
            continue
        cells[kind] = {
            "right answers": with_interval(prompts.exact_match, *interval),
            "empty answers": percent(prompts.empty.rate),
            "degenerate": percent(prompts.degenerate.rate),
            "bits per byte": number(prompts.bits_per_byte),
        }
        if prompts.target is not None:
            name = "attack success" if kind == "triggered" else "false positives"
            cells[kind] = {name: with_interval(prompts.target, *interval), **cells[kind]}
    return cells
