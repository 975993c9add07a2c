"""The tables of `crow-hf ui`: how much the layers change a prompt's positions, and what a guard says of its words."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from ..detection.words import WordScores
from ..evaluation.layer_profile import Position
from .html import TEMPLATES


# For the page that holds the tables.
STYLE = """
:is(.positions, .words) { width: 100%; border-collapse: collapse; font-size: 14px; }
:is(.positions, .words) caption { text-align: left; font-weight: bold; padding: 6px; }
:is(.positions, .words) :is(th, td) { text-align: left; vertical-align: top; padding: 2px 6px; border: 0; }
:is(.positions, .words) td:nth-child(1) { font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
:is(.positions, .words) td:nth-child(2) { font-variant-numeric: tabular-nums; }
:is(.positions, .words) td:nth-child(3) { width: 45%; }
:is(.positions, .words) span { background: #8883; }
:is(.positions, .words) td div { display: flex; height: 1.2em; border: 1px solid #8886; }
:is(.positions, .words) i { background: #d9480f; }
.positions i { flex: 1; }
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


def render_words(title: str, scores: WordScores) -> str:
    """
    Draw a table of a prompt's words, with a bar for how far the guard's score falls without each of them.

    Args:
        title (`str`):
            Title of the model that the guard belongs to.
        scores (`WordScores`):
            The scores. A whole bar is a fall to 0.

    Returns:
        `str`: HTML, in which every character of the prompt is visible.
    """
    # A share is below 0 if the score rises, and no number if a score is none. `max` turns both into 0.
    shares = [max(0, 1 - part.score_without / scores.score) if scores.score > 0 else 0 for part in scores.parts]
    return TEMPLATES.get_template("words.html.jinja").render(
        title=title, scores=scores, parts=list(zip(scores.parts, shares, strict=True))
    )
