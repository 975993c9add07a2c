"""Configuration of the byte-entropy predictor."""

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig


@strict
class ByteEntropyConfig(MistralConfig):
    """
    Configuration of a [`ByteEntropyPredictor`]: a small Mistral-shaped causal LM over the 256 bytes.

    The defaults are those of the project's guide. Every other field is one of [`~transformers.MistralConfig`]. The names of
    the guide, `num_layers`, `num_heads` and `ff_dim`, are accepted too.

    Args:
        vocab_size (`int`, *optional*, defaults to 256):
            A byte is its own id; there are no special tokens.
        hidden_size (`int`, *optional*, defaults to 512):
            Width.
        num_hidden_layers (`int`, *optional*, defaults to 4):
            Layers.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of each layer.
        intermediate_size (`int`, *optional*, defaults to 2048):
            Width of the gated feed-forward layer.
        max_position_embeddings (`int`, *optional*, defaults to 512):
            Context in bytes: longer texts are scored in overlapping windows of this length.
        sliding_window (`int`, *optional*):
            How many bytes, its own included, a layer looks back; all of them by default. With it, windows over a long
            text give the same entropies as one long pass.
        reset_on_newline (`bool`, *optional*, defaults to `True`):
            Whether the context begins anew at each newline byte, with positions from 0 (BLT, section 4.4): repetitive
            text does not become ever less surprising.
        patch_threshold (`float`, *optional*, defaults to 0.8):
            Highest entropy inside a patch, in bits. Thresholds do not transfer between predictors, so each carries its own.
        patch_relative_threshold (`float`, *optional*, defaults to 0.1):
            Highest rise of the entropy inside a patch, in bits.
    """

    model_type = "byte_entropy"
    attribute_map = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ff_dim": "intermediate_size",
    }

    vocab_size: int = 256
    hidden_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    intermediate_size: int = 2048
    max_position_embeddings: int = 512
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    reset_on_newline: bool = True
    patch_threshold: float = 0.8
    patch_relative_threshold: float = 0.1

    def __post_init__(self, **kwargs):
        # Before the parent derives the number of key-value heads from them.
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        super().__post_init__(**kwargs)

    @property
    def receptive_field(self) -> int | None:
        """How many bytes, the last included, a prediction depends on; `None` if on all of them."""
        if self.sliding_window is None:
            return None
        return self.num_hidden_layers * (self.sliding_window - 1) + 1


__all__ = ["ByteEntropyConfig"]
