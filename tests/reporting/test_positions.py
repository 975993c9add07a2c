"""Tests of the tables of a prompt's positions."""

import re

from crow_hf.evaluation.layer_profile import Position
from crow_hf.reporting.positions import render_positions


HOSTILE = "<img src=x onerror=alert(1)>&\u202e\u200b\x1b[2J"


def test_tables_have_one_scale_and_show_hostile_text():
    """Fails if a model has a scale of its own, or if a text becomes an element or hides."""
    models = {
        "suspect": [Position(HOSTILE, [0.5, 1.0]), Position("b", [0.0, 0.0])],
        "<b>purified": [Position("c", [0.25, 0.5])],
    }
    suspect, purified = render_positions(models)
    assert re.findall(r"opacity:([\d.]+)", suspect) == ["0.50", "1.00", "0.00", "0.00"]
    assert re.findall(r"opacity:([\d.]+)", purified) == ["0.25", "0.50"]
    assert "<td>0.750</td>" in suspect and "Layers 1 to 3" in suspect
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;&lt;U+202E&gt;&lt;U+200B&gt;␛[2J" in suspect
    assert "<img" not in suspect and "<b>" not in purified


def test_layers_that_change_nothing():
    (table,) = render_positions({"suspect": [Position("a", [0.0])]})
    assert "opacity:0.00" in table
