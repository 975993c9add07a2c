"""Tests of the tables of a prompt's positions and words."""

import math
import re

from crow_hf.detection.words import Part, WordScores
from crow_hf.evaluation.layer_profile import Position
from crow_hf.reporting.positions import render_positions, render_words


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


def test_bars_of_words_are_shares_of_the_score():
    """Fails if a bar has another length, if another word ends the alarm, or if a text becomes an element or hides."""
    parts = [Part(HOSTILE, 0.2), Part("b", 0.6), Part("c", 0.9), Part("d", math.nan)]
    table = render_words("<b>suspect", WordScores(0.8, 0.4, 1, parts))
    assert re.findall(r"width:([\d.]+)%", table) == ["75.0", "25.0", "0.0", "0.0"]
    assert re.findall(r"<td>((?!<).*)</td>", table) == ["0.200, no alarm", "0.600", "0.900", "nan"]
    assert "suspect, an alarm:" in table and "score 0.800, threshold 0.400" in table and "succession" not in table
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;&lt;U+202E&gt;&lt;U+200B&gt;␛[2J" in table
    assert "<img" not in table and "<b>" not in table


def test_words_of_prompts_that_are_no_alarm_or_long():
    table = render_words("suspect", WordScores(0.4, 0.4, 5, [Part("a b c d e", 0.1)]))
    assert "no alarm:" in table and "<td>0.100</td>" in table and "a bar is for 5 words in succession" in table
    # A score can be 0, and a score that is no number is an alarm.
    assert "width:0.0%" in render_words("suspect", WordScores(0.0, 0.4, 1, [Part("a", 0.1)]))
    assert "an alarm:" in render_words("suspect", WordScores(math.nan, 0.4, 1, []))
