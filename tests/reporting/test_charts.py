"""Tests of the charts of the report."""

import pytest

from crow_hf.reporting.charts import LineChart, Series, thinned


@pytest.mark.parametrize(
    "points",
    [
        [(1, 0.5), (2, 3.25), (3, 0.0)],
        [(1, 0.0)],
        [(1, -1e-9)],
        [(10, 1e-7), (20, 3e-7)],
        [(step, float(step % 7)) for step in range(1, 1001)],
        [(1, 1234.5), (500, 98765.4)],
    ],
    ids=["few", "one", "below 0", "tiny", "many", "large"],
)
def test_points_are_where_their_numbers_say(points):
    """Fails if a chart is upside down or cut off, or if it divides by an empty range."""
    line = Series("a", thinned(points), 0)
    chart = LineChart("t", [line], "step", "nats")
    places = chart.places(line)
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in places)
    assert len(places) <= 200 and len(places) == len(points) or len(points) > 200
    # x grows to the right, and y grows upwards.
    for (x1, y1), (x2, y2), (a1, b1), (a2, b2) in zip(places, places[1:], line.points, line.points[1:], strict=False):
        assert x1 <= x2 and a1 < a2 and (y1 >= y2 or b1 >= b2)
    ticks = {float(label): place for place, label in chart.y_ticks}
    assert ticks[0] == chart.bottom and 2 <= len(ticks) <= 7
    for value, place in ticks.items():
        assert place == chart.y(value)
    assert max(ticks) >= max(y for _, y in line.points)


def test_thinning_keeps_the_mean():
    points = [(step, float(step**2 % 17)) for step in range(1, 401)]
    kept = thinned(points)
    assert len(kept) == 200 and kept[-1][0] == 400
    assert sum(y for _, y in kept) / 200 == pytest.approx(sum(y for _, y in points) / 400)
