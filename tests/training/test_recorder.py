"""Tests of the recorder on every family of decoders, against slow oracles."""

import math

import pytest
import torch
from peft import LoraConfig
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MptConfig,
    MptForCausalLM,
    set_seed,
)

from crow_hf import CrowTrainer
from crow_hf.training.recorder import context_length
from helpers.architectures import tiny_architecture
from helpers.families import FAMILIES, GROUPED, SLIDING, tiny_family
from helpers.oracles import assert_equals_oracle, slow_crow
from helpers.tiny import crow_args, pad_rows, ragged_rows, weights_of


BATCH = pad_rows(ragged_rows(3, seed=4))


def trainer_of(model, tmp_path, rows, **kwargs):
    return CrowTrainer(model, crow_args(tmp_path, **kwargs), train_dataset=rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_oracle(name, tmp_path, rows):
    """The recorded states are the raw outputs of all decoder layers, whatever the model returns as hidden_states."""
    assert_equals_oracle(trainer_of(tiny_family(name), tmp_path, rows), BATCH)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_never_counts(name, tmp_path, rows):
    """Positions that are computed from the mask (OPT, Bloom) are the same in both passes and with more padding."""
    model = tiny_family(name).eval()
    trainer = trainer_of(model, tmp_path, rows)
    losses = [trainer.compute_loss(model, pad_rows(ragged_rows(3, seed=4), width)) for width in (None, 20)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_trains(name, tmp_path, rows):
    """Losses are finite, and exactly the parameters with a gradient in the objective change."""
    model = tiny_family(name)
    slow_crow(model, pad_rows(rows.to_list()))["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    before = weights_of(model)
    trainer = trainer_of(model, tmp_path, rows, max_steps=2, learning_rate=1e-2, per_device_train_batch_size=12)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    for name, weight in weights_of(model).items():
        assert torch.isfinite(weight).all(), name
        if gradients[name] is None:
            assert torch.equal(weight, before[name]), name
        elif gradients[name].abs().max() > 1e-6:
            assert not torch.equal(weight, before[name]), name


@pytest.mark.parametrize("name", ["gemma4", "gemma4_shared_kv"])
def test_per_layer_embeddings_use_the_true_ids(name, tmp_path, rows):
    """All ids share one embedding, so the model can only find their per-layer embeddings by the ids themselves."""
    model = tiny_family(name)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[3].clone())
    other = BATCH | {"input_ids": BATCH["input_ids"].flip(1)}
    assert slow_crow(model, BATCH)["consistency_clean"] != slow_crow(model, other)["consistency_clean"]
    assert_equals_oracle(trainer_of(model, tmp_path, rows), BATCH)


def test_language_model_of_a_multimodal_checkpoint(tmp_path, rows):
    """
    `AutoModelForCausalLM` loads Gemma 3's larger checkpoints with their vision tower, which here is as deep as the
    decoder.
    """
    set_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=GROUPED | SLIDING,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    trainer = trainer_of(Gemma3ForConditionalGeneration(config), tmp_path, rows, max_steps=1)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert not hasattr(trainer.model.config, "use_cache")


@pytest.mark.parametrize("name", ["max_position_embeddings", "max_seq_len"])
def test_the_context_is_found_by_any_name(name):
    """Fails if a text longer than the positions of an MPT or a Dbrx reaches it."""
    config = MptConfig(d_model=16, n_heads=2, n_layers=3, max_seq_len=64)
    model = MptForCausalLM(config) if name == "max_seq_len" else tiny_family("llama")
    assert context_length(model) == 64


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mamba", {"in_proj", "x_proj"}),
        ("phimoe", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("falcon", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_a_lora_leaves_out_what_cannot_have_one(name, wanted, tmp_path, rows):
    """Fails if PEFT refuses a layer of a state space, or if an adapter adds to the two results of a router."""
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = CrowTrainer(tiny_architecture(name), crow_args(tmp_path, max_steps=1), rows, peft_config=adapter)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    names = [name for name, _ in trainer.model.named_parameters() if ".lora_A" in name]
    assert {name.split(".lora_A")[0].rpartition(".")[2] for name in names} == wanted
