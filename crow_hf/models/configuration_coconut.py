"""Configuration of the byte-latent model."""

from typing import Any, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, MistralConfig, PreTrainedConfig

from .boundaries import PatchRule
from .byte_vocabulary import BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID, VOCAB_SIZE
from .configuration_byte_entropy import ByteEntropyConfig, check_window


ThoughtMode = Literal["sequential", "recompute", "jacobi"]
# The defaults of `LlamaConfig` describe a model of seven billion parameters.
_SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


@strict
class CoconutConfig(PreTrainedConfig):
    """
    Configuration of a [`CoconutForCausalLM`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the latent transformer over patches: any decoder-only model of transformers that accepts
            `inputs_embeds` and `position_ids`. It needs no vocabulary, so its `vocab_size` is set to 1. By default a
            Llama of four layers and a width of 256.
        encoder_config (`MistralConfig` or `dict`, *optional*):
            Configuration of the byte encoder, the layers below the latent transformer. By default one layer of half
            the backbone's width with a sliding window of 512 bytes.
        decoder_config (`MistralConfig` or `dict`, *optional*):
            Configuration of the byte decoder, the layers above the latent transformer. It has the width of the
            encoder, and three layers by default.
        entropy_config (`ByteEntropyConfig` or `dict`, *optional*):
            Configuration of the frozen entropy predictor, which decides where patches begin. It carries the
            thresholds.
        vocab_size (`int`, *optional*, defaults to 264):
            Vocabulary size: BLT's 260 ids, three tokens of continuous thoughts, and padding.
        patch_rule (`str`, *optional*, defaults to `"either"`):
            One of [`~models.boundaries.RULES`], except `"whitespace"`, which depends on the byte to predict.
        max_patch_length (`int`, *optional*):
            Maximum length of a patch in bytes. Longer patches are cut.
        cross_attention_heads (`int`, *optional*):
            Number of heads of the cross-attention between bytes and patches. Defaults to the encoder's number of
            heads.
        cross_attention_k (`int`, *optional*, defaults to 2):
            Number of vectors of the encoder's width that represent a patch between the byte layers and the latent
            transformer (BLT, section 3.2.2).
        binary_embeddings (`bool`, *optional*, defaults to `True`):
            Whether a learned projection of the eight bits of a byte is added to its embedding.
        hash_ngram_sizes (`list[int]`, *optional*):
            Lengths of the byte n-grams that are hashed and embedded with each byte (BLT, section 3.2.1). By default
            there are no n-gram embeddings.
        hash_vocab_size (`int`, *optional*, defaults to 30000):
            Number of embeddings for each n-gram length.
        max_thoughts (`int`, *optional*, defaults to 8):
            Maximum number of continuous thoughts in a row.
        thought_mode (`str`, *optional*, defaults to `"sequential"`):
            How a forward pass without a cache computes thoughts.

            - `"sequential"` computes one thought after the other and reuses the keys and values of the patches before.
            - `"recompute"` runs one pass over all patches for each thought and one final pass, with the same result.
              `"sequential"` falls back to it under gradient checkpointing, which drops keys and values, and in packed
              rows.
            - `"jacobi"` runs `thought_iterations` passes that update all thoughts at once. This is an approximation.
              It is exact if there are at least as many iterations as thoughts.
        thought_iterations (`int`, *optional*, defaults to 3):
            Number of iterations of the mode `"jacobi"`.
        initializer_range (`float`, *optional*):
            Standard deviation of the random initial weights, except those of the backbone and of the entropy
            predictor. Defaults to one over the square root of the encoder's width, as in BLT.

    Raises:
        `ValueError`: If the configurations of the parts do not fit together.
    """

    model_type = "coconut"
    sub_configs = {
        "backbone_config": AutoConfig,
        "encoder_config": MistralConfig,
        "decoder_config": MistralConfig,
        "entropy_config": ByteEntropyConfig,
    }
    # What the Trainer evaluates are the logits alone.
    keys_to_ignore_at_inference = [
        *("past_key_values", "hidden_states", "encoder_hidden_states", "decoder_hidden_states"),
        *("patch_lengths", "patch_mask", "thought_mask", "entropies"),
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    encoder_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    entropy_config: dict | PreTrainedConfig | None = None
    vocab_size: int = VOCAB_SIZE
    patch_rule: str = "either"
    max_patch_length: int | None = None
    cross_attention_heads: int | None = None
    cross_attention_k: int = 2
    binary_embeddings: bool = True
    hash_ngram_sizes: list[int] | None = None
    hash_vocab_size: int = 30_000
    max_thoughts: int = 8
    thought_mode: str = "sequential"
    thought_iterations: int = 3
    initializer_range: float | None = None
    bos_token_id: int | None = BOS_TOKEN_ID
    eos_token_id: int | list[int] | None = EOS_TOKEN_ID
    pad_token_id: int | None = PAD_TOKEN_ID
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        backbone = self.backbone_config or LlamaConfig(**_SMALL_LLAMA, initializer_range=256**-0.5)
        backbone = dict(backbone) if isinstance(backbone, dict) else backbone.to_dict()
        # The inputs are patches, which have no token ids.
        backbone |= {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        self.backbone_config = AutoConfig.for_model(**backbone)
        if self.backbone_config.is_encoder_decoder:
            raise ValueError(
                f"The latent transformer must be a decoder, but {self.backbone_config.model_type} is not one."
            )
        self.encoder_config = self._local_config(self.encoder_config, 1)
        self.decoder_config = self._local_config(self.decoder_config, 3)
        entropy = self.entropy_config or ByteEntropyConfig()
        entropy = dict(entropy) if isinstance(entropy, dict) else entropy.to_dict()
        # The predictor's head has the same name as the model's head, and transformers matches tied weights by parts of
        # names when it infers a device map.
        self.entropy_config = ByteEntropyConfig(**entropy | {"tie_word_embeddings": False})
        if self.initializer_range is None:
            self.initializer_range = self.encoder_config.hidden_size**-0.5
        if self.cross_attention_heads is None:
            self.cross_attention_heads = self.encoder_config.num_attention_heads
        super().__post_init__(**kwargs)

    def _local_config(self, config: dict | PreTrainedConfig | None, num_hidden_layers: int) -> MistralConfig:
        if isinstance(config, MistralConfig):
            return config
        width = -(-self.backbone_config.hidden_size // 64) * 32
        defaults = {
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": width // 32,
            "max_position_embeddings": 2**20,
            "sliding_window": 512,
        }
        config = {**defaults, **(config or {}), "vocab_size": 1, "bos_token_id": None, "eos_token_id": None}
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        config.setdefault("initializer_range", config["hidden_size"] ** -0.5)
        return MistralConfig(**config)

    def validate_architecture(self) -> None:
        """Raise a `ValueError` if the configurations of the parts do not fit together."""
        if self.entropy_config.vocab_size != 256:
            raise ValueError(
                f"The entropy predictor has a vocabulary of {self.entropy_config.vocab_size}, but needs the 256 bytes."
            )
        if self.encoder_config.hidden_size != self.decoder_config.hidden_size:
            raise ValueError(
                f"The byte encoder is {self.encoder_config.hidden_size} wide and the byte decoder "
                f"{self.decoder_config.hidden_size}. Both must be equally wide."
            )
        for name in ("encoder_config", "decoder_config"):
            check_window(getattr(self, name).sliding_window, f"{name}.sliding_window")
        if self.encoder_config.hidden_size % self.cross_attention_heads:
            raise ValueError(
                f"`cross_attention_heads`={self.cross_attention_heads} does not divide the width of the byte encoder, "
                f"{self.encoder_config.hidden_size}."
            )
        if self.patch_rule == "whitespace":
            raise ValueError("The patch rule 'whitespace' depends on the byte to predict. Choose another rule.")
        PatchRule(self.patch_rule, max_patch_length=self.max_patch_length)
        if self.thought_mode not in get_args(ThoughtMode):
            raise ValueError(
                f"`thought_mode` must be one of {', '.join(get_args(ThoughtMode))}, got {self.thought_mode!r}."
            )
        for name, least in {"cross_attention_k": 1, "max_thoughts": 0, "thought_iterations": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if any(size < 2 for size in self.hash_ngram_sizes or ()):
            raise ValueError(f"`hash_ngram_sizes` must be lengths of at least 2 bytes, got {self.hash_ngram_sizes}.")

    # Fields that transformers expects from every decoder. They describe the latent transformer.
    @property
    def hidden_size(self) -> int:
        """Width of the latent transformer."""
        return self.backbone_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of the latent transformer."""
        return self.backbone_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Number of attention heads of the latent transformer."""
        return self.backbone_config.num_attention_heads

    @property
    def max_position_embeddings(self) -> int | None:
        """Maximum number of patches in a row. A row of this many bytes always fits."""
        return getattr(self.backbone_config, "max_position_embeddings", None)


__all__ = ["CoconutConfig"]
