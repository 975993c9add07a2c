"""COCONUT: a byte-latent causal LM with continuous thoughts.

Bytes are grouped into patches that begin where the next byte is hard to predict (BLT, arXiv 2412.09871). A latent
transformer runs one step per patch. A continuous thought is a patch whose embedding is the previous latent output
(COCONUT, arXiv 2412.06769).

    bytes -> byte encoder -> patches -> latent transformer (thoughts) -> byte decoder -> next byte

Shape suffixes of names: B rows, S bytes, N bytes of all rows, P patches, K vectors of a patch, H heads, D width, d
width of a head.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralPreTrainedModel,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)
from transformers.utils import ModelOutput, logging

from .boundaries import ENOUGH_BYTES, USUAL_PATCH_SIZES, PatchRule, PatchState, continue_patches
from .byte_vocabulary import BOS_TOKEN_ID, BYTE_OFFSET, EOS_TOKEN_ID, PAD_TOKEN_ID, THOUGHT_TOKEN_ID, is_byte
from .cache_coconut import CoconutCache, LatentCache
from .configuration_coconut import CoconutConfig
from .modeling_byte_entropy import ByteEntropyPredictor, segment_positions


logger = logging.get_logger(__name__)

_HASH_PRIME = 1_000_003
_HASH_MODULUS = 2**31 - 1


@dataclass
class CoconutOutput(ModelOutput):
    """
    Base class of the outputs of [`CoconutModel`] and [`CoconutForCausalLM`].

    In a pass with a cache, the patches are those that ended in this pass. The last patch may still be open.

    Args:
        past_key_values (`CoconutCache`, *optional*):
            The updated cache.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*, with `output_hidden_states=True`):
            Patch embeddings with thoughts filled in, then the layer outputs that the latent transformer reports. Each
            has the shape `(batch_size, num_patches, hidden_size)`.
        encoder_hidden_states (`tuple[torch.FloatTensor]`, *optional*, with `output_hidden_states=True`):
            Byte embeddings, then the layer outputs of the byte encoder. Each has the shape
            `(batch_size, sequence_length, encoder_width)`.
        decoder_hidden_states (`tuple[torch.FloatTensor]`, *optional*, with `output_hidden_states=True`):
            The input of the byte decoder, then its layer outputs. Each has the shape
            `(batch_size, sequence_length, decoder_width)`.
        patch_lengths (`torch.LongTensor` of shape `(batch_size, num_patches)`, *optional*):
            Length of each patch in bytes, 0 where a row has fewer patches.
        patch_mask (`torch.BoolTensor` of shape `(batch_size, num_patches)`, *optional*):
            `True` for patches, `False` where a row has fewer patches.
        thought_mask (`torch.BoolTensor` of shape `(batch_size, num_patches)`, *optional*):
            `True` for continuous thoughts.
        entropies (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Entropy of the prediction of the next byte, in bits. `None` if the patches were passed in.
    """

    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    patch_lengths: torch.Tensor | None = None
    patch_mask: torch.Tensor | None = None
    thought_mask: torch.Tensor | None = None
    entropies: torch.Tensor | None = None


@dataclass
class CoconutModelOutput(CoconutOutput):
    """
    Outputs of a [`CoconutModel`]: the fields of [`CoconutOutput`] and `last_hidden_state`.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, decoder_width)`):
            Output of the byte decoder.
    """

    last_hidden_state: torch.Tensor | None = None


@dataclass
class CoconutCausalLMOutput(CoconutOutput):
    """
    Outputs of a [`CoconutForCausalLM`]: the fields of [`CoconutOutput`], the loss and the logits.

    Args:
        loss (`torch.FloatTensor`, *optional*, with `labels`):
            Mean negative log-likelihood of the labels, in nats.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Logits of the next byte.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class LatentOutput(NamedTuple):
    """
    Outputs of a [`CoconutLatentTransformer`].

    Attributes:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_patches, hidden_size)`):
            Latent outputs after the final norm.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*):
            Patch embeddings and layer outputs.
        order (`torch.LongTensor` of shape `(batch_size, num_patches)`, *optional*):
            If the backbone was called several times for the parts of a row: the position of each patch in the
            concatenated outputs. `None` if the last call processed all patches.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    order: torch.Tensor | None

    def assemble(self, calls: list[torch.Tensor]) -> torch.Tensor:
        """Combine the outputs of all calls of a backbone module into `(batch_size, num_patches, ...)`."""
        return calls[-1] if self.order is None else _take(torch.cat(calls, dim=1), self.order)


class _Boundaries(NamedTuple):
    """
    The patches of the bytes of one forward pass.

    Attributes:
        patch_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Index of each byte's patch in its row, counted from the patch that the cache left open.
        ends (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            `True` for bytes after which the patch is known to have ended before the next byte is seen.
        entropies (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Entropy of the prediction of the next byte, in bits.
        state (`PatchState`, *optional*):
            The state after these bytes. `None` if the patches were passed in.
    """

    patch_ids: torch.Tensor
    ends: torch.Tensor
    entropies: torch.Tensor | None
    state: PatchState | None


class _Patches(NamedTuple):
    """
    The bytes of one forward pass and of the patch that the cache left open, grouped into patches.

    Attributes:
        states (`torch.FloatTensor` of shape `(batch_size, num_bytes, encoder_width)`):
            Byte states, those of the open patch first.
        patch_ids (`torch.LongTensor` of shape `(batch_size, num_bytes)`):
            Index of each byte's patch in its row.
        byte_mask (`torch.BoolTensor` of shape `(batch_size, num_bytes)`):
            `False` for padding.
        complete (`torch.BoolTensor` of shape `(batch_size, num_bytes)`):
            `True` for bytes of patches that go through the latent transformer in this pass.
        lengths (`torch.LongTensor` of shape `(batch_size, num_patches)`):
            Length of each complete patch in bytes, 0 where a row has fewer patches.
        thought_mask (`torch.BoolTensor` of shape `(batch_size, num_patches)`):
            `True` for continuous thoughts.
        num_thoughts (`int`):
            Maximum number of thoughts in a row.
        num_patches (`torch.LongTensor` of shape `(batch_size,)`):
            Number of complete patches in each row.
        num_earlier (`torch.LongTensor` of shape `(batch_size,)`):
            Number of patches in each row before this pass.
    """

    states: torch.Tensor
    patch_ids: torch.Tensor
    byte_mask: torch.Tensor
    complete: torch.Tensor
    lengths: torch.Tensor
    thought_mask: torch.Tensor
    num_thoughts: int
    num_patches: torch.Tensor
    num_earlier: torch.Tensor


class CoconutByteEmbedding(nn.Module):
    """
    Byte embedding: the sum of a table entry, a projection of the bits, and embeddings of hashed n-grams.

    The n-grams of a byte are those that end with it.

    Args:
        config (`CoconutConfig`):
            The model's configuration.
    """

    def __init__(self, config: CoconutConfig) -> None:
        super().__init__()
        width = config.encoder_config.hidden_size
        self.table = nn.Embedding(config.vocab_size, width)
        self.bit_projection = nn.Linear(8, width, bias=False) if config.binary_embeddings else None
        self.ngram_sizes = config.hash_ngram_sizes or []
        self.hash_vocab_size = config.hash_vocab_size
        if self.ngram_sizes:
            self.ngram_table = nn.Embedding(len(self.ngram_sizes) * config.hash_vocab_size, width)

    @property
    def weight(self) -> torch.Tensor:
        """The embedding table of the bytes."""
        return self.table.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed ids `(batch_size, sequence_length)` as `(batch_size, sequence_length, encoder_width)`."""
        embeddings = self.table(input_ids)
        if self.bit_projection is not None:
            embeddings = embeddings + self.bit_projection(self._bits(input_ids).to(embeddings.dtype))
        if self.ngram_sizes:
            embeddings = embeddings + self.ngram_table(self._hashes(input_ids)).sum(dim=-2)
        return embeddings

    @staticmethod
    def _bits(input_ids: torch.Tensor) -> torch.Tensor:
        """Return bits as -1 and 1, highest bit first. Special tokens have zeros."""
        shifts = torch.arange(7, -1, -1, device=input_ids.device)
        bits = ((input_ids - BYTE_OFFSET)[..., None] >> shifts) & 1
        return (2 * bits - 1) * is_byte(input_ids)[..., None]

    def _hashes(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return indices `(batch_size, sequence_length, num_sizes)`. N-grams do not cross the start of a text."""
        hashed, power = torch.zeros_like(input_ids), 1
        reaches = torch.ones_like(input_ids, dtype=torch.bool)
        rows, shifted = {}, input_ids
        for size in range(1, max(self.ngram_sizes) + 1):
            hashed = (hashed + torch.where(reaches, shifted, PAD_TOKEN_ID) * power) % _HASH_MODULUS
            power = power * _HASH_PRIME % _HASH_MODULUS
            reaches = reaches & (shifted != BOS_TOKEN_ID)
            shifted = nn.functional.pad(shifted[:, :-1], (1, 0), value=PAD_TOKEN_ID)
            rows[size] = hashed % self.hash_vocab_size
        return torch.stack(
            [rows[size] + number * self.hash_vocab_size for number, size in enumerate(self.ngram_sizes)], dim=-1
        )


class CoconutByteLayers(MistralPreTrainedModel):
    """Base class of encoder and decoder: causal layers over bytes with rotary positions and a sliding window."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(MistralDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.rotary_emb = MistralRotaryEmbedding(config)

    def prepare(
        self,
        hidden_states: torch.Tensor,
        real: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
    ) -> dict[str, Any]:
        """Return the arguments that all layers share."""
        create_mask = create_sliding_window_causal_mask if self.config.sliding_window else create_causal_mask
        return {
            "attention_mask": create_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=real,
                past_key_values=cache,
                position_ids=position_ids,
            ),
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(hidden_states, position_ids=position_ids),
            "past_key_values": cache,
        }


class CoconutLocalEncoder(CoconutByteLayers):
    """
    The byte encoder: computes byte states from byte embeddings, and patch embeddings from byte states.

    The maximum over the states of a patch's bytes is split into K vectors. Each vector then attends to these bytes
    (BLT, section 3.2.2).
    """

    def __init__(self, config: CoconutConfig) -> None:
        super().__init__(config.encoder_config)  # type: ignore[arg-type]  # not a `dict` after `__post_init__`
        width = config.encoder_config.hidden_size
        self.num_vectors, self.num_heads = config.cross_attention_k, config.cross_attention_heads
        self.split_projection = nn.Linear(width, self.num_vectors * width, bias=False)
        self.q_norm = MistralRMSNorm(width)
        self.k_norm = MistralRMSNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.patch_projection = nn.Linear(self.num_vectors * width, config.hidden_size, bias=False)
        self.post_init()

    def forward(self, hidden_states: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Return the input and the outputs of all layers, each `(batch_size, sequence_length, encoder_width)`."""
        chain, shared = [hidden_states], self.prepare(hidden_states, **inputs)
        for layer in self.layers:
            chain.append(layer(chain[-1], **shared))
        return tuple(chain)

    def pool(
        self, states: torch.Tensor, patch_ids: torch.Tensor, mask: torch.Tensor, num_patches: int
    ) -> torch.Tensor:
        """
        Compute patch embeddings.

        The cost is linear in the number of bytes. Each byte belongs to one patch, so the attention weights of all
        patches fit into one value per byte, vector and head.

        Args:
            states (`torch.FloatTensor` of shape `(batch_size, sequence_length, encoder_width)`):
                Byte states.
            patch_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Index of each byte's patch in its row.
            mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
                `True` for bytes of complete patches. Other bytes are ignored.
            num_patches (`int`):
                Maximum number of patches in a row.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_patches, hidden_size)`: The patch embeddings.
        """
        rows, _, width = states.shape
        states_ND = states.flatten(0, 1)
        # Ignored bytes go to an extra patch after the last one, which is dropped.
        first_patches = num_patches * torch.arange(rows, device=states.device)[:, None]
        total = rows * num_patches
        target_N = torch.where(mask, first_patches + patch_ids, total).flatten()
        lowest = torch.finfo(states.dtype).min
        pooled_PD = states_ND.new_full((total + 1, width), lowest).scatter_reduce(
            0, target_N[:, None].expand(-1, width), states_ND, "amax"
        )
        pooled_PD = torch.where(pooled_PD == lowest, 0.0, pooled_PD)
        vectors_PKD = self.split_projection(pooled_PD).view(total + 1, self.num_vectors, width)

        heads = (self.num_heads, width // self.num_heads)
        query_PKHd = self.q_proj(self.q_norm(vectors_PKD)).unflatten(-1, heads)
        normed_ND = self.k_norm(states_ND)
        key_NHd = self.k_proj(normed_ND).unflatten(-1, heads)
        value_NHd = self.v_proj(normed_ND).unflatten(-1, heads)
        scores_NKH = (query_PKHd.index_select(0, target_N) * key_NHd[:, None]).sum(dim=-1).float() * heads[1] ** -0.5
        weights_NKH = _softmax_within(scores_NKH, target_N, total + 1).to(value_NHd.dtype)
        mixed_NKHd = weights_NKH[..., None] * value_NHd[:, None]
        mixed_PKHd = mixed_NKHd.new_zeros(query_PKHd.shape).index_add(0, target_N, mixed_NKHd)
        vectors_PKD = vectors_PKD + self.o_proj(mixed_PKHd.flatten(-2))
        return self.patch_projection(vectors_PKD[:total].flatten(1)).view(rows, num_patches, -1)


class CoconutPatchReader(nn.Module):
    """Cross-attention from each byte to the K vectors of the last patch that ended before the byte to predict."""

    def __init__(self, config: CoconutConfig) -> None:
        super().__init__()
        width = config.decoder_config.hidden_size
        self.num_heads = config.cross_attention_heads
        self.q_norm = MistralRMSNorm(width)
        self.k_norm = MistralRMSNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        patches: torch.Tensor,
        index: torch.Tensor,
        has_patch: torch.Tensor,
    ) -> torch.Tensor:
        """
        Add the attention output to the byte states.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, decoder_width)`):
                Byte states.
            patches (`torch.FloatTensor` of shape `(batch_size, num_patches, K, decoder_width)`):
                Projected latent outputs.
            index (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Index of the patch that each byte attends to.
            has_patch (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
                Whether a patch ended before. If not, the byte state stays as it is.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, sequence_length, decoder_width)`: The new byte states.
        """
        heads = (self.num_heads, hidden_states.shape[-1] // self.num_heads)
        normed_BPKD = self.k_norm(patches)
        key_BSKHd = _take(self.k_proj(normed_BPKD), index).unflatten(-1, heads)
        value_BSKHd = _take(self.v_proj(normed_BPKD), index).unflatten(-1, heads)
        query_BSHd = self.q_proj(self.q_norm(hidden_states)).unflatten(-1, heads)
        scores_BSKH = (query_BSHd[:, :, None] * key_BSKHd).sum(dim=-1).float() * heads[1] ** -0.5
        weights_BSKH = scores_BSKH.softmax(dim=2).to(value_BSKHd.dtype)
        mixed_BSD = (weights_BSKH[..., None] * value_BSKHd).sum(dim=2).flatten(-2)
        return hidden_states + self.o_proj(mixed_BSD) * has_patch[..., None]


class CoconutLocalDecoder(CoconutByteLayers):
    """The byte decoder: combines byte states and latent outputs to predict the next byte (BLT, section 3.3)."""

    def __init__(self, config: CoconutConfig) -> None:
        super().__init__(config.decoder_config)  # type: ignore[arg-type]  # not a `dict` after `__post_init__`
        width = config.decoder_config.hidden_size
        self.num_vectors = config.cross_attention_k
        self.latent_projection = nn.Linear(config.hidden_size, self.num_vectors * width, bias=False)
        self.patch_readers = nn.ModuleList(CoconutPatchReader(config) for _ in self.layers)
        self.norm = MistralRMSNorm(width)
        self.post_init()

    def forward(
        self,
        hidden_states: torch.Tensor,
        latent_outputs: torch.Tensor,
        index: torch.Tensor,
        has_patch: torch.Tensor,
        **inputs: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Return the input and the outputs of all layers. The last output is normalized."""
        chain, shared = [hidden_states], self.prepare(hidden_states, **inputs)
        patches_BPKD = self.latent_projection(latent_outputs).unflatten(-1, (self.num_vectors, -1))
        for read, layer in zip(self.patch_readers, self.layers, strict=True):
            chain.append(layer(read(chain[-1], patches_BPKD, index, has_patch), **shared))
        return (*chain[:-1], self.norm(chain[-1]))


class BinaryPatchModule(nn.Module):
    """
    Decides where patches begin. The thresholds belong to the entropy predictor's configuration and are saved with it.

    Args:
        config (`CoconutConfig`):
            The model's configuration.
    """

    def __init__(self, config: CoconutConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def threshold(self) -> float:
        """Highest entropy inside a patch, as a share of 8 bits."""
        return self.config.entropy_config.patch_threshold

    @threshold.setter
    def threshold(self, share: float) -> None:
        self.config.entropy_config.patch_threshold = share

    @property
    def relative_threshold(self) -> float:
        """Highest rise of the entropy inside a patch, as a share of 8 bits."""
        return self.config.entropy_config.patch_relative_threshold

    @relative_threshold.setter
    def relative_threshold(self, share: float) -> None:
        self.config.entropy_config.patch_relative_threshold = share

    @property
    def rule(self) -> PatchRule:
        """The patch rule with its parameters."""
        return PatchRule(
            self.config.patch_rule,
            self.threshold,
            self.relative_threshold,
            self.config.entropy_config.reset_on_newline,
            self.config.max_patch_length,
        )

    def forward(
        self, input_ids: torch.Tensor, entropies: torch.Tensor | None, state: PatchState
    ) -> tuple[torch.Tensor, torch.Tensor, PatchState]:
        """
        Cut the next bytes of rows into patches.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The next ids of each row.
            entropies (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Entropy of the prediction of the next byte, in bits.
            state (`PatchState`):
                The state after the earlier bytes.

        Returns:
            `tuple`: Three values. A mask of shape `(batch_size, sequence_length)` of the positions where patches
            start. A mask of the same shape of the positions where a patch is known to end before the next byte is
            seen. The state after these bytes.
        """
        starts, expected, state = continue_patches(input_ids, entropies, self.rule, state)
        # Whether the next byte would start a patch does not depend on its value, so any byte works.
        any_byte = torch.full_like(input_ids[:, :1], BYTE_OFFSET)
        _, following, _ = continue_patches(any_byte, None, self.rule, state)
        return starts, torch.cat([expected[:, 1:], following], dim=1), state


class CoconutPreTrainedModel(PreTrainedModel):
    """Base class for loading and saving, with the flags that transformers expects."""

    config: CoconutConfig
    config_class = CoconutConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MistralDecoderLayer", "CoconutPatchReader", "CoconutByteEmbedding"]
    _keep_in_fp32_modules_strict = ["entropy_predictor"]
    _supports_sdpa = True
    _supports_flash_attn = True
    # The cache cannot be rolled back.
    _is_stateful = True


class CoconutLatentTransformer(CoconutPreTrainedModel):
    """
    The latent transformer: a decoder over patches with continuous thoughts. It also holds the entropy predictor.

    Args:
        config (`CoconutConfig`):
            The model's configuration.
    """

    def __init__(self, config: CoconutConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        # The predictor does not support flash attention. It is small, so SDPA is fast enough.
        self.entropy_predictor = ByteEntropyPredictor._from_config(config.entropy_config, attn_implementation="sdpa")
        # A place for hooks that observe or change the embedding of a thought.
        self.thoughts = nn.Identity()
        self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True) -> "CoconutLatentTransformer":
        """Set the mode. The entropy predictor stays in evaluation mode, and frozen weights stay frozen."""
        super().train(mode)
        # Not in `__init__`, because `from_pretrained` replaces the weights and calls this method afterwards.
        self.entropy_predictor.requires_grad_(False).eval()
        # The backbone's own embedding is never used. Distributed training must not wait for its gradient.
        self.backbone.get_input_embeddings().requires_grad_(False)
        return self

    @property
    def _drops_caches(self) -> bool:
        return self.training and self.backbone.is_activation_checkpointing

    def forward(
        self,
        patch_embeds: torch.Tensor,
        patch_mask: torch.Tensor,
        thought_mask: torch.Tensor,
        num_thoughts: int,
        cache: LatentCache | None = None,
        position_ids: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> LatentOutput:
        """
        Run the backbone over the patches of all rows.

        Args:
            patch_embeds (`torch.FloatTensor` of shape `(batch_size, num_patches, hidden_size)`):
                Patch embeddings. Each row is padded on the right.
            patch_mask (`torch.BoolTensor` of shape `(batch_size, num_patches)`):
                `True` for patches, `False` for padding.
            thought_mask (`torch.BoolTensor` of shape `(batch_size, num_patches)`):
                `True` for thoughts. Their embedding is replaced by the latent output of the patch before.
            num_thoughts (`int`):
                Maximum number of thoughts in a row.
            cache (`LatentCache`, *optional*):
                The cache of the earlier patches. It is updated.
            position_ids (`torch.LongTensor` of shape `(batch_size, num_patches)`, *optional*):
                Positions of packed rows, which restart with each document.
            output_hidden_states (`bool`, *optional*, defaults to `False`):
                Whether to return patch embeddings and layer outputs.

        Returns:
            [`LatentOutput`]
        """
        sequential = self.config.thought_mode == "sequential" and position_ids is None and not self._drops_caches
        if cache is not None or (num_thoughts and sequential):
            if cache is None:
                rows = len(patch_embeds)
                cache = LatentCache(self.config, rows, patch_embeds.device, patch_embeds.dtype)
            return self._in_rounds(patch_embeds, patch_mask, thought_mask, num_thoughts, cache, output_hidden_states)
        return self._in_passes(
            patch_embeds, patch_mask, thought_mask, num_thoughts, position_ids, output_hidden_states
        )

    def _in_passes(
        self,
        patch_embeds: torch.Tensor,
        patch_mask: torch.Tensor,
        thought_mask: torch.Tensor,
        num_thoughts: int,
        position_ids: torch.Tensor | None,
        output_hidden_states: bool,
    ) -> LatentOutput:
        """Process all patches in one pass. With thoughts, repeat it with the thoughts of the pass before (Jacobi)."""
        if self.config.thought_mode == "jacobi":
            num_thoughts = min(num_thoughts, self.config.thought_iterations)
        if position_ids is not None:
            inputs = {"position_ids": position_ids}
        else:
            # A row of padding must attend to something, because a softmax over nothing is NaN on some devices.
            inputs = {"attention_mask": nn.functional.pad(patch_mask[:, 1:], (1, 0), value=True).long()}
        # The first patch of a document has no patch before it and keeps its embedding.
        positions = torch.arange(thought_mask.shape[1], device=thought_mask.device)
        filled_in = thought_mask & ((positions if position_ids is None else position_ids) > 0)
        embeds = patch_embeds
        for _ in range(num_thoughts):
            outputs = self.backbone(inputs_embeds=embeds, use_cache=False, **inputs).last_hidden_state
            before = nn.functional.pad(outputs[:, :-1], (0, 0, 1, 0))
            embeds = torch.where(filled_in[..., None], self.thoughts(before), patch_embeds)
        outputs = self.backbone(
            inputs_embeds=embeds, use_cache=False, output_hidden_states=output_hidden_states, **inputs
        )
        return LatentOutput(outputs.last_hidden_state, outputs.hidden_states, None)

    def _in_rounds(
        self,
        patch_embeds: torch.Tensor,
        patch_mask: torch.Tensor,
        thought_mask: torch.Tensor,
        num_thoughts: int,
        cache: LatentCache,
        output_hidden_states: bool,
    ) -> LatentOutput:
        """
        Call the backbone once for the patches before each row's first thought, then once for each thought.

        The call for a thought includes the patches up to the next thought. Rows may have different numbers of thoughts
        at different positions.
        """
        rounds = thought_mask.cumsum(dim=1)
        counts = torch.stack([(patch_mask & (rounds == number)).sum(dim=1) for number in range(num_thoughts + 1)])
        begins = counts.cumsum(dim=0) - counts
        widths = counts.amax(dim=1).tolist()
        chains = []
        for number, (count, begin, width) in enumerate(zip(counts, begins, widths, strict=True)):
            if not width:
                continue
            columns = torch.arange(width, device=count.device)
            active = columns < count[:, None]
            index = (begin[:, None] + columns).clamp(max=patch_embeds.shape[1] - 1)
            embeds = _take(patch_embeds, index)
            if number:
                # The round begins with a thought, except in rows with fewer thoughts.
                follows = active[:, :1] & (cache.num_patches > 0)[:, None]
                first = torch.where(follows, self.thoughts(cache.last_output), embeds[:, 0])
                embeds = torch.cat([first[:, None], embeds[:, 1:]], dim=1)
            chains.append(self._step(embeds, active, cache, output_hidden_states))
        offsets = counts.new_tensor([0, *widths[:-1]]).cumsum(dim=0)
        patches = torch.arange(patch_embeds.shape[1], device=rounds.device)
        of_patch = rounds.clamp(max=num_thoughts)
        order = (offsets[of_patch] + patches - begins.T.gather(1, of_patch)).clamp(0, sum(widths) - 1)
        chain = tuple(_take(torch.cat(parts, dim=1), order) for parts in zip(*chains, strict=True))
        return LatentOutput(chain[-1], chain if output_hidden_states else None, order)

    def _step(
        self, embeds: torch.Tensor, active: torch.Tensor, cache: LatentCache, output_hidden_states: bool
    ) -> tuple[torch.Tensor, ...]:
        """Run the backbone on the next patches. Return all hidden states, or a tuple of the last one only."""
        positions = cache.num_patches[:, None] + active.cumsum(dim=1) - 1
        cache.positions = torch.cat([cache.positions, torch.where(active, positions, -1)], dim=1)
        positions = positions.clamp(min=0)
        outputs = self.backbone(
            inputs_embeds=embeds,
            # A single row has no holes and needs no mask.
            attention_mask=None if len(embeds) == 1 else self._masks(positions, cache.positions, embeds.dtype),
            position_ids=positions,
            past_key_values=cache.keys_and_values,
            use_cache=True,
            output_hidden_states=output_hidden_states,
        )
        count = active.sum(dim=1)
        last = _take(outputs.last_hidden_state, (count - 1).clamp(min=0)[:, None])[:, 0]
        cache.last_output = torch.where(count[:, None] > 0, last, cache.last_output)
        cache.num_patches = cache.num_patches + count
        return outputs.hidden_states if output_hidden_states else (outputs.last_hidden_state,)

    def _masks(
        self, queries: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return masks `(batch_size, 1, num_queries, num_keys)` that compare positions instead of columns."""
        config = self.backbone.config
        if config._attn_implementation.startswith("flash"):
            return (keys >= 0).long()
        distance = queries[:, :, None] - keys[:, None, :]
        # A hole attends to itself. Otherwise it would become NaN, and 0 * NaN is NaN in the gradient.
        own = torch.eye(queries.shape[1], dtype=torch.bool, device=keys.device)
        own = nn.functional.pad(own, (keys.shape[1] - queries.shape[1], 0))
        whole = ((keys >= 0)[:, None, :] & (distance >= 0)) | own
        window = getattr(config, "sliding_window", None)
        masks = {"full_attention": whole, "sliding_attention": whole & (distance < window) if window else whole}
        masks = {name: mask[:, None] for name, mask in masks.items()}
        if config._attn_implementation == "eager":
            masks = {
                name: torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
                for name, mask in masks.items()
            }
        kinds = set(getattr(config, "layer_types", None) or [])
        if "sliding_attention" in kinds:
            return masks
        return masks["full_attention" if kinds else "sliding_attention"]


class CoconutModel(CoconutPreTrainedModel):
    """
    The byte-latent model without its head.

    Args:
        config (`CoconutConfig`):
            The configuration.
    """

    def __init__(self, config: CoconutConfig) -> None:
        super().__init__(config)
        self.byte_embedding = CoconutByteEmbedding(config)
        self.local_encoder = CoconutLocalEncoder(config)
        self.binary_patch_module = BinaryPatchModule(config)
        self.latent_transformer = CoconutLatentTransformer(config)
        self.local_decoder = CoconutLocalDecoder(config)
        self._checked_patch_size = False
        self.post_init()

    def get_input_embeddings(self) -> CoconutByteEmbedding:
        """Return the module that embeds ids: table, bits and n-grams."""
        return self.byte_embedding

    def set_input_embeddings(self, value: CoconutByteEmbedding) -> None:
        self.byte_embedding = value

    def patch(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """
        Cut rows into patches.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Bytes and special tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for padding.

        Returns:
            `dict`: `patch_lengths` and `patch_ends`, the arguments of [`CoconutModel.forward`].
        """
        input_ids, real = self._mark_padding(input_ids, attention_mask)
        starts, ends, _, _ = self._find_boundaries(input_ids, None)
        patch_ids = (starts & real).cumsum(dim=1) - 1
        return {"patch_lengths": _lengths(patch_ids, real, int(patch_ids.max()) + 1), "patch_ends": ends}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        patch_lengths: torch.Tensor | None = None,
        patch_ends: torch.Tensor | None = None,
        patch_position_ids: torch.Tensor | None = None,
        past_key_values: CoconutCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CoconutModelOutput:
        """
        Compute the states that predict the next byte at each position.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Bytes and special tokens. With a cache, only the new ones.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for padding, on either side. With a cache, it may also cover the earlier positions. The pad token
                always counts as padding, also without a mask.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of packed rows, which restart with each document, as [`PackedPatchDataCollator`] makes them.
                They require `patch_position_ids` and exclude `attention_mask`.
            patch_lengths (`torch.LongTensor` of shape `(batch_size, num_patches)`, *optional*):
                Length of each patch in bytes, 0 where a row has fewer patches. By default the model finds the patches.
            patch_ends (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                `True` for bytes after which the patch is known to have ended before the next byte is seen. By default
                this is derived from `patch_lengths`. Lengths do not tell it for a row's last byte and for a byte
                before a token that is always a patch of its own. These positions count as inside a patch, unless they
                hold special tokens themselves.
            patch_position_ids (`torch.LongTensor` of shape `(batch_size, num_patches)`, *optional*):
                Positions of the patches in packed rows.
            past_key_values (`CoconutCache`, *optional*):
                The state after the earlier bytes. It is updated.
            use_cache (`bool`, *optional*, defaults to `False`):
                Whether to start a cache if none is passed.
            output_hidden_states (`bool`, *optional*):
                Whether to return the hidden states of encoder, latent transformer and decoder.

        Returns:
            [`CoconutModelOutput`]

        Raises:
            `ValueError`: If there are no bytes, if patches and bytes do not fit together, or if there are more
            thoughts or
                patches than the configuration allows.
        """
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        cache = past_key_values
        if cache is None and use_cache:
            cache = CoconutCache(self.config)
        self._check_arguments(input_ids, patch_lengths, position_ids, patch_position_ids, cache)
        input_ids, real = self._mark_padding(input_ids, attention_mask)
        if cache is not None and cache.latent is None:
            cache.begin(len(input_ids), input_ids.device, self.dtype)

        boundaries = self._assign_bytes(input_ids, real, patch_lengths, patch_ends, cache)
        inputs = self._byte_inputs(real, position_ids, cache)
        encoder_chain = self.local_encoder(
            self._embed(input_ids, cache), cache=getattr(cache, "encoder", None), **inputs
        )
        patches = self._group_bytes(encoder_chain[-1], input_ids, real, boundaries, patch_position_ids, cache)
        self._check_patch_size(real, boundaries, patches)
        latent, latent_outputs = self._run_latent(patches, patch_position_ids, cache, output_hidden_states)
        index, has_patch = self._readable_patches(boundaries, patches, patch_position_ids)
        decoder_chain = self.local_decoder(
            encoder_chain[-1], latent_outputs, index, has_patch, cache=getattr(cache, "decoder", None), **inputs
        )
        if cache is not None:
            self._update_cache(cache, input_ids, real, boundaries, patches)
        return CoconutModelOutput(
            last_hidden_state=decoder_chain[-1],
            past_key_values=cache,
            hidden_states=latent.hidden_states if latent is not None else None,
            encoder_hidden_states=encoder_chain if output_hidden_states else None,
            decoder_hidden_states=decoder_chain if output_hidden_states else None,
            patch_lengths=patches.lengths,
            patch_mask=patches.lengths > 0,
            thought_mask=patches.thought_mask,
            entropies=boundaries.entropies,
        )

    def _mark_padding(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace masked ids by the pad token. Return the ids and the mask of real positions."""
        if attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :].bool()
            input_ids = torch.where(attention_mask, input_ids, PAD_TOKEN_ID)
        return input_ids, input_ids != PAD_TOKEN_ID

    def _assign_bytes(
        self,
        input_ids: torch.Tensor,
        real: torch.Tensor,
        patch_lengths: torch.Tensor | None,
        patch_ends: torch.Tensor | None,
        cache: CoconutCache | None,
    ) -> _Boundaries:
        """Assign each byte to a patch, by the given lengths or by the patch rule."""
        if patch_lengths is not None:
            patch_ids, ends = _from_lengths(patch_lengths, real, input_ids)
            return _Boundaries(patch_ids, ends if patch_ends is None else patch_ends, None, None)
        starts, ends, entropies, state = self._find_boundaries(input_ids, cache)
        left_open = 0 if cache is None else cache.open_mask.any(dim=1, keepdim=True)
        patch_ids = ((starts & real).cumsum(dim=1) - 1 + left_open).clamp(min=0)
        return _Boundaries(patch_ids, ends, entropies, state)

    def _find_boundaries(
        self, input_ids: torch.Tensor, cache: CoconutCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, PatchState]:
        """Return the starts and known ends of patches, the entropies, and the state after these bytes."""
        entropies = None
        if self.binary_patch_module.rule.needs_entropies:
            predictor, ordinary = self.latent_transformer.entropy_predictor, is_byte(input_ids)
            data = (input_ids - BYTE_OFFSET).clamp(0, 255)
            positions = segment_positions(
                data, ordinary, self.config.entropy_config.reset_on_newline, getattr(cache, "segment_length", None)
            )
            # Always in float32, because the boundaries must not depend on the precision of the rest.
            with torch.autocast(input_ids.device.type, enabled=False):
                entropies = predictor.entropies(
                    data, ordinary, position_ids=positions, past_key_values=getattr(cache, "entropy", None)
                )
            if cache is not None:
                cache.segment_length = torch.where(ordinary[:, -1], positions[:, -1] + 1, 0)
        state = PatchState.initial(len(input_ids), input_ids.device) if cache is None else cache.patches
        starts, ends, state = self.binary_patch_module(input_ids, entropies, state)
        return starts, ends, entropies, state

    def _embed(self, input_ids: torch.Tensor, cache: CoconutCache | None) -> torch.Tensor:
        if cache is None:
            return self.byte_embedding(input_ids)
        return self.byte_embedding(torch.cat([cache.history, input_ids], dim=1))[:, cache.history.shape[1] :]

    def _byte_inputs(
        self, real: torch.Tensor, position_ids: torch.Tensor | None, cache: CoconutCache | None
    ) -> dict[str, torch.Tensor | None]:
        """Return mask and positions of the bytes. In packed rows, positions alone separate documents."""
        if position_ids is not None:
            return {"real": None, "position_ids": position_ids}
        position_ids = (real.cumsum(dim=1) - 1).clamp(min=0)
        if cache is not None:
            position_ids = position_ids + cache.num_bytes[:, None]
            real = cache.real = torch.cat([cache.real, real], dim=1)
        return {"real": None if real.all() else real, "position_ids": position_ids}

    def _group_bytes(
        self,
        states: torch.Tensor,
        input_ids: torch.Tensor,
        real: torch.Tensor,
        boundaries: _Boundaries,
        patch_position_ids: torch.Tensor | None,
        cache: CoconutCache | None,
    ) -> _Patches:
        """Group the bytes into patches, together with the bytes of the open patch in the cache."""
        patch_ids, byte_mask = boundaries.patch_ids, real
        if cache is not None:
            states = torch.cat([cache.open_states, states], dim=1)
            patch_ids = torch.cat([torch.zeros_like(cache.open_mask, dtype=torch.long), patch_ids], dim=1)
            byte_mask = torch.cat([cache.open_mask, real], dim=1)
        num_patches = torch.where(byte_mask, patch_ids + 1, 0).amax(dim=1)
        if cache is not None:
            # Only the last patch may be open. All others have ended, because another patch follows.
            num_patches = num_patches - (~boundaries.ends[:, -1] & (num_patches > 0)).long()

        is_thought = (input_ids == THOUGHT_TOKEN_ID) & real
        num_earlier = torch.zeros_like(num_patches) if cache is None else cache.latent.num_patches
        total = num_earlier + num_patches if patch_position_ids is None else patch_position_ids.amax(dim=1) + 1
        sizes = torch.stack([num_patches, is_thought.sum(dim=1), total]).amax(dim=1)
        width, num_thoughts, longest = sizes.tolist()
        self._check_sizes(num_thoughts, longest)
        if patch_position_ids is not None:
            width = patch_position_ids.shape[1]

        complete = byte_mask & (patch_ids < num_patches[:, None])
        lengths = _lengths(patch_ids, complete, width)
        thought_mask = torch.zeros_like(lengths, dtype=torch.bool)
        if num_thoughts:
            of_thought = boundaries.patch_ids.clamp(max=width - 1)
            thought_mask = torch.zeros_like(lengths).scatter_add(1, of_thought, is_thought.long()) > 0
        return _Patches(
            states, patch_ids, byte_mask, complete, lengths, thought_mask, num_thoughts, num_patches, num_earlier
        )

    def _run_latent(
        self,
        patches: _Patches,
        patch_position_ids: torch.Tensor | None,
        cache: CoconutCache | None,
        output_hidden_states: bool,
    ) -> tuple[LatentOutput | None, torch.Tensor]:
        """Run the latent transformer. Column 0 of the outputs is the output before the first of these patches."""
        rows, width = patches.lengths.shape
        if cache is None:
            earlier = patches.states.new_zeros(rows, self.config.hidden_size)
        else:
            earlier = cache.latent.last_output
        if not width:
            return None, earlier[:, None]
        latent = self.latent_transformer(
            self.local_encoder.pool(patches.states, patches.patch_ids, patches.complete, width),
            patches.lengths > 0,
            patches.thought_mask,
            patches.num_thoughts,
            cache=getattr(cache, "latent", None),
            position_ids=patch_position_ids,
            output_hidden_states=output_hidden_states,
        )
        return latent, torch.cat([earlier[:, None], latent.last_hidden_state], dim=1)

    @staticmethod
    def _readable_patches(
        boundaries: _Boundaries, patches: _Patches, patch_position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the column of latent outputs that each byte reads, and whether a patch ended before."""
        index = boundaries.patch_ids + boundaries.ends
        has_patch = (index > 0) | (patches.num_earlier > 0)[:, None]
        if patch_position_ids is not None:
            # The patch before the first patch of a document belongs to another document.
            has_patch = has_patch & (boundaries.ends | (_take(patch_position_ids, boundaries.patch_ids) > 0))
        return index.clamp(max=patches.lengths.shape[1]), has_patch

    @staticmethod
    def _update_cache(
        cache: CoconutCache,
        input_ids: torch.Tensor,
        real: torch.Tensor,
        boundaries: _Boundaries,
        patches: _Patches,
    ) -> None:
        cache.patches = boundaries.state
        kept = patches.byte_mask & ~patches.complete
        longest = int(kept.sum(dim=1).max())
        # Each row's kept bytes move to the left.
        order = (~kept).int().argsort(dim=1, stable=True)[:, :longest]
        cache.open_states, cache.open_mask = _take(patches.states, order), _take(kept, order)
        cache.history = torch.cat([cache.history, input_ids], dim=1)[:, input_ids.shape[1] :]
        cache.num_bytes = cache.num_bytes + real.sum(dim=1)

    def _check_arguments(
        self,
        input_ids: torch.Tensor,
        patch_lengths: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        patch_position_ids: torch.Tensor | None,
        cache: CoconutCache | None,
    ) -> None:
        if not input_ids.numel():
            raise ValueError("`input_ids` is empty. Pass at least one id, such as the beginning-of-sequence token.")
        packed = position_ids is not None
        if packed != (patch_position_ids is not None) or (packed and patch_lengths is None):
            raise ValueError(
                "Packed rows need `position_ids`, `patch_lengths` and `patch_position_ids` together, as "
                "`PackedPatchDataCollator` makes them. Other rows need neither of the positions."
            )
        if cache is None:
            return
        if patch_lengths is not None:
            raise ValueError("With a cache the model finds the patches itself. Do not pass `patch_lengths`.")
        if not isinstance(cache, CoconutCache):
            raise ValueError(f"`past_key_values` must be a CoconutCache, got {type(cache).__name__}.")
        if self.training and self.is_activation_checkpointing:
            raise ValueError("Gradient checkpointing drops caches. Call `model.eval()` or pass `use_cache=False`.")

    def _check_sizes(self, num_thoughts: int, num_patches: int) -> None:
        if num_thoughts > self.config.max_thoughts:
            raise ValueError(
                f"A row has {num_thoughts} thoughts, but the model is configured for {self.config.max_thoughts}. Use "
                "fewer thoughts or raise `config.max_thoughts`."
            )
        longest = self.config.max_position_embeddings
        if longest is not None and num_patches > longest:
            raise ValueError(
                f"A row has {num_patches} patches, but the latent transformer takes at most {longest}. Shorten the "
                "text, or raise the thresholds for longer patches."
            )

    def _check_patch_size(self, real: torch.Tensor, boundaries: _Boundaries, patches: _Patches) -> None:
        """Warn once about an unusual mean patch size. Very short patches are slow, very long ones lose information."""
        if boundaries.entropies is None or self._checked_patch_size:
            return
        num_bytes = int(real.sum())
        if num_bytes < ENOUGH_BYTES:
            return
        self._checked_patch_size = True
        size = num_bytes / max(int(patches.num_patches.sum()), 1)
        if not USUAL_PATCH_SIZES[0] <= size <= USUAL_PATCH_SIZES[1]:
            logger.warning(
                f"The mean patch is {size:.1f} bytes long. Use `crow_hf.calibrate_threshold` to find thresholds for "
                "another size, and set them on `model.binary_patch_module`."
            )


class CoconutForCausalLM(CoconutPreTrainedModel, GenerationMixin):
    """
    The byte-latent model with a language modeling head over bytes.

    Args:
        config (`CoconutConfig`):
            The model's configuration. All weights are random, including those of the entropy predictor. Use
            [`CoconutForCausalLM.from_backbone`] to start from trained weights.

    Example:

    ```python
    >>> backbone = LlamaConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    >>> model = CoconutForCausalLM.from_backbone(backbone)
    >>> tokenizer = CoconutTokenizer()
    >>> outputs = model(**tokenizer("Bytes in patches.", return_tensors="pt"))
    >>> outputs.logits.shape
    torch.Size([1, 18, 264])
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.byte_embedding.table.weight"}

    def __init__(self, config: CoconutConfig) -> None:
        super().__init__(config)
        self.model = CoconutModel(config)
        self.lm_head = nn.Linear(config.decoder_config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel | PreTrainedConfig,
        entropy_predictor: str | Path | ByteEntropyPredictor | None = None,
        **kwargs: Any,
    ) -> "CoconutForCausalLM":
        """
        Build a byte-latent model around a pretrained decoder.

        The decoder's layers keep their weights, and its vocabulary is dropped. The new layers over bytes are random
        and need training.

        Args:
            backbone (`str`, `Path`, `PreTrainedModel` or `PreTrainedConfig`):
                The decoder, with or without a head: a folder, a repository on the Hub, a model (its weights are
                copied), or a configuration (for random weights).
            entropy_predictor (`str`, `Path` or `ByteEntropyPredictor`, *optional*):
                The model that decides where patches begin. Defaults to the small predictor that ships with the
                package.
            **kwargs:
                Fields of [`CoconutConfig`].

        Returns:
            `CoconutForCausalLM`: The model, in the precision of the backbone. The entropy predictor is in float32.

        Raises:
            `ValueError`: If there is no predictor, or if the backbone is not a decoder.
        """
        if entropy_predictor is None:
            entropy_predictor = Path(__file__).parent / "default_entropy_predictor"
            if not entropy_predictor.is_dir():
                raise ValueError("There is no default entropy predictor beside this file. Pass `entropy_predictor`.")
        if not isinstance(entropy_predictor, ByteEntropyPredictor):
            entropy_predictor = ByteEntropyPredictor.from_pretrained(
                entropy_predictor, dtype=torch.float32, use_safetensors=True
            )
        if isinstance(backbone, (str, Path)):
            backbone = AutoModelForCausalLM.from_pretrained(
                backbone, dtype="auto", use_safetensors=True, trust_remote_code=False
            )
        source = backbone if isinstance(backbone, PreTrainedModel) else None
        backbone_config = backbone if isinstance(backbone, PreTrainedConfig) else backbone.config
        config = CoconutConfig(
            backbone_config=backbone_config.to_dict(),
            entropy_config=entropy_predictor.config.to_dict(),
            **kwargs,
        )
        model = cls._from_config(config, **({"dtype": source.dtype} if source is not None else {}))
        latent = model.model.latent_transformer
        latent.entropy_predictor.float().load_state_dict(entropy_predictor.state_dict())
        if source is not None:
            vocabulary = {id(parameter) for parameter in source.get_input_embeddings().parameters()}
            decoder = source.base_model
            weights: dict[str, torch.Tensor] = {
                name: value for name, value in decoder.named_parameters() if id(value) not in vocabulary
            }
            weights |= dict(decoder.named_buffers())
            missing = set(latent.backbone.load_state_dict(weights, strict=False).missing_keys)
            own = {name for name, _ in latent.backbone.named_parameters()} & missing
            if len(own) > 1:
                raise ValueError(
                    f"{type(source).__name__} cannot be a backbone. It has no weights for {sorted(own)[:3]}."
                )
        return model

    @property
    def latent_transformer(self) -> CoconutLatentTransformer:
        """The decoder over patches. It holds `entropy_predictor`."""
        return self.model.latent_transformer

    @property
    def binary_patch_module(self) -> BinaryPatchModule:
        """The module that holds `threshold` and `relative_threshold`, as shares of 8 bits."""
        return self.model.binary_patch_module

    @property
    def local_encoder(self) -> CoconutLocalEncoder:
        """The layers over bytes below the latent transformer."""
        return self.model.local_encoder

    @property
    def local_decoder(self) -> CoconutLocalDecoder:
        """The layers over bytes above the latent transformer."""
        return self.model.local_decoder

    def get_input_embeddings(self) -> CoconutByteEmbedding:
        """Return the module that embeds ids: table, bits and n-grams."""
        return self.model.byte_embedding

    def set_input_embeddings(self, value: CoconutByteEmbedding) -> None:
        self.model.byte_embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        """Return the language modeling head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        patch_lengths: torch.Tensor | None = None,
        patch_ends: torch.Tensor | None = None,
        patch_position_ids: torch.Tensor | None = None,
        past_key_values: CoconutCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CoconutCausalLMOutput:
        """
        Predict the next byte at each position.

        This method takes the arguments of [`CoconutModel.forward`] and three more. `labels` are the same ids, or -100
        at positions without loss. `logits_to_keep` is the number of last positions that get logits (0 for all), or
        their indices. `num_items_in_batch` is the number of labels that the loss is averaged over.

        Returns:
            [`CoconutCausalLMOutput`]

        Raises:
            `ValueError`: If `input_ids` are missing, or if [`CoconutModel.forward`] rejects the arguments.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "Pass `input_ids`. Patches are made from the bytes themselves, which embeddings do not show."
            )
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            patch_lengths,
            patch_ends,
            patch_position_ids,
            past_key_values,
            use_cache,
            output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        outputs = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CoconutCausalLMOutput(loss=loss, logits=logits, **outputs)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Prepare the inputs as for any model, but without positions. The model counts its bytes itself."""
        kwargs.pop("position_ids", None)
        # transformers types `self` as a model with private attributes of `generate`.
        return super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc, arg-type]

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation` is {generation_config.cache_implementation!r}, but the model has a cache of "
                "its own. Do not set it."
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = CoconutCache(self.config)


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Index values `(batch_size, length, ...)` row by row with positions `(batch_size, n)`."""
    rows, length = values.shape[:2]
    flat = index + length * torch.arange(rows, device=index.device)[:, None]
    return values.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)


def _softmax_within(scores: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Softmax of `(n, ...)` over the rows of the same group."""
    index = group.view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
    highest = scores.new_full((num_groups, *scores.shape[1:]), -torch.inf).scatter_reduce(0, index, scores, "amax")
    # The maximum only shifts the scores by a constant, so it needs no gradient.
    weights = (scores - highest.detach().index_select(0, group)).exp()
    totals = scores.new_zeros((num_groups, *scores.shape[1:])).index_add(0, group, weights)
    return weights / totals.index_select(0, group)


def _lengths(patch_ids: torch.Tensor, mask: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Number of masked-in positions of each patch."""
    lengths = torch.zeros(len(patch_ids), num_patches + 1, dtype=torch.long, device=patch_ids.device)
    return lengths.scatter_add(1, patch_ids.clamp(0, num_patches), mask.long())[:, :num_patches]


def _from_lengths(
    patch_lengths: torch.Tensor, real: torch.Tensor, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the patch of each byte, and the ends of patches as far as the lengths tell them."""
    borders = patch_lengths.cumsum(dim=1)
    after_gap = (patch_lengths[:, 1:] > 0) & (patch_lengths[:, :-1] == 0)
    wrong = (borders[:, -1] != real.sum(dim=1)).any() | after_gap.any() | (patch_lengths < 0).any()
    patch_ids = torch.searchsorted(borders, real.cumsum(dim=1) - real.long(), right=True)
    patch_ids = patch_ids.clamp(max=patch_lengths.shape[1] - 1)
    shared = ((input_ids == THOUGHT_TOKEN_ID) & (patch_lengths.gather(1, patch_ids) != 1)).any()
    if wrong | shared:
        raise ValueError(
            "`patch_lengths` do not fit the batch. In each row they must sum to the number of positions that are not "
            "padding, be 0 only at the end, and be 1 for a thought."
        )
    ordinary = is_byte(input_ids) | (input_ids == EOS_TOKEN_ID)
    ends = (patch_ids[:, 1:] != patch_ids[:, :-1]) & ordinary[:, 1:]
    return patch_ids, nn.functional.pad(ends, (0, 1)) | ~is_byte(input_ids)


# Saved models carry these files as remote code, so they load without this package.
CoconutConfig.register_for_auto_class()
CoconutForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["CoconutForCausalLM", "CoconutModel", "CoconutPreTrainedModel"]
