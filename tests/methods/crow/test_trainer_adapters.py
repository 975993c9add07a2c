"""Tests of CrowTrainer with PEFT adapters."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from helpers.crow import BATCH, build, lora
from helpers.oracles import assert_equals_oracle
from helpers.tiny import same_weights, weights_of


def base_and_adapter(model):
    """Copies of the frozen weights and of the adapter weights."""
    weights = weights_of(model)
    adapter = {name: weight for name, weight in weights.items() if "lora_" in name}
    return {name: weight for name, weight in weights.items() if name not in adapter}, adapter


def save_adapter(model, path):
    """Save an adapter that looks trained: B is random instead of zero."""
    adapted = get_peft_model(model, lora())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(path)
    return path


def assert_only_the_adapter_trains(trainer):
    base, adapter = base_and_adapter(trainer.model)
    trainer.train()
    new_base, new_adapter = base_and_adapter(trainer.model)
    assert base and same_weights(base, new_base)
    assert adapter and not any(torch.equal(adapter[name], new_adapter[name]) for name in adapter)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fresh_lora(checkpointing, tmp_path, rows, tiny_llama):
    """The base weights stay bit-identical. With checkpointing, the frozen embeddings still need a gradient."""
    settings = {"activation_checkpointing": checkpointing, "learning_rate": 1e-2, "max_steps": 3}
    trainer = build(tmp_path, tiny_llama(), rows, peft_config=lora(), **settings)
    assert isinstance(trainer.model, PeftModel)
    assert_only_the_adapter_trains(trainer)


def test_an_adapter_of_another_name_is_refused(tmp_path, rows, tiny_llama):
    """Fails if it is trained, because a checkpoint cannot hold it."""
    model = get_peft_model(tiny_llama(), lora(), adapter_name="chat")
    with pytest.raises(ValueError, match="active adapter is 'chat'.*'default': save it, and load it"):
        build(tmp_path, model, rows)


def test_fresh_lora_equals_oracle(tmp_path, rows, tiny_llama):
    assert_equals_oracle(build(tmp_path, tiny_llama(), rows, peft_config=lora()), BATCH)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_existing_adapter_is_trained_on(checkpointing, tmp_path, rows, tiny_llama):
    path = save_adapter(tiny_llama(), tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), path, is_trainable=True)
    settings = {"activation_checkpointing": checkpointing, "learning_rate": 1e-2, "max_steps": 3}
    trainer = build(tmp_path, model, rows, **settings)
    if not checkpointing:
        assert_equals_oracle(trainer, BATCH)
        model.zero_grad()
    assert_only_the_adapter_trains(trainer)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "new_lora"])
def test_merged_adapter(peft, tmp_path, rows, tiny_llama):
    """After merge_and_unload, the model is an ordinary one that contains the adapter's changes."""
    path = save_adapter(tiny_llama(), tmp_path / "adapter")
    merged = PeftModel.from_pretrained(tiny_llama(), path).merge_and_unload()
    assert not same_weights(weights_of(merged), weights_of(tiny_llama()))
    # PEFT froze the weights while they were the base of an adapter.
    merged.requires_grad_(True)
    trainer = build(tmp_path, merged, rows, peft_config=lora() if peft else None, learning_rate=1e-2, max_steps=3)
    assert_equals_oracle(trainer, BATCH)
    trainer.model.zero_grad()
    before = weights_of(trainer.model)
    if peft:
        assert_only_the_adapter_trains(trainer)
    else:
        trainer.train()
        assert not any(torch.equal(before[name], weight) for name, weight in weights_of(trainer.model).items())


def test_saved_adapter_loads(tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(), rows, peft_config=lora(), learning_rate=1e-2, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved")
    found, wanted = (base_and_adapter(model)[1] for model in (reloaded, trainer.model))
    assert same_weights(found, wanted)


def test_adapter_and_peft_config(tmp_path, rows, tiny_llama):
    """A second adapter is refused, because the backdoored one would stay in place."""
    with pytest.raises(ValueError, match="merge_and_unload"):
        build(tmp_path, get_peft_model(tiny_llama(), lora()), rows, peft_config=lora())


def test_frozen_adapter(tmp_path, rows, tiny_llama):
    path = save_adapter(tiny_llama(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable"):
        build(tmp_path, PeftModel.from_pretrained(tiny_llama(), path), rows)
