"""reporting.charts"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


# More points than this make a line no clearer: neighbours are averaged.
MAX_POINTS = 200


@dataclass(frozen=True)
class Series:
    """
    A line of a chart.

    Args:
        name (`str`):
            What the legend calls it.
        points (`Sequence[tuple[float, float]]`):
            In the chart's units.
        style (`int`):
            Which of the page's line styles it has: colour, dashes and the shape of its points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int


class LineChart:
    """
    A line chart as the template draws it, in units of an SVG of `width` x `height`.

    Args:
        title (`str`):
            Above the chart.
        series (`list[Series]`):
            Its lines, none of them empty.
        x_label (`str`), y_label (`str`):
            What the axes show, with units.
        y_max (`float`, *optional*):
            The end of the other axis, which begins at 0; by default the highest value.
    """

    width, height = 312, 220
    left, right, top, bottom = 50, 292, 10, 176

    def __init__(self, title: str, series: list[Series], x_label: str, y_label: str, y_max: float | None = None):
        self.title, self.series, self.x_label, self.y_label = title, series, x_label, y_label
        across = [x for line in series for x, _ in line.points]
        self._x_range = (min(across), max(across))
        highest = (max(y for line in series for _, y in line.points) if y_max is None else y_max) or 1.0
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
        """In words, for those who cannot see it."""
        ends = (
            f"{line.name}: {line.points[0][1]:.3g} at {line.points[0][0]:g}, {line.points[-1][1]:.3g} at {line.points[-1][0]:g}"
            for line in self.series
        )
        return f"{self.y_label} by {self.x_label}. {'; '.join(ends)}."

    def x(self, value: float) -> float:
        """From a value to a place in the picture."""
        first, last = self._x_range
        share = (value - first) / (last - first) if last > first else 0.5
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        """From a value to a place in the picture."""
        return round(self.bottom - value / self._y_max * (self.bottom - self.top), 1)

    def places(self, line: Series) -> list[tuple[float, float]]:
        """Where the points of a line are."""
        return [(self.x(x), self.y(y)) for x, y in line.points]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], fmean(value for _, value in group)) for group in groups]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round numbers, from the last below a range to the first above it."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return [round(number * step, 12) for number in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]
