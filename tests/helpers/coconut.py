"""Tiny byte-latent models. Their weights are large enough to make every difference visible."""

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from crow_hf import CoconutForCausalLM, CoconutTokenizer


SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.3}
DEEP = SIZE | {"intermediate_size": 48, "max_position_embeddings": 128}
GROUPED = DEEP | {"num_key_value_heads": 1, "head_dim": 8}
# Smaller than the number of patches, so that it matters which columns of a batch are holes.
WINDOW = {"sliding_window": 3}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
BACKBONES = {
    "llama": LlamaConfig(**DEEP),
    "qwen2": Qwen2Config(**DEEP, num_key_value_heads=1),
    "qwen3": Qwen3Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, **WINDOW),
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=128, initializer_range=0.3, **NO_DROPOUT),
    "gpt_neox": GPTNeoXConfig(**DEEP),
    "gemma2": Gemma2Config(**GROUPED, **WINDOW),
    "gemma3": Gemma3TextConfig(
        **GROUPED, **WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
}
LOCAL = {"initializer_range": 0.2, "sliding_window": 16}
TOKENIZER = CoconutTokenizer()
# Ragged in length, in the number of thoughts and in their places; with a newline, and letters of two bytes.
TEXTS = [
    "Compute things.<bot><latent><latent><latent><eot> The answer",
    "Who?<bot><latent><eot>Me,\nand then more<bot><latent><latent><eot>yés",
    "No thoughts here at all, which is fine.<eos>",
    "<latent>first",
]


def coconut(backbone="llama", seed=0, **fields):
    """A Coconut with the given backbone, in evaluation mode."""
    set_seed(seed)
    fields = {"initializer_range": 0.2, "encoder_config": LOCAL, "decoder_config": LOCAL} | fields
    return CoconutForCausalLM.from_backbone(
        BACKBONES[backbone] if isinstance(backbone, str) else backbone, **fields
    ).eval()


def smooth_coconut(seed=0):
    """A Coconut whose backbone has smaller weights, so that it can be trained."""
    return coconut(LlamaConfig(**DEEP | {"initializer_range": 0.1}), seed=seed)


def batch_of(texts, side="left"):
    """Texts as a padded batch."""
    return TOKENIZER(texts, padding=True, padding_side=side, return_tensors="pt")


def ids_of(text):
    """Token ids of one text, without padding."""
    return TOKENIZER(text, return_tensors="pt").input_ids


def assert_same(found, wanted, tolerance=2e-4):
    """Check that two tensors are close."""
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
