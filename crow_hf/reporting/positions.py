"""The tables of `crow-hf ui`: how much the layers of a model change each position of a prompt."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from ..evaluation.layer_profile import Position
from .html import TEMPLATES


# For the page that holds the tables.
STYLE = """
.positions { width: 100%; border-collapse: collapse; font-size: 14px; }
.positions caption { text-align: left; font-weight: bold; padding: 6px; }
.positions :is(th, td) { text-align: left; vertical-align: top; padding: 2px 6px; border: 0; }
.positions td:nth-child(1) { font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.positions td:nth-child(2) { font-variant-numeric: tabular-nums; }
.positions td:nth-child(3) { width: 50%; }
.positions span { background: #8883; }
.positions div { display: flex; height: 1.2em; border: 1px solid #8886; }
.positions i { flex: 1; background: #d9480f; }
"""


def render_positions(models: Mapping[str, Sequence[Position]]) -> list[str]:
    """
    Draw a table of a prompt's positions for each model, with a bar that has a box for each pair of layers.

    Args:
        models (`Mapping[str, Sequence[Position]]`):
            The positions of each model by its title. The darkest box is the largest distance in any of them.

    Returns:
        `list[str]`: HTML, in which every character of the prompt is visible.
    """
    highest = max(each for positions in models.values() for position in positions for each in position.distances)
    return [
        TEMPLATES.get_template("positions.html.jinja").render(
            title=title,
            layers=len(positions[0].distances) + 1,
            positions=[
                {
                    "text": position.text,
                    "mean": fmean(position.distances),
                    # All distances can be 0.
                    "opacities": [each / (highest or 1) for each in position.distances],
                }
                for position in positions
            ],
        )
        for title, positions in models.items()
    ]
