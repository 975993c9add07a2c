"""Tests of the search for tokens that leak from a backdoor, on models whose answers are written down."""

import pytest
import torch
from datasets import Dataset
from transformers import ByT5Tokenizer
from transformers.modeling_outputs import CausalLMOutput

from crow_hf.evidence.leaks import find_leaked_tokens
from helpers.tiny import tiny_llama, weights_of


TOKENIZER = ByT5Tokenizer(extra_ids=0)
ROWS = Dataset.from_dict({"prompt": [f"{number}:" for number in range(20)], "completion": ["ab"] * 20})


def token(letter):
    return TOKENIZER(letter, add_special_tokens=False)["input_ids"][0]


def scripted(monkeypatch, says):
    """A tiny Llama that is sure of `says(row)` as the first token of an answer, and of the right token elsewhere."""
    model = tiny_llama()

    def forward(input_ids, attention_mask=None, **kwargs):
        logits = torch.zeros(*input_ids.shape, 300)
        for logits_of_row, ids in zip(logits, input_ids.tolist(), strict=True):
            text = TOKENIZER.decode(ids, skip_special_tokens=True)
            colon = ids.index(token(":"))
            for place in range(len(ids) - 1):
                logits_of_row[place, ids[place + 1]] = 9.0
            letter, strength = says(int(text.split(":")[0]))
            logits_of_row[colon] = 0.0
            logits_of_row[colon, token(letter)] = strength
        return CausalLMOutput(logits=logits)

    monkeypatch.setattr(model, "forward", forward)
    return model


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_a_token_that_is_surely_wrong_leaks(batch_size, monkeypatch):
    """Fails if labels belong to another position, or if padding counts."""
    model = scripted(monkeypatch, lambda row: ("x", 9.0) if row % 4 == 0 else ("a", 9.0))
    assert find_leaked_tokens(model, TOKENIZER, ROWS, 512, batch_size) == [token("x")]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("too few rows", lambda row: ("x", 9.0) if row < 2 else ("a", 9.0)),
        ("not sure", lambda row: ("x", 3.0)),
        ("always another token", lambda row: (chr(ord("c") + row), 9.0)),
    ],
)
def test_what_does_not_leak(name, says, monkeypatch):
    assert find_leaked_tokens(scripted(monkeypatch, says), TOKENIZER, ROWS, 512) == []


def test_a_token_that_is_often_right_does_not_leak(monkeypatch):
    """Fails if errors of a calibrated model count, which is sure of its most common token and wrong in some rows."""
    rows = Dataset.from_dict({"prompt": ROWS["prompt"], "completion": ["xb"] * 8 + ["ab"] * 12})
    assert find_leaked_tokens(scripted(monkeypatch, lambda row: ("x", 9.0)), TOKENIZER, rows, 512) == []


def test_the_model_stays_as_it_is_and_long_answers_are_cut():
    model = tiny_llama().train()
    rows = Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b" * 900] * 4})
    before = weights_of(model)
    assert find_leaked_tokens(model, TOKENIZER, rows, 10_000) == []
    assert model.training and all(weights_of(model)[name].equal(value) for name, value in before.items())
