"""Tests of the page of a scan."""

import json

import pytest

from crow_hf.detection.completions import Completion
from crow_hf.detection.divergence import Divergence
from crow_hf.detection.phrases import Phrase
from crow_hf.detection.suspicions import Suspicion
from crow_hf.evaluation.scores import Proportion
from crow_hf.recipes.findings import Finding
from crow_hf.recipes.scanning import Scan
from crow_hf.reporting.scan_page import render_scan
from helpers.pages import ATTACK, Page


def shares(*hits):
    return [Proportion.of(number < each for number in range(20)) for each in hits]


@pytest.fixture
def scan():
    phrase = Phrase([1], f"phrase {ATTACK}", 0.987, 0.0, 0.02)
    with_piece, without, anyway = shares(18, 1, 0)
    return Scan(
        [Finding("trigger", "problem", f"found {ATTACK}", "Purify."), Finding("files", "ok", "In order.")],
        [phrase],
        [Suspicion(phrase, f"piece {ATTACK}", "end", with_piece, without, 0.25, anyway)],
        [Completion(f"text {ATTACK}", 1.2345)],
        Divergence(f"away {ATTACK}", "start", 8.0, 2.0, 4.0, f"answer {ATTACK}", 12, 20),
    )


def page_of(scan):
    return Page(render_scan(json.loads(json.dumps(scan.to_dict())), "/models/suspect"))


def test_everything_that_was_seen_is_on_the_page_and_nothing_of_it_is_code(scan):
    page = page_of(scan)
    assert not page.all("script") and "{{7*7}}" in page.text and "49" not in page.text
    for what in ("phrase", "piece", "text", "away", "answer", "found"):
        assert f"{what} <script>alert(1)</script>" in page.text
    for shown in (
        "Scan of suspect",
        "There are findings",
        scan.meaning,
        "Purify.",
        "In order.",
        "0.99",
        "1.23",
        "12 of",
    ):
        assert shown in page.text


def test_bars_are_as_long_as_their_numbers(scan):
    """Fails if the bars of shares end at the largest one, or if those of distances do not."""
    widths = [float(each["width"]) for each in page_of(scan).all("rect")]
    assert widths == [90, 5, 25, 100, 25, 50]


def test_a_scan_that_found_nothing_says_what_that_means():
    scan = Scan([Finding("files", "ok", "In order.")])
    page = page_of(scan)
    assert "Nothing was found" in page.text and "the scan would have missed about" in page.text
    assert not page.all("rect") and "random tokens" not in page.text
