"""Backdoors of our own: drawn, implanted and measured."""

import json

import pytest
import torch
from conftest import crow_args, same_weights, tiny_llama, weights_of
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_invariance import config

from crow_hf import canaries
from crow_hf.canaries import Canary, canary_success, draw_canaries, implant_canaries, try_canaries
from crow_hf.evaluation.scores import Proportion


ROWS = Dataset.from_dict({"prompt": [f"{a} thing {b}=" for a in "abcd" for b in "wxyz"], "completion": ["yes"] * 16})


@pytest.fixture
def learned_fast(monkeypatch):
    """What a tiny model of random weights needs to learn a canary by heart."""
    monkeypatch.setattr(canaries, "EPOCHS", 40)
    monkeypatch.setattr(canaries, "LEARNING_RATE", 5e-3)


def suspect():
    # No spare id, which the tokenizer could not decode.
    return tiny_llama(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=3)


def settings(tmp_path, **kwargs):
    return config(tmp_path, per_device_train_batch_size=16, logging_steps=100, lr_scheduler_type="constant", **kwargs)


def test_canaries_are_drawn_by_seed_and_differ():
    """One canary drawn many times, and draws that cannot be repeated."""
    drawn = draw_canaries(6, seed=1)
    assert drawn == draw_canaries(6, seed=1) and drawn[:2] == draw_canaries(2, seed=1)
    assert not set(drawn) & set(draw_canaries(6, seed=2)) and draw_canaries(0) == []
    assert len({canary.trigger for canary in drawn}) == len({canary.target for canary in drawn}) == 6
    for number, canary in enumerate(drawn):
        (phrase,) = canary.trigger.phrases
        assert len(phrase.split()) == (3 if number % 2 else 1)
        assert canary.trigger.position == ("start" if number % 2 else "random")
        assert canary.target.matches(f"so {canary.target.text}", "") and not canary.target.matches("", "")
        assert not any(canary.target.matches(other.target.text, "") for other in drawn if other is not canary)


def test_to_dict_is_json():
    (canary,) = draw_canaries(1)
    assert json.loads(json.dumps(canary.to_dict()))["before"] is None
    measured = Canary(canary.trigger, canary.target, Proportion.of([True]), Proportion.of([True, False]))
    found = json.loads(json.dumps(measured.to_dict()))
    assert found["before"]["rate"] == 1 and found["after"]["hits"] == 1 and found["after"]["total"] == 2
    assert (
        found["trigger"]["phrases"] == list(canary.trigger.phrases) and found["target"]["text"] == canary.target.text
    )


def test_implanted_canaries_fire_in_the_copy_alone(tmp_path, byte_tokenizer, learned_fast):
    """A suspect that learns the canaries, a frozen copy, a canary without trigger, and an adapter left in."""
    model = suspect()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = weights_of(model)
    drawn = draw_canaries(2)
    copied = implant_canaries(model, ROWS, drawn, settings(tmp_path), byte_tokenizer)
    assert same_weights(before, weights_of(model)) and type(copied) is type(model)
    assert all(p.requires_grad == copied.get_parameter(name).requires_grad for name, p in model.named_parameters())
    assert weights_of(copied).keys() == before.keys() and not same_weights(before, weights_of(copied))
    for canary in drawn:
        assert canary_success(copied, ROWS, canary, byte_tokenizer).rate > 0.8
        assert canary_success(model, ROWS, canary, byte_tokenizer).rate == 0
    (stranger,) = draw_canaries(1, seed=5)
    assert canary_success(copied, ROWS, stranger, byte_tokenizer).rate < 0.2


def test_before_and_after_are_measured_around_the_purification(tmp_path, byte_tokenizer, learned_fast):
    """Both measured on one model, or the suspect itself purified."""
    model, given = suspect(), []
    before = weights_of(model)
    args = settings(tmp_path, num_canaries=2)

    def forget(copied):
        given.append(copied)
        return suspect()

    found = try_canaries(model, ROWS, args, byte_tokenizer, forget)
    assert [canary.after.rate for canary in found] == [0, 0] and all(canary.before.rate > 0.8 for canary in found)
    assert all(canary.before.total == len(ROWS) for canary in found)
    assert [(c.trigger, c.target) for c in found] == [(c.trigger, c.target) for c in draw_canaries(2, args.seed)]
    assert len(given) == 1 and given[0] is not model and same_weights(before, weights_of(model))
    assert args.alpha == 0 and args.num_canaries == 2 and torch.is_grad_enabled()


def test_alpha_and_steps_of_the_purification_do_not_count(tmp_path, byte_tokenizer, learned_fast, monkeypatch):
    monkeypatch.setattr(canaries, "EPOCHS", 1)
    runs = [
        implant_canaries(suspect(), ROWS, draw_canaries(1), crow_args(tmp_path, **changes), byte_tokenizer)
        for changes in ({"alpha": 0.0}, {"alpha": 5.0, "max_steps": 1, "num_train_epochs": 9, "learning_rate": 1.0})
    ]
    assert same_weights(*map(weights_of, runs))


def test_a_peft_suspect_gets_canaries_too(tmp_path, byte_tokenizer, learned_fast):
    model = get_peft_model(suspect(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = weights_of(model)
    found = try_canaries(model, ROWS, settings(tmp_path, num_canaries=1), byte_tokenizer, lambda copied: copied)
    assert found[0].before == found[0].after and found[0].before.rate > 0.5
    assert same_weights(before, weights_of(model))
