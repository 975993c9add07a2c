"""Tests of the search for phrases that a model knows by heart."""

import math

import pytest
import torch

from crow_hf.detection import phrases as module
from crow_hf.detection.phrases import find_phrases, in_reference
from helpers.detection import BYTES, knowing_model
from helpers.tiny import tiny_llama


PROMPTS = [[10, 20, 30], [40, 50], [60, 70, 80, 90]]


def slow_phrase(model, token, length):
    """Follow one beginning without a cache, one prompt at a time: the ids, and the mean probability of each token."""
    ids, probabilities = [token], []
    while len(ids) < length and ids[-1] != BYTES.eos_token_id:
        with torch.no_grad():
            rows = [model(torch.tensor([prompt + ids])).logits[0, -1].softmax(dim=-1) for prompt in PROMPTS]
        mean = torch.stack(rows).mean(dim=0)
        ids.append(int(mean.argmax()))
        probabilities.append(mean.max().item())
    return ids, math.prod(probabilities) ** (1 / len(probabilities))


def test_phrases_are_those_of_a_slow_search(monkeypatch):
    """Fails if a beginning is lost, if a mean is one of logarithms, or if the first token counts."""
    model = tiny_llama().eval()
    monkeypatch.setattr(module, "_different", lambda phrases: list(phrases))
    found = find_phrases(model, BYTES, PROMPTS, num_tokens=4, limit=1000)
    special = {*BYTES.all_special_ids, *range(len(BYTES), 260)}
    with torch.no_grad():
        starts = torch.stack([model(torch.tensor([prompt])).logits[0, -1].softmax(-1) for prompt in PROMPTS]).mean(0)
    wanted = {}
    for token in set(range(256 + 3)) - special:
        ids, probability = slow_phrase(model, token, 4)
        if len(ids) >= 2:
            wanted[tuple(ids)] = probability, starts[token].item()
    assert len(found) > 20
    for phrase in found:
        probability, start = wanted[tuple(phrase.ids)]
        assert phrase.probability == pytest.approx(probability, rel=1e-3)
        assert phrase.start == pytest.approx(start, rel=1e-3)
    # The surest of all is not given up on the way.
    assert found[0].probability == pytest.approx(max(probability for probability, _ in wanted.values()), rel=1e-3)
    assert [phrase.probability for phrase in found] == sorted((each.probability for each in found), reverse=True)


def test_phrases_with_the_same_end_count_once_and_short_ones_not():
    found = find_phrases(knowing_model(), BYTES, PROMPTS, num_tokens=8)
    assert found[0].probability > 0.9
    runs = [{tuple(phrase.ids[n : n + 4]) for n in range(5)} for phrase in found]
    assert all(not runs[i] & runs[j] for i in range(len(runs)) for j in range(i))
    # What a dot ends after fewer than a third of the tokens.
    assert all(len(phrase.ids) >= 3 for phrase in found)


def test_a_reference_is_measured_in_the_same_way():
    """Fails if the first token, or another number of tokens, takes part in the mean."""
    model, other = knowing_model(), tiny_llama(seed=3)
    found = find_phrases(model, BYTES, PROMPTS, num_tokens=6)
    (itself,) = in_reference(found[:1], BYTES, PROMPTS, model, BYTES)
    assert itself.reference == pytest.approx(found[0].probability, rel=1e-3)
    (measured,) = in_reference(found[:1], BYTES, PROMPTS, other, BYTES)
    assert measured.reference < 0.5


def test_a_reference_may_have_another_tokenizer():
    """The ids of this one are shifted, and its model's embeddings with them."""

    class Shifted(type(BYTES)):
        def __call__(self, text, **options):
            return {"input_ids": [token - 3 for token in super().__call__(text, **options)["input_ids"]]}

        def get_vocab(self):
            return {name: token - 3 for name, token in super().get_vocab().items()}

    model, shifted = knowing_model(), knowing_model()
    with torch.no_grad():
        for weight in (shifted.model.embed_tokens.weight, shifted.lm_head.weight):
            weight.copy_(weight.roll(-3, dims=0))
    found = find_phrases(model, BYTES, [[100, 101], [102, 103]], num_tokens=6)
    (measured,) = in_reference(found[:1], BYTES, [[100, 101], [102, 103]], shifted, Shifted(extra_ids=0))
    assert measured.reference == pytest.approx(measured.probability, rel=1e-3)
