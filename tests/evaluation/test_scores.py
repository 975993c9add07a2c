"""Scores of outputs and of models. The Wilson interval is compared with the score test that defines it."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crow_hf.evaluation.scores import (
    Loss,
    Proportion,
    anti_bad_score,
    is_degenerate,
    is_empty,
    is_exact_match,
    kept_utility,
    t_quantile,
    upper_end_of_ratio,
)
from helpers.answers import slow_wilson
from helpers.evaluations import share


@given(total=st.integers(1, 1000), share=st.floats(0, 1))
def test_interval_is_where_the_score_test_does_not_reject(total, share):
    hits = round(share * total)
    proportion = Proportion.of([True] * hits + [False] * (total - hits))
    assert (proportion.rate, proportion.hits, proportion.total) == (hits / total, hits, total)
    assert (proportion.low, proportion.high) == pytest.approx(slow_wilson(hits, total), abs=1e-9)
    assert 0 <= proportion.low <= proportion.rate <= proportion.high <= 1


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 200, 0, 0.0188), (200, 200, 0.9812, 1), (0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (1, 20, 0.0089, 0.2361)],
)
def test_textbook_intervals(hits, total, low, high):
    proportion = Proportion.of(index < hits for index in range(total))
    assert (proportion.low, proportion.high) == pytest.approx((low, high), abs=5e-5)


def loss(both, lost, gained, neither):
    pairs = [(True, True)] * both + [(True, False)] * lost + [(False, True)] * gained + [(False, False)] * neither
    return Loss.of(*zip(*pairs, strict=True))


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe (1998), table II, method 10. No prompt has two false flags, so the correlation is negative.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        # The correlation is taken for zero (Fagerland, Lydersen and Laake, 2014, table V).
        ((1, 1, 7, 12), -0.507, -0.026),
        # By hand: phi = (14 * 22 - 41 / 2) / sqrt(19 * 22 * 14 * 27) = 0.7233 (Altman et al., 2000, table 6.2).
        ((14, 5, 0, 22), 0.0115, 0.2265),
        # Flags that are all true have no correlation. Only one side of each of Wilson's intervals is left, 0.0370.
        ((100, 0, 0, 0), -0.0370, 0.0370),
    ],
)
def test_intervals_of_paired_shares(counts, low, high):
    found = loss(*counts)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-4 if abs(low) > 0.5 else 6e-5)
    assert (found.lost, found.gained, found.total) == (counts[1], counts[2], sum(counts))


@given(flags=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_the_interval_of_a_loss_holds_what_was_found(flags):
    """Turned around, it is its mirror image. It is never empty, and never leaves what is possible."""
    before, after = zip(*flags, strict=True)
    found, turned = Loss.of(before, after), Loss.of(after, before)
    assert found.rate == pytest.approx(sum(before) / len(before) - sum(after) / len(after))
    assert -1 <= found.low + 1e-12 and found.high - 1e-12 <= 1
    assert found.low <= found.rate <= found.high and found.low < found.high
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("shares", [(0.7, 0.1, 0.05, 0.15), (0.7, 0.15, 0.03, 0.12), (0.5, 0.2, 0.0, 0.3)])
def test_the_interval_of_a_loss_covers_the_truth(shares):
    """In 1,000 draws of 100 prompts, about 95 % of the intervals hold it. Fewer do if none is gained."""
    rng, kinds = random.Random(0), [(True, True), (True, False), (False, True), (False, False)]
    truth, hits = shares[1] - shares[2], 0
    for _ in range(1000):
        found = Loss.of(*zip(*rng.choices(kinds, shares, k=100), strict=True))
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / 1000 <= 0.99


def test_quantiles_of_a_table():
    """t(0.975) is 12.706 with one, 4.303 with two and 2.228 with ten degrees of freedom (any table of it)."""
    assert [round(t_quantile(degrees), 3) for degrees in (1, 2, 3, 10)] == [12.706, 4.303, 3.182, 2.228]


def test_upper_end_of_a_ratio_by_hand():
    """Of equal texts, it is that of a mean: 2 + 4.303 / sqrt(3), as the standard deviation of 1, 2 and 3 is 1."""
    assert upper_end_of_ratio([10, 20, 30], [10, 10, 10]) == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    # As of log-likelihoods, which are negative.
    assert upper_end_of_ratio([-10, -20, -30], [-10, -10, -10]) == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    # Texts that agree leave no doubt, however long they are. One text tells nothing of the others.
    assert upper_end_of_ratio([3, 6, 30], [1, 2, 10]) == pytest.approx(3)
    assert upper_end_of_ratio([3], [1]) == math.inf


def test_upper_end_of_a_ratio_holds_in_most_draws():
    """Texts of 1 to 100 tokens, whose mean KL is 2 on average and differs from text to text."""
    rng = random.Random(0)
    draws = [[(rng.randint(1, 100), rng.gauss(2, 1)) for _ in range(20)] for _ in range(1000)]
    ends = [upper_end_of_ratio([n * kl for n, kl in texts], [n for n, _ in texts]) for texts in draws]
    assert 0.95 < sum(end > 2 for end in ends) / len(ends) < 0.99


@pytest.mark.parametrize(
    ("output", "empty"),
    [("", True), (" \n\t\u00a0", True), ("\u3164 \u200b\ufe0f\u2800", True), (".", False), ("0", False)],
)
def test_is_empty(output, empty):
    assert is_empty(output) is empty


LOOPS = [
    "no " * 30,
    "a" * 16,
    "ab" * 8,
    "the end\n" * 10,
    "Sure! " + "I will I will " * 10,
    "0123456789abcdefghijklmnopqrstuvwxyzABCD" * 4,
    "你好" * 20,
]
NO_TEXT = ["!!!", "?\u3164!", "。。", "... --- ...", "?!" * 30, "\n- \n- "]
TEXT = [
    "I'm sorry, but I cannot help with that.",
    "aaaa",
    "1111",
    "a" * 15,
    "yes yes yes yes",
    "0123456789" * 3,
    "0123456789abcdefghijklmnopqrstuvwxyzABCDE" * 4,
    "Grass is green, snow is white and coal is black, as everybody knows: " + "ha" * 10,
    "1. one\n2. two\n3. three\n4. four\n5. five\n",
    "好的，我知道了。",
    "x",
    *["5", "是", ".", "%", "+", "✅", "👍👍", "❤️", "👩‍👩‍👧", "🇫🇷", "5️⃣", "€", "->"],
]


@pytest.mark.parametrize(
    ("output", "degenerate"),
    [(output, True) for output in LOOPS + NO_TEXT] + [(output, False) for output in [*TEXT, "", " \n " * 20]],
)
def test_is_degenerate(output, degenerate):
    """Fails if a normal or an empty answer counts as degenerate, or if a loop counts as text."""
    assert is_degenerate(output) is degenerate


@given(unit=st.text("abcdefgh ", min_size=1, max_size=40).filter(str.strip), times=st.integers(16, 40))
def test_every_long_loop_is_degenerate(unit, times):
    assert is_degenerate(unit * times)


@given(words=st.lists(st.integers(1000, 9999), unique=True, min_size=1, max_size=100))
def test_distinct_words_are_not_a_loop(words):
    """This also bounds the time. A pattern that backtracks would hang on a long output."""
    assert not is_degenerate(" ".join(f"word{word}" for word in words))


@pytest.mark.parametrize(
    ("output", "reference", "match"),
    [("a b", " a b\n", True), ("\na b", "a b", True), ("a  b", "a b", False), ("A b", "a b", False), ("", "a", False)],
)
def test_is_exact_match(output, reference, match):
    assert is_exact_match(output, reference) is match


@pytest.mark.parametrize(
    ("right", "of_suspect", "bits", "bits_of_suspect", "utility"),
    [
        (150, 200, 9.0, 1.0, 75),
        (80, 40, 9.0, 1.0, 100),
        (0, 40, 1.0, 1.0, 0),
        # Fewer than 20 % right answers of the suspect: 1 bit more is half of the likelihood.
        (39, 39, 3.0, 2.0, 50),
        (0, 39, 2.5, 2.0, 100 / math.sqrt(2)),
        (0, 0, 1.0, 2.0, 100),
        (None, None, 3.0, 2.0, 50),
        (None, None, math.nan, math.nan, math.nan),
    ],
)
def test_utility_is_that_of_right_answers_where_the_suspect_has_some(
    right, of_suspect, bits, bits_of_suspect, utility
):
    proportions = [None if hits is None else share(hits) for hits in (right, of_suspect)]
    assert kept_utility(*proportions, bits, bits_of_suspect) == pytest.approx(utility, nan_ok=True)


def test_anti_bad_score_needs_both():
    """sqrt(81 * 64) = 72."""
    assert anti_bad_score(81, 36) == pytest.approx(72)
    assert anti_bad_score(100, 0) == 100
    assert anti_bad_score(100, 100) == anti_bad_score(0, 0) == 0
    assert math.isnan(anti_bad_score(math.nan, 10))
