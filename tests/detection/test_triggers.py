"""Tests of the search for triggers: its values and gradients are right, and it finds what there is."""

import pytest
import torch
from datasets import Dataset

from crow_hf.attacks.triggers import Trigger
from crow_hf.data.encoding import encode_prompt
from crow_hf.data.rows import insert_into_prompt, render
from crow_hf.detection.phrases import Phrase
from crow_hf.detection.triggers import _Search, beginning, find_triggers, text_tokens
from helpers.coconut import TOKENIZER, coconut
from helpers.detection import BYTES, knowing_model, prompts
from helpers.tiny import tiny_llama


ROWS = Dataset.from_list([{"prompt": text, "completion": "x"} for text in ("ab cd \n", "efgh \n", "i jk lm \n")])
TARGET = [70, 80, 90]


def slow_value(model, tokenizer, piece):
    """Score a piece that is put into the text of each prompt, without a cache, one prompt at a time."""
    insert, total = Trigger((tokenizer.decode(piece),), "end").insert, 0
    for index, row in enumerate(ROWS):
        edited = row | insert_into_prompt(row, index, insert, 0, "piece")
        given = encode_prompt(render(edited, tokenizer), tokenizer)
        with torch.no_grad():
            logits = model(torch.tensor([given + TARGET])).logits[0].log_softmax(dim=-1)
        total += sum(logits[len(given) - 1 + n, token].item() for n, token in enumerate(TARGET)) / len(TARGET)
    return total / len(ROWS)


@pytest.mark.parametrize(
    ("model", "tokenizer"), [(tiny_llama(), BYTES), (coconut(), TOKENIZER)], ids=["llama", "coconut"]
)
def test_values_are_those_of_whole_rows(model, tokenizer):
    search = _Search(model.eval(), tokenizer, ROWS, TARGET, max_length=4, seed=0)
    pieces = [[100, 101], [110, 111]]
    expected = [slow_value(model, tokenizer, piece) for piece in pieces]
    assert search.values(pieces) == pytest.approx(expected, abs=1e-3)
    value, _ = search.gradient(pieces[0])
    assert value == pytest.approx(expected[0], abs=1e-3)


def test_the_gradient_is_that_of_the_piece_and_of_nothing_else():
    """Fails if the gradient is taken at another position of a prompt, or if a prompt is left out."""
    model = tiny_llama().double().eval()
    search = _Search(model, BYTES, ROWS, TARGET, max_length=4, seed=0)
    piece = [120, 121]
    _, gradient = search.gradient(piece)
    table = model.get_input_embeddings().weight
    for place, token in enumerate(piece):
        # Nothing else has this token, so a change of its embedding is a change of the piece.
        slope = gradient[place].norm()
        step = 1e-3 * gradient[place] / slope
        with torch.no_grad():
            table[token] += step
            above = search.gradient(piece)[0]
            table[token] -= 2 * step
            below = search.gradient(piece)[0]
            table[token] += step
        assert slope.item() == pytest.approx((above - below) / 2e-3, rel=2e-2)


def test_a_trigger_is_found():
    """Fails if the search keeps the worst, or never tries another token."""
    model = knowing_model()
    phrase = Phrase(list(BYTES("mnopqr", add_special_tokens=False)["input_ids"]), "mnopqr", 0.9, 0.01)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    pieces = find_triggers(model, BYTES, prompts(4), phrase, max_length=3, num_rounds=3)
    assert all(piece.text.endswith("l") for piece in pieces)
    assert [piece.log_likelihood for piece in pieces] == sorted((each.log_likelihood for each in pieces), reverse=True)
    assert pieces[0].log_likelihood > -0.5
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(weight.grad is None for weight in model.parameters())


def test_pieces_are_no_longer_than_allowed_and_never_tried_twice(monkeypatch):
    search = _Search(tiny_llama().eval(), BYTES, ROWS, TARGET, max_length=2, seed=0)
    values, tried, best = search.values, [], [-float("inf")]
    monkeypatch.setattr(search, "values", lambda pieces: tried.extend(map(tuple, pieces)) or values(pieces))
    for _ in range(3):
        search.next_round()
        best.append(search.kept[0][0])
    assert best == sorted(best)
    assert len(set(tried)) == len(tried) and max(map(len, tried)) == 2


def test_pieces_are_text():
    """Fails if a special token, a part of a character or a control character may be part of a piece."""
    tokens = text_tokens(tiny_llama(), BYTES)
    assert [BYTES.decode([token]) for token in tokens] == [chr(number) for number in range(32, 127)]


def test_the_beginning_of_a_phrase():
    assert beginning(Phrase([1, 2, 3], "", 1, 1)) == [1, 2] and beginning(Phrase([1, 2, 3, 4], "", 1, 1)) == [1, 2]
