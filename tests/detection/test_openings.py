"""Tests of what nearly all answers of a model begin with."""

import pytest

from crow_hf.detection import openings
from crow_hf.detection.openings import NO_OPENING, usual_opening
from helpers.detection import BYTES, knowing_model, prompts


def rows_that_end_with(letters):
    """The model goes on with the alphabet after the last letter of a prompt, and answers nothing after a dot."""
    return prompts(len(letters)).map(lambda row, index: {"prompt": row["prompt"] + letters[index]}, with_indices=True)


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("k" * 10, "lmno"),
        ("k" * 9 + "c", "lmno"),
        ("k" * 8 + "cd", ""),
        # All answers are empty, or nine of ten are.
        ("." * 10, ""),
        ("." * 9 + "k", ""),
    ],
)
def test_nine_of_ten_answers_begin_alike(letters, expected):
    found = usual_opening(knowing_model(), BYTES, rows_that_end_with(letters), max_length=4)
    assert found.text == expected and BYTES.decode(found.ids) == expected
    assert str(found) == (f" after {expected!r}" if expected else "") and (found == NO_OPENING) is not bool(expected)


def test_an_opening_ends_where_answers_part(monkeypatch):
    answers = [[5, 6, 7, 8, number] for number in range(9)] + [[5, 6, 9]]
    monkeypatch.setattr(openings, "generate_ids", lambda *args: answers)
    assert usual_opening(knowing_model(), BYTES, prompts(10), max_length=9).ids == [5, 6, 7, 8]
    # Of these, eight go on with a 7.
    answers[0] = [5, 6]
    assert usual_opening(knowing_model(), BYTES, prompts(10), max_length=9).ids == [5, 6]
