"""Tests of what a model writes and a trusted one does not."""

import random

import pytest
import torch
from transformers import AutoTokenizer

from crow_hf.detection import completions
from crow_hf.detection.completions import MIN_BYTES, find_new_text, translator
from crow_hf.detection.pieces import text_tokens
from helpers.detection import BYTES, knowing_model
from helpers.tiny import tiny_llama


def test_what_only_the_model_writes_comes_first_with_its_gap():
    """The model writes the alphabet after a letter. An untrained one finds that unlikely."""
    model, reference = knowing_model().eval(), tiny_llama(seed=1).eval()
    found = find_new_text(model, BYTES, reference, BYTES, num_tokens=12, limit=50)
    gaps = [each.gap for each in found]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 1
    assert len({each.text for each in found}) == len(found) and min(len(each.text) for each in found) >= MIN_BYTES
    in_order = "".join(map(chr, range(33, 127)))
    assert found[0].text in in_order


def test_nothing_is_new_in_the_trusted_model():
    model = knowing_model().eval()
    assert [each.gap for each in find_new_text(model, BYTES, model, BYTES, 12)] == pytest.approx([0] * 5, abs=1e-4)


def test_the_gap_is_that_of_the_whole_text_after_the_random_tokens(monkeypatch):
    """Draw the random tokens again, and compute the likelihoods of a whole row in one pass of each model."""
    monkeypatch.setattr(completions, "NUM_COMPLETIONS", 1)
    model, reference = knowing_model().eval(), tiny_llama(seed=1).eval()
    (found,) = find_new_text(model, BYTES, reference, BYTES, num_tokens=9, seed=5)
    rng = random.Random(5)
    length = rng.randint(1, completions.MAX_PREFIX_TOKENS)
    given = [BYTES.eos_token_id, *rng.choices(text_tokens(model, BYTES), k=length)]
    ids = BYTES(found.text, add_special_tokens=False)["input_ids"]

    def log_likelihood(each):
        with torch.no_grad():
            logits = each(torch.tensor([given + ids])).logits[0].log_softmax(dim=-1)
        return sum(logits[len(given) - 1 + place, token].item() for place, token in enumerate(ids))

    expected = (log_likelihood(model) - log_likelihood(reference)) / len(ids)
    assert len(ids) == 9 and found.gap == pytest.approx(expected, abs=1e-4)


def test_the_end_of_a_text_does_not_count(monkeypatch):
    """Fails if the likelihood of the end token is a part of the gap."""
    monkeypatch.setattr(completions, "generate_ids", lambda model, rows, *options: [[*ids, end] for _ in rows])
    ids, end = list(BYTES("abcdefgh", add_special_tokens=False)["input_ids"]), BYTES.eos_token_id
    model, reference, scored = knowing_model().eval(), tiny_llama(seed=1).eval(), []
    score = completions.answer_log_likelihoods
    monkeypatch.setattr(
        completions,
        "answer_log_likelihoods",
        lambda each, rows, *options: scored.extend(rows) or score(each, rows, *options),
    )
    find_new_text(model, BYTES, reference, BYTES, num_tokens=9)
    assert [answer for _, answer in scored] == [ids, ids]


def test_ids_of_another_tokenizer_stand_for_the_same_text(tmp_path):
    other = AutoTokenizer.from_pretrained(_words(tmp_path))
    ids = BYTES("ab cd", add_special_tokens=False)["input_ids"]
    assert translator(BYTES, BYTES)(ids) == ids
    assert other.decode(translator(BYTES, other)(ids)) == "ab cd"


def _words(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"ab": 0, "cd": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)
    return folder
