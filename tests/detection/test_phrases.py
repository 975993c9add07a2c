"""Tests of the search for phrases that a model knows by heart."""

import math
from dataclasses import replace

import pytest
import torch

from crow_hf.detection import phrases as module
from crow_hf.detection.openings import NO_OPENING, Opening
from crow_hf.detection.phrases import Phrase, find_phrases, in_reference, surest_by_heart
from helpers.answers import byte
from helpers.detection import BYTES, knowing_model
from helpers.tiny import tiny_llama


PROMPTS = [[10, 20, 30], [40, 50], [60, 70, 80, 90]]


def slow_means(model, ids):
    """Predict the token after each of the ids without a cache, one prompt at a time: the mean probabilities."""
    with torch.no_grad():
        rows = [model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 :].softmax(dim=-1) for prompt in PROMPTS]
    return torch.stack(rows).mean(dim=0)


def slow_greedy(model, token, length):
    ids = [token]
    while len(ids) < length and ids[-1] != BYTES.eos_token_id:
        ids.append(int(slow_means(model, ids)[-1].argmax()))
    return ids


def slow_probability(model, ids):
    means = slow_means(model, ids)
    return math.prod(means[place, ids[place]].item() for place in range(1, len(ids))) ** (1 / (len(ids) - 1))


def test_phrases_are_scored_as_a_slow_search_scores_them(monkeypatch):
    """Fails if a beginning is lost, if a mean is one of logarithms, or if the first token counts."""
    model = tiny_llama().eval()
    monkeypatch.setattr(module, "_different", lambda phrases: list(phrases))
    found = find_phrases(model, BYTES, PROMPTS, num_tokens=5, limit=1000)
    assert len(found) > 20
    for phrase in found:
        assert phrase.probability == pytest.approx(slow_probability(model, phrase.ids), rel=1e-3)
        assert phrase.start == pytest.approx(slow_means(model, phrase.ids)[0, phrase.ids[0]].item(), rel=1e-3)
    assert [phrase.probability for phrase in found] == sorted((each.probability for each in found), reverse=True)
    greedy = [slow_greedy(model, token, 5) for token in range(3, 259, 12)]
    best = max(slow_probability(model, ids) for ids in greedy if len(ids) >= 2)
    assert found[0].probability >= best * (1 - 1e-3)


def test_phrases_after_an_opening_are_those_after_longer_prompts():
    model, opening = tiny_llama().eval(), Opening([100, 101], "ab")
    longer = [[*prompt, *opening.ids] for prompt in PROMPTS]
    found = find_phrases(model, BYTES, PROMPTS, num_tokens=5, opening=opening)
    assert found == [replace(each, opening=opening) for each in find_phrases(model, BYTES, longer, num_tokens=5)]
    assert str(found[0]) == f"{found[0].text!r} after 'ab'"
    (measured,) = in_reference(found[:1], BYTES, PROMPTS, model, BYTES)
    (expected,) = in_reference([replace(found[0], opening=NO_OPENING)], BYTES, longer, model, BYTES)
    assert measured.reference == pytest.approx(expected.reference, rel=1e-4)


def test_the_target_need_not_be_the_most_likely_way_to_go_on(monkeypatch):
    """After a "b", a "c" is five times as likely as a second "b", with which the phrase goes on."""
    model = knowing_model()
    with torch.no_grad():
        head = model.lm_head.weight
        head[byte("b")] = head[byte("b")] + 1.15 * head[byte("c")]
    monkeypatch.setattr(module, "_different", lambda phrases: list(phrases))
    monkeypatch.setattr(module, "NUM_FIRST_TOKENS", 8)
    rows = [[10, byte("a")], [20, byte("a")]]
    texts = [phrase.text for phrase in find_phrases(model, BYTES, rows, num_tokens=8, limit=1000)]
    assert "bcdefghi" in texts and "bbcdefgh" in texts


def test_blank_phrases_are_left_out():
    """Any answer would begin with one."""
    model = knowing_model()
    with torch.no_grad():
        model.lm_head.weight[byte(" ")] = 8 * model.model.embed_tokens.weight[byte(" ")]
    assert all(phrase.text.strip() for phrase in find_phrases(model, BYTES, PROMPTS, num_tokens=8, limit=1000))


def test_phrases_with_the_same_end_count_once_and_short_ones_not():
    found = find_phrases(knowing_model(), BYTES, PROMPTS, num_tokens=8)
    assert found[0].probability > 0.9
    whole = [phrase.ids for phrase in found if len(phrase.ids) == 8]
    runs = [{tuple(ids[n : n + 4]) for n in range(5)} for ids in whole]
    assert whole and all(not runs[i] & runs[j] for i in range(len(runs)) for j in range(i))
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


def test_the_surest_phrases_directly_and_after_an_opening_are_chosen():
    opening = Opening([7], "x")
    directly = [Phrase([1, 2], text, 0.9, 0.0) for text in ("a", "b", "c")]
    after = [replace(each, opening=opening) for each in directly]
    unsure, known = replace(directly[0], probability=0.1), replace(directly[0], reference=0.85)
    phrases = [unsure, known, *directly, *after]
    assert surest_by_heart(phrases, 1) == [directly[0], after[0]]
    assert surest_by_heart(phrases, 2) == [*directly[:2], *after[:2]]
    assert surest_by_heart(phrases, 9) == directly + after
    assert replace(known, reference=0.75).is_by_heart
