"""What the arena found, in numbers that people read.

**Intervals** hold 95 %. What varies is the seed: rows, attacker and defender are drawn anew by each, while the prompts of one
seed are all answered by one model and are no independent draws of it. So the interval of a mean is Student's t over the seeds.
It has no width where all seeds agree, at 0 % for instance, and none can be told from one seed; the interval of a share is
therefore never narrower than Wilson's over all prompts together, which is what independent prompts would allow.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import correlation, fmean, stdev
from typing import Any, NamedTuple

from ..evaluation.scores import Proportion
from .attacks import ATTACKS
from .defences import CANARIES, CONTROL, METHODS


Row = dict[str, Any]

SHARES = (
    "attack_success",
    "false_positives",
    "exact_match_triggered",
    "exact_match_clean",
    "mute_triggered",
    "mute_clean",
)
FIGURES = ("bits_per_byte_triggered", "bits_per_byte_clean", "steps", "seconds")


class Estimate(NamedTuple):
    """
    A mean over seeds with its 95 % interval.

    Attributes:
        mean (`float`):
            The mean.
        low (`float`), high (`float`):
            The ends of the interval, NaN where there is none: of one seed, if it is no share.
    """

    mean: float
    low: float
    high: float


def load_results(output_dir: str | Path) -> list[Row]:
    """All runs of an arena, by attack, method and seed in the order of the tables."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in Path(output_dir).glob("results/*/*/*.json")]
    return sorted(rows, key=lambda row: (_place(ATTACKS, row["attack"]), _place(METHODS, row["method"]), row["seed"]))


def t_quantile(degrees: int) -> float:
    """
    The t with 95 % of Student's distribution between -t and t.

    By bisection of the closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """

    def between(angle: float) -> float:
        # The series' terms are products of (i - 1) / i and of cos^2, for i = 2, 4, .. or 3, 5, ..
        odd = degrees % 2
        term = math.cos(angle) if odd else 1.0
        total = term if degrees > 1 else 0.0
        for i in range(2 + odd, degrees - 1 + odd, 2):
            term *= (i - 1) / i * math.cos(angle) ** 2
            total += term
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if between(middle) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value for each seed, with its interval by Student's t."""
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def estimate_share(counts: Sequence[dict[str, int]]) -> Estimate:
    """
    The mean of one share for each seed, with its interval: the wider of Student's t and pooled Wilson, at either end.

    Args:
        counts (`Sequence[dict]`):
            `hits` and `total` of each seed.
    """
    mean, low, high = estimate([count["hits"] / count["total"] for count in counts])
    hits, total = (sum(count[name] for count in counts) for name in ("hits", "total"))
    pooled = Proportion.of([True] * hits + [False] * (total - hits))
    # Of a NaN and a number, these take the number, which has to come first.
    return Estimate(mean, max(0.0, min(pooled.low, low)), min(1.0, max(pooled.high, high)))


def summarize(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, Estimate | None]]]:
    """
    Means over seeds with their intervals.

    Args:
        rows (`Iterable[dict]`):
            Of [`load_results`]; failed runs are left out.

    Returns:
        `dict`: By attack, method and the name of the score; `None` where no run has it.
    """
    cells: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in _finished(rows):
        cells[row["attack"]][row["method"]].append(row)

    def of(runs: list[Row], name: str, estimator: Callable[[list], Estimate]) -> Estimate | None:
        values = [run[name] for run in runs if run[name] is not None]
        return estimator(values) if values else None

    return {
        attack: {
            method: {name: of(runs, name, estimate_share) for name in SHARES}
            | {name: of(runs, name, estimate) for name in FIGURES}
            for method, runs in methods.items()
        }
        for attack, methods in cells.items()
    }


def methods_of(summary: dict[str, dict]) -> list[str]:
    """The methods of a summary in the order of the tables."""
    names = dict.fromkeys(method for methods in summary.values() for method in methods)
    return sorted(names, key=lambda name: _place(METHODS, name))


def attack_success_rates(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """The mean attack success over seeds, by attack and method, both in the order of the tables."""
    summary = summarize(rows)
    methods = methods_of(summary)
    return {
        attack: {method: cells[method]["attack_success"].mean for method in methods if method in cells}
        for attack, cells in summary.items()
    }


def results_markdown(rows: list[Row]) -> str:
    """The arena's tables in Markdown: the matrix of attack success, the methods, every cell, and what failed."""
    if not any(_finished(rows)):
        return "No run of this arena has finished yet.\n" + _failures(rows)
    summary = summarize(rows)
    seeds = sorted({row["seed"] for row in rows})
    return (
        "\n".join(
            [
                "# Arena\n",
                f"Means over the seeds {', '.join(map(str, seeds))}. Brackets hold 95 % intervals: Student's t over the seeds, "
                "and never narrower than Wilson's over all prompts pooled, which alone is there with one seed.\n",
                "## Attack success, %\n",
                _matrix(summary),
                "## Methods\n",
                f'Over the attacks each method ran on. "{CONTROL} = 1" and differences compare with {CONTROL} on the same attacks '
                "and seeds. Mute: empty or degenerate.\n",
                _methods(rows, summary),
                "## All cells\n",
                _cells(rows, summary),
            ]
        )
        + _canaries(rows)
        + _failures(rows)
    )


def _place(known: dict[str, Any], name: str) -> tuple[int, str]:
    """To sort by; what an older version called by another name comes last."""
    return (list(known).index(name) if name in known else len(known), name)


def _finished(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "error" not in row]


def _matrix(summary: dict) -> str:
    methods = methods_of(summary)
    lines = [
        [
            attack,
            *(_percent(cells[name]["attack_success"], interval=False) if name in cells else "" for name in methods),
        ]
        for attack, cells in summary.items()
    ]
    return _table(["attack", *methods], lines)


def _methods(rows: list[Row], summary: dict) -> str:
    runs = {(row["attack"], row["seed"], row["method"]): row for row in _finished(rows)}
    heads = ["attacks", "attack success", "worst", "right if clean", f"minus {CONTROL}", "right if triggered / clean"]
    heads += ["mute if triggered", "mute if clean", f"bits per byte, {CONTROL} = 1", "steps", "seconds"]
    return _table(["method", *heads], [_method(method, runs, summary) for method in methods_of(summary)])


def _method(method: str, runs: dict[tuple[str, int, str], Row], summary: dict) -> list[str]:
    cells = {attack: methods[method] for attack, methods in summary.items() if method in methods}
    own = {(attack, seed): row for (attack, seed, name), row in runs.items() if name == method}
    worst = max(cells, key=lambda attack: cells[attack]["attack_success"].mean)
    pairs = {key: (row, runs[*key, CONTROL]) for key, row in own.items() if (*key, CONTROL) in runs}
    gains: dict[int, list[float]] = defaultdict(list)
    for (_, seed), (row, control) in pairs.items():
        if row["exact_match_clean"] is not None:
            gains[seed].append(_rate(row["exact_match_clean"]) - _rate(control["exact_match_clean"]))

    def over_seeds(name: str) -> Estimate | None:
        by_seed: dict[int, dict[str, int]] = {}
        for (_, seed), row in own.items():
            if row[name] is not None:
                count = by_seed.setdefault(seed, {"hits": 0, "total": 0})
                by_seed[seed] = {part: count[part] + row[name][part] for part in count}
        return estimate_share(list(by_seed.values())) if by_seed else None

    def relative(name: str) -> str:
        values = [
            (row[name], control[name]) for row, control in pairs.values() if None not in (row[name], control[name])
        ]
        below = sum(control for _, control in values)
        return f"{sum(own for own, _ in values) / below:.2f}" if below else "-"

    triggered, clean = over_seeds("exact_match_triggered"), over_seeds("exact_match_clean")
    return [
        method,
        str(len(cells)),
        _percent(over_seeds("attack_success")),
        f"{_percent(cells[worst]['attack_success'])} {worst}",
        _percent(clean),
        _percent(estimate([fmean(values) for values in gains.values()]) if gains else None, sign="+"),
        f"{triggered.mean / clean.mean:.2f}" if triggered and clean and clean.mean else "-",
        _percent(over_seeds("mute_triggered")),
        _percent(over_seeds("mute_clean")),
        relative("bits_per_byte_clean"),
        relative("steps"),
        relative("seconds"),
    ]


def _cells(rows: list[Row], summary: dict) -> str:
    seeds: dict[tuple[str, str], int] = defaultdict(int)
    for row in _finished(rows):
        seeds[row["attack"], row["method"]] += 1
    heads = ["attack success", "false positives", "right if triggered", "right if clean", "mute if triggered"]
    heads += ["mute if clean", "bits per byte if clean", "steps", "seconds"]
    lines = [
        [
            attack,
            method,
            str(seeds[attack, method]),
            *(_percent(scores[name]) for name in SHARES),
            _number(scores["bits_per_byte_clean"], ".3f"),
            _number(scores["steps"], ".0f"),
            _number(scores["seconds"], ".0f"),
        ]
        for attack, methods in summary.items()
        for method, scores in methods.items()
    ]
    return _table(["attack", "method", "seeds", *heads], lines)


def canary_correlation(rows: Iterable[Row]) -> float | None:
    """
    Pearson's correlation between the success of the defender's canaries after a method and that of the real backdoor after the
    method as it is: for the strong recipe, which has canaries, in the same model; for others, in the suspect without them. It is
    what a defender who looks at canaries wants to know. `None` where there are fewer than two such pairs, or one of them is the
    same in all.
    """
    pairs = [(_rate(own["canary_success"]), _rate(real["attack_success"])) for own, real in _canary_pairs(rows)]
    shares = list(zip(*pairs, strict=True))
    return correlation(*shares) if shares and all(len(set(values)) > 1 for values in shares) else None


def _canary_pairs(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """The runs with canaries, each with that of the method as it is, on the same attack and seed."""
    runs = {(row["attack"], row["seed"], row["method"]): row for row in _finished(rows)}
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
    found = canary_correlation(rows)
    return (
        "\n## Canaries\n\nSuccess, %, of two backdoors of the defender's own that were put in before the method, of the real one in "
        "that model, and of the real one after the method as it is, which for all but the strong recipe is without canaries."
        + ("" if found is None else f" The first and the last correlate by {found:.2f} over these {len(pairs)} pairs.")
        + "\n\n"
        + _table(["attack", "method", "seed", "canaries", "real, with canaries", "real"], lines)
    )


def _failures(rows: list[Row]) -> str:
    failed = [row for row in rows if "error" in row]
    if not failed:
        return ""
    lines = [[row["attack"], row["method"], str(row["seed"]), " ".join(row["error"].split())] for row in failed]
    return "\n## Failed runs\n\nThe next call tries them again.\n\n" + _table(
        ["attack", "method", "seed", "error"], lines
    )


def _rate(count: dict[str, int]) -> float:
    return count["hits"] / count["total"]


def _percent(share: Estimate | None, *, interval: bool = True, sign: str = "") -> str:
    """`97.0 [91.5, 100.0]`, in percent."""
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
