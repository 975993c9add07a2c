"""The tables of the arena: means over seeds with 95 % intervals.

Each seed draws new rows, a new attacker and a new defender. The prompts of one seed are all answered by one model, so
they are not independent. The interval of a mean is therefore Student's t over the seeds. That interval has no width if
all seeds agree, for example at 0 %, and it does not exist for one seed. The interval of a share is therefore never
narrower than Wilson's over the prompts of all seeds together, which would hold for independent prompts.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import correlation, fmean, stdev
from typing import Any, NamedTuple

from transformers.utils import logging

from ..evaluation.scores import Proportion, t_quantile
from ..reporting.tables import RETENTION_SCORES
from .attacks import ATTACKS
from .defences import CANARIES, CONTROL, METHODS


logger = logging.get_logger(__name__)

Row = dict[str, Any]

SHARES = (
    "attack_success",
    "false_positives",
    "exact_match_triggered",
    "exact_match_clean",
    "mute_triggered",
    "mute_clean",
)
# Right answers to clean prompts with the thoughts of another prompt, of subjects that reason.
OTHER_THOUGHTS = "exact_match_other_thoughts"
FIGURES = ("bits_per_byte_triggered", "bits_per_byte_clean", "steps", "seconds")
# What a model has kept of the suspect, by its head in the tables. Rows of older versions do not have it.
KEPT = {name: RETENTION_SCORES[name] for name in ("text_bits_ratio", "answer_kl")}


class Estimate(NamedTuple):
    """
    A mean over seeds with its 95 % interval.

    Attributes:
        mean (`float`):
            The mean.
        low (`float`), high (`float`):
            The bounds of the interval. They are NaN for a single seed, unless the mean is that of a share.
    """

    mean: float
    low: float
    high: float


def read_result(path: Path) -> Row | None:
    """Read the row of a run. An empty or cut file has none, and is named in a warning."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        row = None
    needed = {"attack", "seed", "method", "num_clean"}
    if isinstance(row, dict) and needed <= row.keys() and row.keys() & {"error", "attack_success"}:
        return row
    logger.warning_once(f"{path} is empty or cut, so its run counts as not done.")
    return None


def load_results(output_dir: str | Path) -> list[Row]:
    """Load the rows of all runs of an arena, sorted by attack, method and seed in the order of the tables."""
    rows = (read_result(path) for path in Path(output_dir).glob("results/*/*/*.json"))
    return sorted(
        filter(None, rows),
        key=lambda row: (_position(ATTACKS, row["attack"]), _position(METHODS, row["method"]), row["seed"]),
    )


def estimate(values: Sequence[float]) -> Estimate:
    """
    Estimate a mean, with its interval by Student's t.

    Args:
        values (`Sequence[float]`):
            One value for each seed.
    """
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def estimate_share(counts: Sequence[dict[str, int]]) -> Estimate:
    """
    Estimate the mean of a share. Each bound of its interval is the wider one of Student's t over the seeds and of
    Wilson's interval over all prompts together.

    Args:
        counts (`Sequence[dict]`):
            The keys `hits` and `total` for each seed.
    """
    mean, low, high = estimate([count["hits"] / count["total"] for count in counts])
    hits, total = (sum(count[name] for count in counts) for name in ("hits", "total"))
    pooled = Proportion.of([True] * hits + [False] * (total - hits))
    # If the second argument is NaN, min and max return the first.
    return Estimate(mean, max(0.0, min(pooled.low, low)), min(1.0, max(pooled.high, high)))


def summarize(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, Estimate | None]]]:
    """
    Estimate the mean of each score over the seeds.

    Args:
        rows (`Iterable[dict]`):
            The rows of [`load_results`]. Failed runs are left out.

    Returns:
        `dict`: An [`Estimate`] by attack, method and name of the score. It is `None` if no run has this score.
    """
    cells: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in _finished(rows):
        cells[row["attack"]][row["method"]].append(row)

    def estimated(runs: list[Row], name: str, estimator: Callable[[list], Estimate]) -> Estimate | None:
        values = [run[name] for run in runs if run.get(name) is not None]
        return estimator(values) if values else None

    return {
        attack: {
            method: {name: estimated(runs, name, estimate_share) for name in (*SHARES, OTHER_THOUGHTS)}
            | {name: estimated(runs, name, estimate) for name in FIGURES}
            for method, runs in methods.items()
        }
        for attack, methods in cells.items()
    }


def _methods_in_order(summary: dict[str, dict]) -> list[str]:
    """List the methods of a summary in the order of the tables."""
    names = dict.fromkeys(method for methods in summary.values() for method in methods)
    return sorted(names, key=lambda name: _position(METHODS, name))


def attack_success_rates(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return the mean attack success over the seeds by attack and method, both in the order of the tables."""
    summary = summarize(rows)
    methods = _methods_in_order(summary)
    return {
        attack: {method: cells[method]["attack_success"].mean for method in methods if method in cells}
        for attack, cells in summary.items()
    }


def results_markdown(rows: list[Row]) -> str:
    """
    Write the tables of an arena in Markdown: attack success by attack and method, the methods, every combination of
    attack and method, the canaries and the failed runs.

    Args:
        rows (`list[dict]`):
            The rows of [`load_results`].
    """
    if not any(_finished(rows)):
        return "No run of this arena has finished yet.\n" + _failures(rows)
    summary = summarize(rows)
    seeds = sorted({row["seed"] for row in rows})
    parts = [
        "# Arena\n",
        f"All numbers are means over the seeds {', '.join(map(str, seeds))}. Brackets hold 95 % intervals. They are "
        "Student's t over the seeds, and never narrower than Wilson's interval over the prompts of all seeds. With "
        "one seed, they are Wilson's intervals.\n",
        "## Attack success, %\n",
        _attack_success_table(summary),
        "## Methods\n",
        "Each line covers the attacks that the method ran on. Mute answers are empty or degenerate. "
        f"`minus {CONTROL}` is the difference in right answers to clean prompts. Bits per byte, steps and seconds are "
        f"relative to {CONTROL}. Both compare runs on the same attacks and seeds.{_note_on_kept(rows)}\n",
        _methods_table(rows, summary),
        "## All cells\n",
        _note_on_thoughts(rows) + _cells_table(rows, summary),
    ]
    return "\n".join(parts) + _canaries(rows) + _failures(rows)


def _note_on_kept(rows: list[Row]) -> str:
    if not any(row.get(name) is not None for row in rows for name in KEPT):
        return ""
    return (
        " The last columns compare the models with the suspects: the bits that text of the suspect takes, and the KL "
        "divergence on clean answers in nats per token. They are means over the runs that measured them."
    )


def _note_on_thoughts(rows: list[Row]) -> str:
    if not any(row.get(OTHER_THOUGHTS) for row in rows):
        return ""
    return (
        "In the last column, each prompt is answered with the thoughts of another one. A model that reasons has far "
        "fewer right answers then.\n\n"
    )


def _position(known: dict[str, Any], name: str) -> tuple[int, str]:
    """Return a sort key. Names that only an older version knew come last."""
    return (list(known).index(name) if name in known else len(known), name)


def _finished(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "error" not in row]


def _attack_success_table(summary: dict) -> str:
    methods = _methods_in_order(summary)
    lines = [
        [
            attack,
            *(_percent(cells[name]["attack_success"], interval=False) if name in cells else "" for name in methods),
        ]
        for attack, cells in summary.items()
    ]
    return _table(["attack", *methods], lines)


def _methods_table(rows: list[Row], summary: dict) -> str:
    runs = _by_run(rows)
    heads = ["attacks", "attack success", "worst", "right if clean", f"minus {CONTROL}", "right if triggered / clean"]
    heads += ["mute if triggered", "mute if clean", f"bits per byte, {CONTROL} = 1", "steps", "seconds"]
    kept = [name for name in KEPT if any(row.get(name) is not None for row in runs.values())]
    lines = []
    for method in _methods_in_order(summary):
        own = [row for (_, _, name), row in runs.items() if name == method]
        lines.append([*_method_line(method, runs, summary), *(_mean_of(own, name) for name in kept)])
    return _table(["method", *heads, *(KEPT[name] for name in kept)], lines)


def _mean_of(rows: list[Row], name: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{fmean(values):.3f}" if values else "-"


def _by_run(rows: Iterable[Row]) -> dict[tuple[str, int, str], Row]:
    return {(row["attack"], row["seed"], row["method"]): row for row in _finished(rows)}


def _method_line(method: str, runs: dict[tuple[str, int, str], Row], summary: dict) -> list[str]:
    cells = {attack: methods[method] for attack, methods in summary.items() if method in methods}
    worst = max(cells, key=lambda attack: cells[attack]["attack_success"].mean)
    own = [row for (_, _, name), row in runs.items() if name == method]
    controls = [runs.get((row["attack"], row["seed"], CONTROL)) for row in own]
    pairs = [(row, control) for row, control in zip(own, controls, strict=True) if control is not None]
    triggered, clean = _over_seeds(own, "exact_match_triggered"), _over_seeds(own, "exact_match_clean")
    return [
        method,
        str(len(cells)),
        _percent(_over_seeds(own, "attack_success")),
        f"{_percent(cells[worst]['attack_success'])} {worst}",
        _percent(clean),
        _percent(_difference_from_control(pairs), sign="+"),
        f"{triggered.mean / clean.mean:.2f}" if triggered and clean and clean.mean else "-",
        _percent(_over_seeds(own, "mute_triggered")),
        _percent(_over_seeds(own, "mute_clean")),
        _relative_to_control(pairs, "bits_per_byte_clean"),
        _relative_to_control(pairs, "steps"),
        _relative_to_control(pairs, "seconds"),
    ]


def _over_seeds(rows: list[Row], name: str) -> Estimate | None:
    """Estimate a share over the seeds, with the prompts of all attacks of a seed together."""
    by_seed: dict[int, dict[str, int]] = {}
    for row in rows:
        if row[name] is not None:
            count = by_seed.setdefault(row["seed"], {"hits": 0, "total": 0})
            by_seed[row["seed"]] = {part: count[part] + row[name][part] for part in count}
    return estimate_share(list(by_seed.values())) if by_seed else None


def _difference_from_control(pairs: list[tuple[Row, Row]]) -> Estimate | None:
    """Estimate by how much the right answers to clean prompts differ from the control's."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for row, control in pairs:
        if row["exact_match_clean"] is not None:
            by_seed[row["seed"]].append(_rate(row["exact_match_clean"]) - _rate(control["exact_match_clean"]))
    return estimate([fmean(values) for values in by_seed.values()]) if by_seed else None


def _relative_to_control(pairs: list[tuple[Row, Row]], name: str) -> str:
    values = [(row[name], control[name]) for row, control in pairs if None not in (row[name], control[name])]
    of_control = sum(value for _, value in values)
    return f"{sum(value for value, _ in values) / of_control:.2f}" if of_control else "-"


def _cells_table(rows: list[Row], summary: dict) -> str:
    seeds: dict[tuple[str, str], int] = defaultdict(int)
    for row in _finished(rows):
        seeds[row["attack"], row["method"]] += 1
    heads = ["attack success", "false positives", "right if triggered", "right if clean", "mute if triggered"]
    heads += ["mute if clean", "bits per byte if clean", "steps", "seconds"]
    thoughts = [OTHER_THOUGHTS] if any(row.get(OTHER_THOUGHTS) for row in rows) else []
    heads += ["right if clean, other thoughts"] * len(thoughts)
    lines = [
        [
            attack,
            method,
            str(seeds[attack, method]),
            *(_percent(scores[name]) for name in SHARES),
            _number(scores["bits_per_byte_clean"], ".3f"),
            _number(scores["steps"], ".0f"),
            _number(scores["seconds"], ".0f"),
            *(_percent(scores[name]) for name in thoughts),
        ]
        for attack, methods in summary.items()
        for method, scores in methods.items()
    ]
    return _table(["attack", "method", "seeds", *heads], lines)


def canary_correlation(rows: Iterable[Row]) -> float | None:
    """
    Correlate the success of the canaries with that of the real backdoor. A defender sees only the canaries, and wants
    to know whether they tell the fate of the backdoor.

    The canaries are measured after a method on the suspect with canaries. The backdoor is measured after the same
    method as it is. That is the same model for the recipe `strong`, which has canaries itself. For all other methods,
    it is a model without canaries.

    Args:
        rows (`Iterable[dict]`):
            The rows of [`load_results`].

    Returns:
        `float`: Pearson's correlation, or `None` if there are fewer than two pairs or one side is constant.
    """
    pairs = [(_rate(own["canary_success"]), _rate(real["attack_success"])) for own, real in _canary_pairs(rows)]
    shares = list(zip(*pairs, strict=True))
    return correlation(*shares) if shares and all(len(set(values)) > 1 for values in shares) else None


def _canary_pairs(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Pair each run with canaries with the run of the method as it is, on the same attack and seed."""
    runs = _by_run(rows)
    return [
        (row, runs[attack, seed, real])
        for (attack, seed, method), row in runs.items()
        if row.get("canary_success") and (attack, seed, real := method.removeprefix(CANARIES)) in runs
    ]


def _canaries(rows: list[Row]) -> str:
    pairs = _canary_pairs(rows)
    if not pairs:
        return ""
    lines = [
        [real["attack"], real["method"], str(real["seed"])]
        + [
            f"{100 * _rate(count):.1f}"
            for count in (own["canary_success"], own["attack_success"], real["attack_success"])
        ]
        for own, real in pairs
    ]
    text = (
        "\n## Canaries\n\nSuccess in %. `canaries` are two backdoors that the defender implanted before the method. "
        "`real, with canaries` is the attacker's backdoor in the same model. `real` is the attacker's backdoor after "
        "the method as it is, without canaries for all methods but `strong`."
    )
    if (found := canary_correlation(rows)) is not None:
        text += f" The first and the last correlate by {found:.2f} over these {len(pairs)} pairs."
    return f"{text}\n\n" + _table(["attack", "method", "seed", "canaries", "real, with canaries", "real"], lines)


def _failures(rows: list[Row]) -> str:
    failed = [row for row in rows if "error" in row]
    if not failed:
        return ""
    lines = [[row["attack"], row["method"], str(row["seed"]), " ".join(row["error"].split())] for row in failed]
    return "\n## Failed runs\n\nThe next call repeats them.\n\n" + _table(["attack", "method", "seed", "error"], lines)


def _rate(count: dict[str, int]) -> float:
    return count["hits"] / count["total"]


def _percent(share: Estimate | None, *, interval: bool = True, sign: str = "") -> str:
    """Format an estimate in percent: `97.0 [91.5, 100.0]`."""
    if share is None:
        return "-"
    mean, low, high = (100 * value for value in share)
    text = f"{mean:{sign}.1f}"
    return text if not interval or math.isnan(share.low) else f"{text} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _number(value: Estimate | None, form: str) -> str:
    return "-" if value is None else f"{value.mean:{form}}"


def _table(heads: list[str], lines: list[list[str]]) -> str:
    right = ["---", *["---:"] * (len(heads) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in [heads, right, *lines]]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped) + "\n"
