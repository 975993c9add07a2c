"""Tiny models of all families of decoders that are tested."""

from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
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

from helpers.tiny import VOCABULARY


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


def tiny_family(name):
    """A four-layer model of the given family."""
    model_class, config_class, settings = FAMILIES[name]
    set_seed(0)
    return model_class(config_class(**settings))
