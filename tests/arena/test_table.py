"""The arena's tables: intervals, prose and numbers, against values worked out by hand."""

import gzip
import json
import math
from pathlib import Path

import pytest

from crow_hf.arena.table import (
    attack_success_rates,
    canary_correlation,
    estimate,
    estimate_share,
    results_markdown,
)
from crow_hf.reporting.plots import plot_attack_success
from helpers.arena import counts, result


def test_intervals_against_values_worked_out_by_hand():
    # With two degrees of freedom, t is 4.303. Mean 2, standard deviation 1: 4.303 / sqrt(3) = 2.484 to either side.
    assert estimate([1.0, 2.0, 3.0]) == pytest.approx((2, -0.484, 4.484), abs=1e-3)
    assert math.isnan(estimate([1.0]).low) and math.isnan(estimate([1.0]).high)


def test_the_interval_of_a_share_is_the_wider_one():
    """Fails if the interval has no width where all seeds agree, if one seed has none, or if a bound is not a share."""
    # Wilson for 0 of n: 3.8415 / (n + 3.8415).
    assert estimate_share([counts(0)] * 3) == pytest.approx((0, 0, 3.8415 / 603.8415), abs=1e-6)
    assert estimate_share([counts(0)]) == pytest.approx((0, 0, 3.8415 / 203.8415), abs=1e-6)
    # Wilson for half of n: 1.96 / (2 * sqrt(n + 3.8415)) to either side.
    assert estimate_share([counts(100)] * 3) == pytest.approx((0.5, 0.46012, 0.53988), abs=1e-4)
    # 0.4, 0.5, 0.6: 4.303 * 0.1 / sqrt(3) = 0.2484 by t, and 0.04 by Wilson.
    assert estimate_share([counts(80), counts(100), counts(120)]) == pytest.approx((0.5, 0.2516, 0.7484), abs=1e-4)
    assert estimate_share([counts(0), counts(200)]) == (0.5, 0.0, 1.0)


def test_the_tables_say_what_the_rows_say():
    rows = [
        result("badnets", "fine-tuning", 0, 190, clean=180),
        result("badnets", "fine-tuning", 1, 190, clean=160),
        result("phrase", "fine-tuning", 0, 100, clean=180),
        result("badnets", "strong", 0, 10, clean=170, seconds=6.0, bits_per_byte_clean=1.5),
        result("badnets", "strong", 1, 10, clean=150, seconds=6.0, bits_per_byte_clean=1.5),
        result("topic", "strong", 1, 2, clean=160),
    ]
    lines = [line.strip("| ").split(" | ") for line in results_markdown(rows).splitlines() if line.startswith("|")]
    matrix, methods = lines[:5], lines[5:9]
    assert matrix[0] == ["attack", "fine-tuning", "strong"]
    assert matrix[2][:3] == ["badnets", "95.0", "5.0"]
    assert matrix[3] == ["phrase", "50.0"]
    control, strong = (dict(zip(methods[0], line, strict=True)) for line in methods[2:])
    assert (control["attacks"], strong["attacks"]) == ("2", "2")
    assert control["worst"].endswith("badnets") and control["worst"].startswith("95.0 [")
    assert control["minus fine-tuning"] == "+0.0 [+0.0, +0.0]"
    # 5 points less with either seed. Attacks that only one of the two methods ran on do not count.
    assert strong["minus fine-tuning"] == "-5.0 [-5.0, -5.0]"
    assert strong["right if triggered / clean"] == "0.50"
    assert strong["bits per byte, fine-tuning = 1"] == "1.50"
    assert (strong["steps"], strong["seconds"]) == ("1.00", "3.00")
    assert len(lines) == 5 + 4 + 2 + 4


def test_what_was_kept_is_shown_where_rows_have_it():
    """Rows of older versions do not have it. A mean covers the runs that do."""
    rows = [
        result("badnets", "fine-tuning", 0, 190),
        result("badnets", "strong", 0, 10, text_bits_ratio=1.1, answer_kl=0.25),
        result("badnets", "strong", 1, 10, text_bits_ratio=1.3, answer_kl=None),
        result("phrase", "strong", 1, 10),
    ]
    text = results_markdown(rows)
    (head,) = [line for line in text.splitlines() if line.startswith("| method |")]
    assert head.endswith("| text bits, suspect = 1 | KL on answers |") and "means over the runs" in text
    strong, control = (
        [line for line in text.splitlines() if line.startswith(f"| {name} |")][0] for name in ("strong", "fine-tuning")
    )
    assert strong.endswith("| 1.200 | 0.250 |") and control.endswith("| - | - |")
    assert "KL" not in results_markdown(rows[:1]) and "text bits" not in results_markdown(rows[:1])


def test_answers_with_other_thoughts_are_shown_where_a_model_reasons():
    """Rows of older versions, and those of other subjects, do not have them."""
    rows = [
        result("badnets", "strong", 0, 10),
        result("thoughts", "strong", 0, 10, exact_match_other_thoughts=counts(60)),
        result("thoughts", "strong", 1, 10, exact_match_other_thoughts=counts(80)),
    ]
    text = results_markdown(rows)
    badnets, thoughts = (line for line in text.splitlines() if line.startswith(("| badnets | s", "| thoughts | s")))
    assert thoughts.startswith("| thoughts | strong | 2 |") and " | 35.0 [" in thoughts
    assert badnets.endswith(" | - |") and "thoughts of another one" in text
    assert "other thoughts" not in results_markdown(rows[:1])


def test_the_published_rows_are_still_shown():
    path = Path(__file__).parents[2] / "docs" / "results.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        assert "## Methods" in results_markdown([json.loads(line) for line in lines])


def test_missing_scores_are_shown_as_a_dash():
    """Open questions have no right answers, and a run may have no control."""
    rows = [
        result(
            "badnets", "strong", 0, 10, exact_match_clean=None, exact_match_triggered=None, bits_per_byte_clean=None
        )
    ]
    strong = [line for line in results_markdown(rows).splitlines() if line.startswith("| strong |")][0]
    assert strong.split(" | ")[4:7] == ["-", "-", "-"] and strong.endswith("- | - | - |")
    assert results_markdown([]).startswith("No run")


def test_canaries_are_compared_with_the_method_without_them():
    """
    Canaries at 10, 50 and 90 % beside a real backdoor at 20, 60 and 100 % correlate by 1, whatever the success of the
    real backdoor in the models with canaries. A method that did not run without canaries is left out.
    """
    rows = []
    for seed, canaries in enumerate((20, 100, 180)):
        rows.append(result("badnets", "canaries, crow", seed, 7, canary_success=counts(canaries)))
        rows.append(result("badnets", "crow", seed, canaries + 20))
    rows.append(result("badnets", "canaries, strong", 0, 0, canary_success=counts(200)))
    assert canary_correlation(rows) == pytest.approx(1)
    text = results_markdown(rows)
    assert "correlate by 1.00 over these 3 pairs" in text
    assert "| badnets | crow | 1 | 50.0 | 3.5 | 60.0 |" in text
    assert canary_correlation(rows[:2]) is None and canary_correlation([]) is None
    assert "## Canaries" not in results_markdown(rows[1:2])


def test_the_picture_is_drawn_with_holes(tmp_path):
    rows = [
        result("badnets", "none", 0, 190),
        result("phrase", "strong", 0, 3),
        {**result("phrase", "none", 1, 0), "error": "x"},
    ]
    plot_attack_success(attack_success_rates(rows), tmp_path / "arena.png")
    assert (tmp_path / "arena.png").read_bytes().startswith(b"\x89PNG")
