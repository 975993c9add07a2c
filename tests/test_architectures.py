"""Every family of decoder: the loss is the oracle's, and training changes what has a gradient."""

import math

import pytest
import torch
from conftest import VOCABULARY, assert_equals_oracle, crow_args, pad_rows, ragged_rows, slow_crow, weights_of
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from crow_hf import CrowTrainer


SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
DEEP = SIZE | {"intermediate_size": 32, "max_position_embeddings": 64}
GROUPED = DEEP | {"num_key_value_heads": 1, "head_dim": 8}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
PER_LAYER = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 8}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}

FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, SIZE | NO_DROPOUT | {"n_positions": 64}),
    "llama": (LlamaForCausalLM, LlamaConfig, DEEP),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, GROUPED),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GROUPED | SLIDING),
    "mistral": (MistralForCausalLM, MistralConfig, GROUPED | {"sliding_window": 4}),
    "phi": (PhiForCausalLM, PhiConfig, DEEP),
    "opt": (OPTForCausalLM, OPTConfig, DEEP | {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "opt_projected": (OPTForCausalLM, OPTConfig, DEEP | {"ffn_dim": 32, "word_embed_proj_dim": 8, "dropout": 0.0}),
    "bloom": (BloomForCausalLM, BloomConfig, SIZE),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, DEEP),
    "gemma4": (Gemma4ForCausalLM, Gemma4TextConfig, GROUPED | SLIDING | PER_LAYER),
    "gemma4_shared_kv": (
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        GROUPED | SLIDING | PER_LAYER | {"num_kv_shared_layers": 2},
    ),
}
BATCH = pad_rows(ragged_rows(3, seed=4))


def build(name):
    model_class, config_class, settings = FAMILIES[name]
    set_seed(0)
    return model_class(config_class(**settings))


def trainer_of(model, tmp_path, rows, **kwargs):
    return CrowTrainer(model, crow_args(tmp_path, **kwargs), train_dataset=rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_oracle(name, tmp_path, rows):
    """The states compared are the raw outputs of all decoder layers, whatever the model calls hidden_states."""
    assert_equals_oracle(trainer_of(build(name), tmp_path, rows), BATCH)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_never_counts(name, tmp_path, rows):
    """Positions made from the mask (OPT, Bloom) must be the same in both passes and with more padding."""
    model = build(name).eval()
    trainer = trainer_of(model, tmp_path, rows)
    losses = [trainer.compute_loss(model, pad_rows(ragged_rows(3, seed=4), width)) for width in (None, 20)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_trains(name, tmp_path, rows):
    """Finite losses; exactly the parameters in which the objective has a gradient change."""
    model = build(name)
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
    """All ids share one embedding, so only the ids themselves can find their per-layer embeddings."""
    model = build(name)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[3].clone())
    other = BATCH | {"input_ids": BATCH["input_ids"].flip(1)}
    assert slow_crow(model, BATCH)["consistency_clean"] != slow_crow(model, other)["consistency_clean"]
    assert_equals_oracle(trainer_of(model, tmp_path, rows), BATCH)


def test_language_model_of_a_multimodal_checkpoint(tmp_path, rows):
    """`AutoModelForCausalLM` opens Gemma 3's larger checkpoints with their vision tower, here as deep as the decoder."""
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
