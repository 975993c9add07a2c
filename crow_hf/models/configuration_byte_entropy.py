"""Configuration of the byte-entropy predictor."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig

from .boundaries import PatchRule


@strict
class ByteEntropyConfig(MistralConfig):
    """
    Configuration of a [`ByteEntropyPredictor`]: a small Mistral-shaped causal LM over the 256 bytes.

    The defaults come from the project's guide. All other fields are those of [`~transformers.MistralConfig`]. The
    guide's names `num_layers`, `num_heads` and `ff_dim` are accepted too.

    Args:
        vocab_size (`int`, *optional*, defaults to 256):
            Vocabulary size. The id of a byte is its value, and there are no special tokens.
        hidden_size (`int`, *optional*, defaults to 512):
            Dimension of the hidden states.
        num_hidden_layers (`int`, *optional*, defaults to 4):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of attention heads per layer.
        intermediate_size (`int`, *optional*, defaults to 2048):
            Dimension of the gated feed-forward layer.
        max_position_embeddings (`int`, *optional*, defaults to 512):
            Context length in bytes. Longer texts are scored in overlapping windows of this length.
        sliding_window (`int`, *optional*):
            Number of bytes that a layer attends to, including the current one. By default a layer attends to all. With
            a sliding window, overlapping windows over a long text give the same entropies as one long pass.
        reset_on_newline (`bool`, *optional*, defaults to `True`):
            Whether the context restarts at each newline byte, with positions from 0 (BLT, section 4.4). Without it,
            repetitive text becomes ever less surprising.
        patch_threshold (`float`, *optional*, defaults to 0.8):
            Highest entropy inside a patch, as a share of 8 bits. Thresholds do not transfer between predictors, so
            each predictor carries its own.
        patch_relative_threshold (`float`, *optional*, defaults to 0.1):
            Highest rise of the entropy inside a patch, as a share of 8 bits.

    Raises:
        `StrictDataclassError`: If a threshold is not between 0 and 1.
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

    def __post_init__(self, **kwargs: Any) -> None:
        # The parent class derives the number of key-value heads from these fields, so they are set first.
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        super().__post_init__(**kwargs)

    def validate_thresholds(self) -> None:
        """Raise a `ValueError` if a threshold is not between 0 and 1."""
        PatchRule(threshold=self.patch_threshold, relative_threshold=self.patch_relative_threshold)

    def validate_window(self) -> None:
        """Raise a `ValueError` if the sliding window is too short."""
        check_window(self.sliding_window, "sliding_window")

    @property
    def receptive_field(self) -> int | None:
        """Number of bytes that a prediction depends on, including the last one. `None` if it depends on all."""
        if self.sliding_window is None:
            return None
        return self.num_hidden_layers * (self.sliding_window - 1) + 1


def check_window(size: int | None, name: str) -> None:
    """Raise a `ValueError` for a sliding window of one byte, which transformers' cache takes for no window (5.23)."""
    if size is not None and size < 2:
        raise ValueError(f"`{name}` must be at least 2 bytes, or `None` for no window, got {size}.")


__all__ = ["ByteEntropyConfig"]
