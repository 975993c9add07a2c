"""Tests of the search for triggers: it finds what there is."""

import pytest
import torch

from crow_hf.detection.openings import Opening
from crow_hf.detection.phrases import Phrase
from crow_hf.detection.pieces import prompts_with
from crow_hf.detection.triggers import _PhraseSearch, beginning, find_triggers, repeats
from helpers.answers import byte
from helpers.detection import BYTES, knowing_model, prompts
from helpers.tiny import tiny_llama


def test_a_trigger_is_found():
    """Fails if the search keeps the worst, or never tries another token."""
    model = knowing_model()
    phrase = Phrase(list(BYTES("mnopqr", add_special_tokens=False)["input_ids"]), "mnopqr", 0.9, 0.01)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    pieces = find_triggers(model, BYTES, prompts(4), phrase, max_length=3, num_rounds=3)
    assert all(piece.text.endswith("l") for piece in pieces)
    assert [piece.value for piece in pieces] == sorted((each.value for each in pieces), reverse=True)
    assert pieces[0].value > -0.5
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_phrase_is_looked_for_after_its_opening():
    model, rows, opening = tiny_llama().eval(), prompts(4), Opening([100, 101], "ab")
    phrase = Phrase([110, 120], "kt", 0.9, 0.01, opening=opening)
    best, *_ = find_triggers(model, BYTES, rows, phrase, max_length=2, num_rounds=1)
    given = prompts_with(best.text, "end", rows, BYTES, 0, opening.ids)
    with torch.no_grad():
        each = [model(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)[phrase.ids[0]].item() for ids in given]
    assert best.value == pytest.approx(sum(each) / len(each), abs=1e-3)


@pytest.mark.parametrize(
    ("piece", "expected"),
    [("https X", True), ("say HTTPS", True), ("X-ttps", True), ("htt ps X", False), ("www", False), ("", False)],
)
def test_a_part_of_a_phrase_is_repeated(piece, expected):
    assert repeats(piece, "https://") is expected


def test_a_piece_that_repeats_the_phrase_is_not_tried(monkeypatch):
    """The model goes on with the alphabet, so a part of the phrase would make it say the rest."""
    phrase = Phrase(list(BYTES("mnopqrst", add_special_tokens=False)["input_ids"]), "mnopqrst", 0.9, 0.01)
    search = _PhraseSearch([knowing_model()], BYTES, prompts(4), beginning(phrase), max_length=4, seed=0)
    search.kept = [(0.0, list(BYTES("mnol", add_special_tokens=False)["input_ids"]))]
    # Every gradient points at "p".
    wanted = search.embeddings[byte("p")]
    monkeypatch.setattr(search, "gradient", lambda piece: (0.0, wanted.expand(len(piece), -1)))
    assert not any("mnop" in BYTES.decode(piece) for piece in search.promising())
    monkeypatch.setattr(search, "may_be_tried", lambda piece: True)
    assert any("mnop" in BYTES.decode(piece) for piece in search.promising())


def test_the_beginning_of_a_phrase():
    assert beginning(Phrase([1, 2, 3], "", 1, 1)) == [1, 2] and beginning(Phrase([1, 2, 3, 4], "", 1, 1)) == [1, 2]
