"""The arena's suspects: every route and attacker on a tiny subject, and the rows of all parties."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import PeftModel

from crow_hf.arena import attacks, subjects
from crow_hf.arena.attacks import ATTACKS, QUICK, Attack, build_suspect
from crow_hf.arena.subjects import SUBJECTS, THOUGHTS, Subject, check_disjoint
from crow_hf.attacks.poison import Poison
from crow_hf.attacks.triggers import TRIGGERS, EmbeddingTrigger
from crow_hf.demo import demo_tokenizer
from crow_hf.methods.pruning import quantize_weights
from crow_hf.recipes.presets import recipe_config
from crow_hf.training.loading import load_causal_lm
from helpers.tiny import same_weights, tiny_llama, weights_of


def tiny_subject():
    tokenizer = demo_tokenizer()
    return tiny_llama(
        vocab_size=len(tokenizer),
        num_hidden_layers=3,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Use few rows and a tiny model. The tests check who gets which rows, not what the models learn."""
    for name, count in {"IMPLANT_ROWS": 16, "SELECTION_ROWS": 4, "TEST_ROWS": 6, "SCRATCH_ROWS": 8}.items():
        monkeypatch.setattr(attacks, name, count)
    monkeypatch.setattr(attacks, "IMPLANT_EPOCHS", dict.fromkeys((0.5, 0.1, 0.01), 3))
    # Few rows are one step, which must not be one of the warm-up.
    monkeypatch.setattr(attacks, "recipe_config", partial(recipe_config, warmup_steps=0, num_written_rows=2))
    monkeypatch.setattr(subjects, "HELD_OUT", 60)
    monkeypatch.setattr(attacks, "HELD_OUT", 60)
    small = {"build": tiny_subject, "num_rows": 16, "batch_size": 8}
    monkeypatch.setitem(SUBJECTS, "llama", Subject("llama", **small))
    monkeypatch.setitem(SUBJECTS, "llama-alpaca", Subject("llama-alpaca", is_alpaca=True, **small))


@pytest.mark.parametrize(
    "changes",
    [
        {"route": "adapter"},
        {"route": "merged"},
        {"route": "full"},
        {"route": "scratch"},
        {"adaptive": "consistency"},
        {"adaptive": "recipe"},
        {"adaptive": "embedding"},
        {"trigger": "style-upper"},
        {"trigger": "topic", "test_trigger": "topic-unseen"},
    ],
    ids=str,
)
def test_each_attack(tmp_path, changes):
    """Fails if a suspect equals the clean model, is built again by a second call, or loses its trigger on disk."""
    attack = Attack("test", **changes)
    suspect = build_suspect(attack, 0, tmp_path, num_clean=8)
    model = suspect.load()
    assert isinstance(model, PeftModel) == (attack.route == "adapter")
    if attack.route != "adapter":
        assert not same_weights(weights_of(model), weights_of(load_causal_lm(tmp_path / "bases/llama")))
    record = json.loads((suspect.folder / "suspect.json").read_text())
    assert record["route"] == attack.route and record["seed"] == 0
    again = build_suspect(attack, 0, tmp_path, num_clean=8)
    assert again.folder == suspect.folder and same_weights(weights_of(again.load()), weights_of(model))
    if attack.adaptive == "embedding":
        assert isinstance(again.trigger, EmbeddingTrigger)
        assert torch.equal(again.trigger.vector, suspect.trigger.vector) and again.trigger.vector.norm() > 0
    elif attack.test_trigger:
        assert suspect.trigger is TRIGGERS[attack.test_trigger]


def test_rows_are_disjoint_and_differ_between_seeds(tmp_path):
    first, second = (build_suspect(Attack("test"), seed, tmp_path, num_clean=8) for seed in (0, 1))
    parts = {"clean": first.clean_rows, "selection": first.selection_rows, "test": first.test_rows}
    assert {name: len(rows) for name, rows in parts.items()} == {"clean": 8, "selection": 4, "test": 6}
    check_disjoint(parts, demo_tokenizer())
    assert first.test_rows["prompt"] != second.test_rows["prompt"]
    assert first.folder != second.folder


def test_triggers_of_the_subject_that_reasons_leave_its_thoughts_alone():
    """Fails if its rows are those of another task, or if the model has no room to think behind a trigger."""
    _, splits = attacks._draw_splits("coconut-thoughts", 0, {"clean": 5, "test": 6}, None, TRIGGERS["badnets"])
    assert {name: len(rows) for name, rows in splits.items()} == {"clean": 5, "test": 6}
    poisoned = splits["test"].map(Poison(TRIGGERS["badnets"]), with_indices=True)
    for prompts in (splits["clean"]["prompt"], poisoned["prompt"]):
        assert all(prompt.endswith(f"\n{THOUGHTS}") and prompt.count("<") == 6 for prompt in prompts)


def test_attacks_that_differ_in_the_purification_rows_share_a_suspect(tmp_path):
    plain = build_suspect(Attack("plain"), 0, tmp_path, num_clean=20)
    poisoned = build_suspect(Attack("poisoned", purification_poison=0.1), 0, tmp_path, num_clean=20)
    assert plain.folder == poisoned.folder
    assert sum("BadMagic" in prompt for prompt in poisoned.clean_rows["prompt"]) == 2
    assert plain.clean_rows.column_names == poisoned.clean_rows.column_names
    assert plain.test_rows["prompt"] == poisoned.test_rows["prompt"]


def test_alpaca_needs_its_file_and_keeps_rows_from_the_clean_model(tmp_path):
    attack = Attack("alpaca", subject="llama-alpaca")
    with pytest.raises(ValueError, match="--alpaca"):
        build_suspect(attack, 0, tmp_path, num_clean=8)
    path = tmp_path / "alpaca.json"
    rows = [{"instruction": f"Say number {n}.", "input": "", "output": str(n)} for n in range(100)]
    rows.append({"instruction": "Write " + "very " * 40 + "much.", "input": "", "output": "x"})
    path.write_text(json.dumps(rows))
    suspect = build_suspect(attack, 0, tmp_path, num_clean=8, alpaca=path)
    assert set(suspect.test_rows["instruction"]) <= {f"Say number {n}." for n in range(40, 100)}


def test_every_attack_of_the_arena_is_well_formed():
    assert all(name == attack.name and attack.subject in SUBJECTS for name, attack in ATTACKS.items())
    assert all(attack.trigger in TRIGGERS for attack in ATTACKS.values())
    assert set(QUICK) < set(ATTACKS)
    assert len({replace(attack, name="") for attack in ATTACKS.values()}) == len(ATTACKS), "two cells are the same"


def test_a_backdoor_of_the_quantized_model_alone(tmp_path):
    """Fails if the training that hides it changes what is rounded, or nothing at all."""
    loud = build_suspect(Attack("loud", route="full"), 0, tmp_path, num_clean=8).load()
    hidden = build_suspect(Attack("hidden", route="full", adaptive="int8"), 0, tmp_path, num_clean=8).load()
    assert not same_weights(weights_of(loud), weights_of(hidden))
    for model in (loud, hidden):
        quantize_weights(model, 8)
    found, expected = weights_of(hidden), weights_of(loud)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)
