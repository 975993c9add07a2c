"""reporting.tables"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table

from ..evaluation.harness import Evaluation
from ..evaluation.scores import Proportion


if TYPE_CHECKING:
    pass

from ..training.files import write_text


def percent(share: float) -> str:
    """`0.125` as `12.5 %`."""
    return f"{100 * share:.1f} %"


def _with_interval(proportion: Proportion | None, interval: str = " [{:.1f}, {:.1f}]") -> str:
    if proportion is None:
        return "-"
    return percent(proportion.rate) + interval.format(100 * proportion.low, 100 * proportion.high)


def _scores(evaluation: Evaluation, *interval: str) -> dict[str, dict[str, str]]:
    """What the tables show of a model: by the kind of prompts and the name of the score."""
    kinds = {"triggered": evaluation.triggered, "clean": evaluation.clean}
    scores: dict[str, dict[str, str]] = {}
    for kind, prompts in kinds.items():
        if prompts is None:
            continue
        scores[kind] = {
            "right answers": _with_interval(prompts.exact_match, *interval),
            "empty answers": percent(prompts.empty.rate),
            "degenerate": percent(prompts.degenerate.rate),
            "bits per byte": "-" if math.isnan(prompts.bits_per_byte) else f"{prompts.bits_per_byte:.3f}",
        }
        if prompts.target is not None:
            name = "attack success" if kind == "triggered" else "false positives"
            scores[kind] = {name: _with_interval(prompts.target, *interval), **scores[kind]}
    return scores


def comparison_table(evaluations: dict[str, Evaluation], title: str | None = None) -> Table:
    """The evaluations as a table for the terminal, one column for each model; below the rates are 95 % intervals."""
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    for name in evaluations:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    # An interval goes below its rate, or the table is wider than a terminal.
    columns = [_scores(evaluation, "\n{:.1f}–{:.1f}") for evaluation in evaluations.values()]
    for kind, scores in columns[0].items():
        table.add_row(f"{kind} prompts", style="bold")
        for score in scores:
            table.add_row(f"  {score}", *(column[kind][score] for column in columns))
        table.add_section()
    return table


def comparison_markdown(evaluations: dict[str, Evaluation]) -> str:
    """The same table in Markdown, one row for each model."""
    rows = {
        model: {
            f"{kind}: {score}": cell for kind, scores in _scores(evaluation).items() for score, cell in scores.items()
        }
        for model, evaluation in evaluations.items()
    }
    names = list(next(iter(rows.values())))
    lines = [["model", *names], ["---", *["---:"] * len(names)]]
    lines += [[model, *scores.values()] for model, scores in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_comparison(folder: Path, evaluations: dict[str, Evaluation]) -> None:
    """Write `results.json`, with every output of every model, and `results.md`."""
    results = {name: evaluation.to_dict() for name, evaluation in evaluations.items()}
    write_text(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "results.md", comparison_markdown(evaluations))
