"""Tests of the search for triggers: it finds what there is."""

import torch

from crow_hf.detection.phrases import Phrase
from crow_hf.detection.triggers import beginning, find_triggers
from helpers.detection import BYTES, knowing_model, prompts


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


def test_the_beginning_of_a_phrase():
    assert beginning(Phrase([1, 2, 3], "", 1, 1)) == [1, 2] and beginning(Phrase([1, 2, 3, 4], "", 1, 1)) == [1, 2]
