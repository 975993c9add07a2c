"""A tiny Blt model."""

import torch
from transformers import BltConfig, BltForCausalLM


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}


def tiny_blt(seed=0):
    """A Blt with small patches and random weights."""
    torch.manual_seed(seed)
    local = SMALL | {"hidden_size_global": 32, "cross_attn_k": 2}
    return BltForCausalLM(
        BltConfig(
            encoder_hash_byte_group_size=[3],
            encoder_hash_byte_group_vocab=50,
            patching_threshold=5.4,
            max_patch_length=3,
            patcher_config=SMALL | {"num_hidden_layers": 2, "initializer_range": 0.5},
            encoder_config=local | {"num_hidden_layers": 1},
            decoder_config=local | {"num_hidden_layers": 2},
            global_config=SMALL | {"hidden_size": 32, "num_hidden_layers": 4},
        )
    )
