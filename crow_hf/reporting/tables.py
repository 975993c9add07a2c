"""Tables of evaluations: for the terminal, in Markdown, and as files."""

import json
import math
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from ..evaluation.harness import Evaluation
from ..evaluation.scores import Proportion
from ..training.files import write_text


def percent(share: float) -> str:
    """Format a share: `0.125` becomes `12.5 %`."""
    return f"{100 * share:.1f} %"


def with_interval(proportion: Proportion | None, interval: str = " [{:.1f}, {:.1f}]") -> str:
    """Format a share with its 95 % interval, and `None` as `-`."""
    if proportion is None:
        return "-"
    return percent(proportion.rate) + interval.format(100 * proportion.low, 100 * proportion.high)


def comparison_table(evaluations: dict[str, Evaluation], title: str | None = None) -> Table:
    """Build a table for the terminal: one column for each model, and 95 % intervals below the rates."""
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    for name in evaluations:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    # With the interval beside its rate, the table would be wider than a terminal.
    columns = [_cells(evaluation, "\n{:.1f}–{:.1f}") for evaluation in evaluations.values()]
    for kind, scores in columns[0].items():
        table.add_row(f"{kind} prompts", style="bold")
        for score in scores:
            table.add_row(f"  {score}", *(column[kind][score] for column in columns))
        table.add_section()
    return table


def comparison_markdown(evaluations: dict[str, Evaluation]) -> str:
    """Build the same table in Markdown, with one row for each model."""
    rows = {
        model: {
            f"{kind}: {score}": cell for kind, scores in _cells(evaluation).items() for score, cell in scores.items()
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


def _cells(evaluation: Evaluation, *interval: str) -> dict[str, dict[str, str]]:
    """Return the cells of a model by kind of prompt and name of score."""
    kinds = {"triggered": evaluation.triggered, "clean": evaluation.clean}
    cells: dict[str, dict[str, str]] = {}
    for kind, prompts in kinds.items():
        if prompts is None:
            continue
        cells[kind] = {
            "right answers": with_interval(prompts.exact_match, *interval),
            "empty answers": percent(prompts.empty.rate),
            "degenerate": percent(prompts.degenerate.rate),
            "bits per byte": "-" if math.isnan(prompts.bits_per_byte) else f"{prompts.bits_per_byte:.3f}",
        }
        if prompts.target is not None:
            name = "attack success" if kind == "triggered" else "false positives"
            cells[kind] = {name: with_interval(prompts.target, *interval), **cells[kind]}
    return cells
