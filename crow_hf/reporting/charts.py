"""Charts of the report, as the page's template draws them in SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .terms import CONSISTENCIES, LOSSES


# More points do not make a line clearer, so neighbours are averaged.
MAX_POINTS = 200


@dataclass(frozen=True)
class Series:
    """
    A line of a chart.

    Args:
        name (`str`):
            The name in the legend.
        points (`Sequence[tuple[float, float]]`):
            The points, in the units of the chart.
        style (`int`):
            The number of a line style of the page: its colour, its dashes and the shape of its points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int


class LineChart:
    """
    A line chart, in units of an SVG of `width` x `height`.

    Args:
        title (`str`):
            The title above the chart.
        series (`list[Series]`):
            The lines. Each has at least one point.
        x_label (`str`):
            The label of the x-axis, with its unit.
        y_label (`str`):
            The label of the y-axis, with its unit.
        y_max (`float`, *optional*):
            The largest value of the y-axis, which begins at 0. Defaults to the largest value of the lines.
    """

    width, height = 312, 220
    left, right, top, bottom = 50, 292, 10, 176

    def __init__(self, title: str, series: list[Series], x_label: str, y_label: str, y_max: float | None = None):
        self.title, self.series, self.x_label, self.y_label = title, series, x_label, y_label
        across = [x for line in series for x, _ in line.points]
        self._x_range = (min(across), max(across))
        # Rounding makes distances of 0 a little negative.
        highest = max(0.0, *(y for line in series for _, y in line.points)) if y_max is None else y_max
        highest = highest or 1.0
        across_ticks, up_ticks = _ticks(*self._x_range, 6), _ticks(0, highest, 4)
        self._y_max = up_ticks[-1]
        self.x_ticks = [
            (self.x(value), f"{value:g}")
            for value in across_ticks
            if self._x_range[0] <= value <= self._x_range[1] and value == int(value)
        ]
        self.y_ticks = [(self.y(value), f"{value:g}") for value in up_ticks]

    @property
    def description(self) -> str:
        """The chart in words, for screen readers."""
        ends = []
        for line in self.series:
            (first_x, first_y), (last_x, last_y) = line.points[0], line.points[-1]
            ends.append(f"{line.name}: {first_y:.3g} at {first_x:g}, {last_y:.3g} at {last_x:g}")
        return f"{self.y_label} by {self.x_label}. {'; '.join(ends)}."

    def x(self, value: float) -> float:
        """Convert an x value to a position in the picture."""
        first, last = self._x_range
        share = (value - first) / (last - first) if last > first else 0.5
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        """Convert a y value to a position in the picture."""
        return round(self.bottom - value / self._y_max * (self.bottom - self.top), 1)

    def places(self, line: Series) -> list[tuple[float, float]]:
        """Return the positions of a line's points."""
        return [(self.x(x), self.y(y)) for x, y in line.points]


@dataclass(frozen=True)
class Interval:
    """A share with its interval, in percent, as a row of a picture."""

    model: str
    rate: float
    low: float
    high: float
    style: int


def training_charts(log: list[dict[str, Any]]) -> list[LineChart]:
    """Draw the terms of a Trainer's log: the losses, and the distances between layers."""
    charts = []
    for title, terms, unit in (
        ("Loss", LOSSES, "nats per token"),
        ("Distance between layers", CONSISTENCIES, "mean of 1 − cos"),
    ):
        series = []
        for term, (name, style) in terms.items():
            if points := [(entry["step"], entry[term]) for entry in log if entry.get(term) is not None]:
                series.append(Series(name, thinned(points), style))
        if series:
            charts.append(LineChart(title, series, "optimizer step", unit))
    return charts


def layer_charts(profiles: dict[str, dict[str, Any]], titles: dict[str, str]) -> list[LineChart]:
    """Draw a chart for each model's [`LayerProfile`], all with the same axes."""
    kinds = ("clean", "perturbed", "triggered")
    highest = max(value for profile in profiles.values() for kind in kinds for value in profile[kind] or [])
    return [
        LineChart(
            titles[role],
            [
                Series(kind, list(enumerate(profile[kind], start=1)), style)
                for style, kind in enumerate(kinds)
                if profile[kind]
            ],
            "layer l, against layer l + 1",
            "mean of 1 − cos",
            highest,
        )
        for role, profile in profiles.items()
    ]


def outcome_intervals(evaluations: dict[str, Any] | None, names: dict[str, str]) -> list[tuple[str, list[Interval]]]:
    """Return what the picture of a comparison shows: headings, each with one row per model."""
    groups = []
    has_trigger = any(evaluation["triggered"] for evaluation in (evaluations or {}).values())
    for heading, kind, score in (
        ("Attack success", "triggered", "target"),
        ("Right answers with the trigger", "triggered", "exact_match"),
        ("Right answers without it" if has_trigger else "Right answers", "clean", "exact_match"),
    ):
        rows = [
            Interval(names[role], 100 * share["rate"], 100 * share["low"], 100 * share["high"], int(score == "target"))
            for role, evaluation in (evaluations or {}).items()
            if (share := (evaluation[kind] or {}).get(score)) is not None
        ]
        if rows:
            groups.append((heading, rows))
    return groups


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbouring points until at most `MAX_POINTS` are left."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], fmean(value for _, value in group)) for group in groups]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers that cover a range."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return [round(number * step, 12) for number in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]
