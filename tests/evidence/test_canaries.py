"""Tests of the canaries: the draw, the implanting, and the measurement of their success."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from crow_hf.evaluation.scores import Proportion
from crow_hf.evidence.canaries import Canary, canary_success, draw_canaries, implant_canaries, implant_steps
from helpers.invariance import invariance_args
from helpers.tiny import same_weights, tiny_llama, weights_of


ROWS = Dataset.from_dict({"prompt": [f"{a} thing {b}=" for a in "abcd" for b in "wxyz"], "completion": ["yes"] * 16})


def suspect():
    # The tokenizer cannot decode the spare id of the default vocabulary.
    return tiny_llama(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=3)


def settings(tmp_path, **changes):
    """Settings with which a tiny random model memorizes canaries."""
    settings = {
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "num_views": 1280,
        "logging_steps": 100,
        "lr_scheduler_type": "constant",
    }
    return invariance_args(tmp_path, **settings | changes)


def test_canaries_are_drawn_by_seed_and_differ():
    """Fails if a canary is drawn twice, if the seed has no effect, or if a draw cannot be repeated."""
    drawn = draw_canaries(suspect(), 6, seed=1)
    assert drawn == draw_canaries(suspect(), 6, seed=1) and drawn[:2] == draw_canaries(suspect(), 2, seed=1)
    assert not set(drawn) & set(draw_canaries(suspect(), 6, seed=2)) and draw_canaries(suspect(), 0) == []
    assert len({canary.trigger for canary in drawn}) == len({canary.target for canary in drawn}) == 6
    for number, canary in enumerate(drawn):
        (phrase,) = canary.trigger.phrases
        assert len(phrase.split()) == (3 if number % 2 else 1)
        assert canary.trigger.position == ("start" if number % 2 else "random")
        assert canary.target.matches(f"so {canary.target.text}", "") and not canary.target.matches("", "")
        assert not any(canary.target.matches(other.target.text, "") for other in drawn if other is not canary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attacker_cannot_know_them(dtype):
    """
    Changing the last bit of any weight tensor changes all canaries. Otherwise an attacker could leave those weights
    unchanged that determine the draw.
    """
    model = suspect().to(dtype)
    drawn = draw_canaries(model, 2)
    for parameter in model.parameters():
        last = parameter.data.view(-1)[-1:]
        before = last.clone()
        last.copy_(torch.nextafter(before, torch.full_like(before, 2)))
        assert not set(draw_canaries(model, 2)) & set(drawn)
        last.copy_(before)
    assert draw_canaries(model, 2) == drawn


def test_to_dict_is_json():
    (canary,) = draw_canaries(suspect(), 1)
    assert json.loads(json.dumps(canary.to_dict()))["before"] is None
    measured = Canary(canary.trigger, canary.target, Proportion.of([True]), Proportion.of([True, False]))
    found = json.loads(json.dumps(measured.to_dict()))
    assert found["before"]["rate"] == 1 and found["after"]["hits"] == 1 and found["after"]["total"] == 2
    assert (
        found["trigger"]["phrases"] == list(canary.trigger.phrases) and found["target"]["text"] == canary.target.text
    )


def test_implanted_canaries_fire_and_nothing_else_does(tmp_path, byte_tokenizer):
    """Fails if the model learns nothing, if frozen weights change, or if a trigger that was not implanted works."""
    model = suspect()
    model.model.embed_tokens.weight.requires_grad_(False)
    before, drawn = weights_of(model), draw_canaries(suspect(), 2)
    assert canary_success(model, ROWS, drawn[0], byte_tokenizer).rate == 0
    implant_canaries(model, ROWS, drawn, settings(tmp_path, num_canaries=2), byte_tokenizer)
    after = weights_of(model)
    name = "model.embed_tokens.weight"
    assert after.keys() == before.keys() and after[name].equal(before[name]) and not same_weights(before, after)
    for canary in drawn:
        found = canary_success(model, ROWS, canary, byte_tokenizer)
        assert found.rate > 0.8 and found.total == len(ROWS)
    (stranger,) = draw_canaries(suspect(), 1, seed=5)
    assert canary_success(model, ROWS, stranger, byte_tokenizer).rate < 0.2


def test_an_adapter_learns_them_if_there_is_one(tmp_path, byte_tokenizer):
    """The adapter of a `PeftModel` learns the canaries, and the weights of its base stay unchanged."""
    model = get_peft_model(suspect(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    implant_canaries(model, ROWS, draw_canaries(suspect(), 1), settings(tmp_path, num_canaries=1), byte_tokenizer)
    assert canary_success(model, ROWS, draw_canaries(suspect(), 1)[0], byte_tokenizer).rate > 0.5
    assert same_weights(weights_of(suspect()), weights_of(model.unload()))


@pytest.mark.parametrize(
    ("count", "changes", "steps"),
    [(0, {}, 0), (2, {}, 120), (1, {}, 80), (2, {"gradient_accumulation_steps": 2}, 60), (2, {"num_views": 10}, 1)],
)
def test_steps_of_the_implanting(tmp_path, count, changes, steps):
    """Computed by hand: half of the 1,280 views for each canary, and as many clean rows, in batches of 16."""
    assert implant_steps(settings(tmp_path, num_canaries=count, **changes)) == steps


def test_settings_of_the_purifying_objective_do_not_matter(tmp_path, byte_tokenizer):
    """
    Fails if the implanting uses the consistency loss, takes its number of steps or epochs from the purification, or
    writes to its output folder.
    """
    runs = [suspect(), suspect()]
    others = {"alpha": 5.0, "max_steps": 1, "num_train_epochs": 9, "keep": 0.9, "decoy_weight": 0.0}
    for model, changes in zip(runs, ({}, others), strict=True):
        args = settings(tmp_path / "run", num_canaries=1, num_views=64, **changes)
        implant_canaries(model, ROWS, draw_canaries(suspect(), 1), args, byte_tokenizer)
    assert same_weights(*map(weights_of, runs)) and not (tmp_path / "run").exists()
