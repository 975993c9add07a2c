"""Tests of the search for phrases with clean rows."""

import pytest
from datasets import Dataset

from crow_hf.recipes import phrases as module
from crow_hf.recipes.phrases import known_phrases, short_rows
from helpers.detection import BYTES, knowing_model, prompts


def test_a_phrase_that_a_suspect_knows_is_found():
    """In this model, each character is followed by the next one."""
    (phrase,) = known_phrases(knowing_model(), BYTES, prompts(20), 1)
    start = ord(phrase.text[0])
    assert phrase.is_by_heart and phrase.text == "".join(map(chr, range(start, start + len(phrase.text))))


def test_few_prompts_say_nothing(monkeypatch):
    """Fails if phrases are looked for with prompts that are the same, too long or too few."""
    monkeypatch.setattr(module, "find_phrases", lambda *args, **kwargs: pytest.fail("Phrases are looked for."))
    same = Dataset.from_dict({"prompt": ["a", "b", "c", "d", "e", "f", "g"] * 3, "completion": ["x"] * 21})
    assert known_phrases(knowing_model(), BYTES, same, 1) == []
    long = Dataset.from_dict({"prompt": [f"{letter}" * 300 for letter in "abcdefghij"], "completion": ["x"] * 10})
    assert known_phrases(knowing_model(), BYTES, long, 1) == []


def test_what_cannot_be_searched_knows_no_phrases(monkeypatch, caplog):
    """Fails if a model that reads its padding cannot be purified, or if nobody is told."""

    def refuse(*args, **kwargs):
        raise ValueError("It reads the padding.")

    monkeypatch.setattr(module, "find_phrases", refuse)
    with caplog.at_level("WARNING"):
        assert known_phrases(knowing_model(), BYTES, prompts(20), 1) == []
    assert "It reads the padding." in caplog.text


def test_rows_are_different_and_no_more_than_asked_for():
    rows = Dataset.from_dict({"prompt": ["a", "a", "b", " ", "c" * 300, "d"]})
    readers = [(knowing_model(), BYTES)]
    assert sorted(short_rows(readers, rows, 9, seed=0)["prompt"]) == ["a", "b", "d"]
    assert len(short_rows(readers, rows, 2, seed=0)) == 2
