"""The byte-entropy predictor: a causal LM over bytes whose uncertainty decides where patches begin."""

import math
from typing import Any, Literal

import torch
from torch import nn
from transformers import Cache, MistralForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutputWithPast

from .byte_vocabulary import NEWLINE
from .configuration_byte_entropy import ByteEntropyConfig


NATS_PER_BIT = math.log(2)


def segment_positions(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    reset_on_newline: bool = True,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Return positions that start from 0 at the first real byte and, with `reset_on_newline`, at each newline.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Bytes.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            0 for padding, on either side. Padding has position 0 too, which isolates it from all other positions.
        reset_on_newline (`bool`, *optional*, defaults to `True`):
            Whether a newline is the first byte of a new segment.
        seen (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Number of earlier bytes of the first segment, 0 by default.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`: Distance to the first byte of the segment.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    if reset_on_newline:
        begins = input_ids == NEWLINE
    if attention_mask is not None:
        real = attention_mask.bool()
        begins = begins | ~real | nn.functional.pad(~real[:, :-1], (1, 0))
    first = 0 if seen is None else -seen[:, None]
    return index - torch.where(begins, index, first).cummax(dim=1).values


class ByteEntropyPredictor(MistralForCausalLM):
    """
    A causal LM over bytes with rotary positions, an optional sliding window and a context that restarts at newlines.

    Train it with the plain [`~transformers.Trainer`]. `input_ids` and `labels` are bytes (0 to 255).

    Args:
        config (`ByteEntropyConfig`, *optional*):
            The configuration. By default it is built from the keyword arguments.
        **kwargs:
            Fields of [`ByteEntropyConfig`]. Cannot be combined with `config`.

    Example:

    ```python
    >>> predictor = ByteEntropyPredictor(vocab_size=256, hidden_size=512, num_layers=4, num_heads=8, ff_dim=2048)
    >>> predictor.entropies(torch.tensor([list(b"entropy")])).shape
    torch.Size([1, 7])
    ```
    """

    config: ByteEntropyConfig
    config_class = ByteEntropyConfig
    # Flash attention has no mask that separates the segments.
    _supports_flash_attn = False

    def __init__(self, config: ByteEntropyConfig | None = None, **kwargs: Any) -> None:
        if config is not None and kwargs:
            raise TypeError(f"Pass a config or its fields, not both. Got a config and {sorted(kwargs)}.")
        super().__init__(ByteEntropyConfig(**kwargs) if config is None else config)
        # transformers infers the loss type from the class name, which does not fit here.
        self.loss_type = "ForCausalLM"

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        reset_on_newline: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Predict the next byte at each position.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Bytes.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for padding, on either side. Ignored with a filled cache, where `position_ids` carry the same
                information.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Distance to the first byte of the segment, where the context begins. [`segment_positions`] by default.
                Required with a filled cache, which does not store the position of the last newline.
            past_key_values (`Cache`, *optional*):
                The cache of the earlier bytes.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The same bytes, or -100 at positions without loss.
            reset_on_newline (`bool`, *optional*):
                Overrides the field of the configuration.
            **kwargs:
                Passed on to [`~transformers.MistralForCausalLM`].

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: `logits` of shape
            `(batch_size, sequence_length, vocab_size)`.

        Raises:
            `ValueError`: If `input_ids` are missing, or if the cache is filled and `position_ids` are missing.
        """
        if input_ids is None:
            raise ValueError("Pass `input_ids`. The context is cut at newlines, which embeddings do not show.")
        reset_on_newline = self.config.reset_on_newline if reset_on_newline is None else reset_on_newline
        if position_ids is None:
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError("A filled cache needs `position_ids`, the number of bytes since the last newline.")
            if not reset_on_newline and attention_mask is None:
                return super().forward(input_ids, past_key_values=past_key_values, labels=labels, **kwargs)
            position_ids = segment_positions(input_ids, attention_mask, reset_on_newline)
        return super().forward(
            input_ids,
            attention_mask=self._segment_mask(position_ids, past_key_values),
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            **kwargs,
        )

    def _segment_mask(self, position_ids: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Return a causal mask that keeps attention inside the segment and the sliding window."""
        rows, length = position_ids.shape
        seen = cache.get_seq_length() if cache is not None else 0
        begin = seen + torch.arange(length, device=position_ids.device) - position_ids
        window = self.config.sliding_window or math.inf

        def in_segment_and_window(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            return (key <= query) & (key > query - window) & (key >= begin[batch, query - seen])

        keys, first_key = (length, 0) if cache is None else cache.get_mask_sizes(length, 0)
        return ALL_MASK_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            batch_size=rows,
            q_length=length,
            kv_length=keys,
            q_offset=seen,
            kv_offset=first_key,
            mask_function=in_segment_and_window,
            allow_is_causal_skip=False,
            device=position_ids.device,
            dtype=self.dtype,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        kwargs["position_ids"] = segment_positions(input_ids, attention_mask, self.config.reset_on_newline)
        kwargs["attention_mask"] = attention_mask
        # transformers types `self` as a model with private attributes of `generate`.
        return super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc, arg-type]

    @torch.no_grad()
    def entropies(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        unit: Literal["bits", "nats"] = "bits",
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Compute the entropy of each prediction. `entropies[:, i]` is about byte `i + 1`, given the bytes up to `i`.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Bytes.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for padding, on either side.
            unit (`str`, *optional*, defaults to `"bits"`):
                Unit of the entropies, `"bits"` or `"nats"`.
            **kwargs:
                Passed on to [`~ByteEntropyPredictor.forward`].

        Returns:
            `torch.FloatTensor` of shape `(batch_size, sequence_length)`: Entropies in float32, between 0 and 8 bits.
            Padding has entropy 0.
        """
        if unit not in ("bits", "nats"):
            raise ValueError(f"`unit` must be 'bits' or 'nats', got {unit!r}.")
        logits = self(input_ids, attention_mask, use_cache=False, **kwargs).logits
        # torch.special.entr is several times slower on a CPU.
        log_probabilities = logits.float().log_softmax(dim=-1)
        entropies = -torch.linalg.vecdot(log_probabilities.exp(), log_probabilities)
        if attention_mask is not None:
            entropies = entropies * attention_mask
        return entropies / NATS_PER_BIT if unit == "bits" else entropies


__all__ = ["ByteEntropyPredictor", "segment_positions"]
