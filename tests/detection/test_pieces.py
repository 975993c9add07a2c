"""Tests of pieces of text: their values and gradients are right, and the search tries what it may."""

import math
from functools import partial

import pytest
import torch
from datasets import Dataset

from crow_hf.attacks.triggers import Trigger
from crow_hf.data.encoding import encode_prompt
from crow_hf.data.rows import insert_into_prompt, render
from crow_hf.detection import pieces as pieces_module
from crow_hf.detection.divergence import _DivergenceSearch
from crow_hf.detection.pieces import prompts_with, random_pieces, text_tokens
from crow_hf.detection.triggers import _PhraseSearch
from helpers.coconut import TOKENIZER, coconut
from helpers.detection import BYTES
from helpers.tiny import tiny_llama


ROWS = Dataset.from_list([{"prompt": text, "completion": "x"} for text in ("ab cd \n", "efgh \n", "i jk lm \n")])
TARGET = [70, 80, 90]


def of_phrase(model, tokenizer, opening=()):
    return _PhraseSearch([model], tokenizer, ROWS, TARGET, max_length=4, seed=0, opening=opening)


def of_divergence(model, tokenizer):
    reference = tiny_llama(seed=1) if tokenizer is BYTES else coconut(seed=1)
    models = [model, reference.to(model.dtype).eval()]
    return _DivergenceSearch(models, tokenizer, ROWS, [tokenizer.pad_token_id], max_length=4, seed=0)


def slow_value(search, tokenizer, piece, opening):
    """Score a piece that is put into the text of each prompt, without a cache, one prompt at a time."""
    insert, total = Trigger((tokenizer.decode(piece),), "end").insert, 0
    for index, row in enumerate(ROWS):
        edited = row | insert_into_prompt(row, index, insert, 0, "piece")
        given = encode_prompt(render(edited, tokenizer), tokenizer) + opening
        with torch.no_grad():
            each = [model(torch.tensor([given + TARGET])).logits[0].log_softmax(dim=-1) for model in search.models]
        if len(each) == 1:
            total += sum(each[0][len(given) - 1 + n, token].item() for n, token in enumerate(TARGET)) / len(TARGET)
        else:
            own, other = (logits[len(given) - 1].double() for logits in each)
            distance = sum(math.exp(p) * (p - q) for p, q in zip(own.tolist(), other.tolist(), strict=True))
            total += math.log(distance + 0.01)
    return total / len(ROWS)


@pytest.mark.parametrize(
    ("kind", "opening"),
    [(of_phrase, []), (partial(of_phrase, opening=[95, 96]), [95, 96]), (of_divergence, [])],
    ids=["phrase", "phrase after an opening", "divergence"],
)
@pytest.mark.parametrize(
    ("model", "tokenizer"), [(tiny_llama(), BYTES), (coconut(), TOKENIZER)], ids=["llama", "coconut"]
)
def test_values_are_those_of_whole_rows(model, tokenizer, kind, opening):
    search = kind(model.eval(), tokenizer)
    pieces = [[100, 101], [110, 111]]
    expected = [slow_value(search, tokenizer, piece, opening) for piece in pieces]
    search.kept = []
    search.try_all(pieces)
    values = {tuple(piece): value for value, piece in search.kept}
    assert len(search.parts) == 2 and len(values) == len(pieces)
    assert [values[tuple(piece)] for piece in pieces] == pytest.approx(expected, abs=1e-3)
    assert min(map(abs, expected)) > 0.01
    value, _ = search.gradient(pieces[0])
    assert value == pytest.approx(expected[0], abs=1e-3)


@pytest.mark.parametrize("kind", [of_phrase, of_divergence])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("build", [tiny_llama, coconut])
def test_the_gradient_is_that_of_the_piece_and_of_nothing_else(build, cached, kind):
    """Fails if the gradient is taken at another position of a prompt, or if a prompt is left out."""
    model = build().double().eval()
    search = kind(model, BYTES if build is tiny_llama else TOKENIZER)
    if not cached:
        for states in search.parts:
            for each in states:
                each._cache = None
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


@pytest.mark.parametrize("max_length", [1, 2])
def test_pieces_are_text_no_longer_than_allowed_and_never_tried_twice(monkeypatch, max_length):
    """Of one token, there are fewer pieces than a round tries."""
    search = _PhraseSearch([tiny_llama().eval()], BYTES, ROWS, TARGET, max_length, seed=0)
    try_all, tried, best = search.try_all, [], [-float("inf")]
    monkeypatch.setattr(search, "try_all", lambda pieces: tried.extend(map(tuple, pieces)) or try_all(pieces))
    for _ in range(3):
        search.next_round()
        best.append(search.kept[0][0])
    assert best == sorted(best)
    assert len(set(tried)) == len(tried) and max(map(len, tried)) == max_length
    assert {token for piece in tried for token in piece} <= set(search.tokens)


def test_pieces_are_text():
    """Fails if a special token, a part of a character or a control character may be part of a piece."""
    tokens = text_tokens(tiny_llama(), BYTES)
    assert [BYTES.decode([token]) for token in tokens] == [chr(number) for number in range(32, 127)]


def test_a_piece_is_put_where_it_belongs():
    plain = [BYTES.decode(ids, skip_special_tokens=True) for ids in prompts_with(None, "end", ROWS, BYTES, 0)]
    for place, expected in (("start", "xy ab cd"), ("end", "ab cd xy")):
        edited = [BYTES.decode(ids, skip_special_tokens=True) for ids in prompts_with("xy", place, ROWS, BYTES, 0)]
        assert edited[0].strip() == expected and "xy" not in plain[0] and len(edited) == len(plain) == 3


def test_random_pieces_are_text_and_reproducible():
    model = tiny_llama()
    pieces = random_pieces(model, BYTES, 4, seed=0)
    assert pieces == random_pieces(model, BYTES, 4, seed=0) != random_pieces(model, BYTES, 4, seed=1)
    assert all(len(piece) == 4 and piece.isprintable() for piece in pieces)


def test_a_round_tries_the_best_of_the_first_prompts_on_all(monkeypatch):
    monkeypatch.setattr(pieces_module, "NUM_PROMISING", 3)
    search = of_phrase(tiny_llama().eval(), BYTES)
    tried, first = [[token] for token in range(100, 110)], search.parts[0]
    best = sorted(zip(search.values(tried, first), tried, strict=True), reverse=True)[:3]
    search.kept = []
    search.try_all(tried)
    assert sorted(piece for _, piece in search.kept) == sorted(piece for _, piece in best)


def test_prompts_whose_end_is_the_commonest_are_read_together():
    """Rows with an input have it between the instruction and the answer, so it follows the piece."""
    inputs = {"Sing": "la", "Say": "", "Sum": "1", "Sit": ""}
    rows = Dataset.from_list([{"instruction": word, "input": text, "output": "x"} for word, text in inputs.items()])
    search = _PhraseSearch([tiny_llama().eval()], BYTES, rows, TARGET, max_length=2, seed=0)
    assert [BYTES.decode(prefix).split()[-1] for prefix in search.prefixes] == ["Say", "Sit"]
