"""The byte-entropy predictor: a causal LM over bytes whose uncertainty tells where patches begin."""

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
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    reset_on_newline: bool = True,
    seen: torch.LongTensor | None = None,
) -> torch.LongTensor:
    """
    Positions that begin at 0 with the first real byte and, if wanted, again with each newline.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Bytes.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            0 for padding, on either side. Padding has position 0 too: it is cut off from everything else.
        reset_on_newline (`bool`, *optional*, defaults to `True`):
            Whether a newline begins a segment, of which it is the first byte.
        seen (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            How many bytes of the first segment came before; none by default.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`: The distance to the beginning of the segment.
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
    A causal LM over bytes: rotary positions, optional sliding window, a context that begins anew at newlines.

    The plain [`~transformers.Trainer`] trains it, on `input_ids` and `labels` that are bytes (0 to 255).

    Args:
        config (`ByteEntropyConfig`, *optional*):
            The configuration. Without one, it is made of the keyword arguments.
        **kwargs:
            Fields of [`ByteEntropyConfig`], if no `config` is given.

    Example:

    ```python
    >>> predictor = ByteEntropyPredictor(vocab_size=256, hidden_size=512, num_layers=4, num_heads=8, ff_dim=2048)
    >>> predictor.entropies(torch.tensor([list(b"entropy")])).shape
    torch.Size([1, 7])
    ```
    """

    config_class = ByteEntropyConfig
    # It knows no mask that keeps segments apart.
    _supports_flash_attn = False

    def __init__(self, config: ByteEntropyConfig | None = None, **kwargs: Any) -> None:
        if config is not None and kwargs:
            raise TypeError(f"Pass a config or its fields, not both: got a config and {sorted(kwargs)}.")
        super().__init__(ByteEntropyConfig(**kwargs) if config is None else config)
        # Elsewhere inferred from the name of the class.
        self.loss_type = "ForCausalLM"

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        reset_on_newline: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Predict the next byte at each position.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Bytes.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for padding, on either side. Not looked at with a filled cache: `position_ids` say it all.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Distance to the beginning of the segment, where the context begins: [`segment_positions`] by default. They
                must be given with a filled cache, which does not know where its last newline was.
            past_key_values (`Cache`, *optional*):
                The cache of the bytes before.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The same bytes, -100 where there is nothing to learn.
            reset_on_newline (`bool`, *optional*):
                Overrides the configuration.
            **kwargs:
                As for [`~transformers.MistralForCausalLM`].

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: `logits` of shape
            `(batch_size, sequence_length, vocab_size)`.

        Raises:
            `ValueError`: If the cache is filled and `position_ids` are missing, or there are no `input_ids`.
        """
        if input_ids is None:
            raise ValueError("Pass `input_ids`: the context is cut at newlines, which embeddings do not show.")
        reset_on_newline = self.config.reset_on_newline if reset_on_newline is None else reset_on_newline
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            if seen:
                raise ValueError("With a filled cache pass `position_ids`, the bytes since the last newline.")
            if not reset_on_newline and attention_mask is None:
                return super().forward(input_ids, past_key_values=past_key_values, labels=labels, **kwargs)
            position_ids = segment_positions(input_ids, attention_mask, reset_on_newline)

        begin = seen + torch.arange(input_ids.shape[1], device=input_ids.device) - position_ids
        window = self.config.sliding_window or math.inf

        def in_segment_and_window(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            return (key <= query) & (key > query - window) & (key >= begin[batch, query - seen])

        length = input_ids.shape[1]
        keys, first_key = (length, 0) if past_key_values is None else past_key_values.get_mask_sizes(length, 0)
        mask = ALL_MASK_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            batch_size=len(input_ids),
            q_length=length,
            kv_length=keys,
            q_offset=seen,
            kv_offset=first_key,
            mask_function=in_segment_and_window,
            allow_is_causal_skip=False,
            device=input_ids.device,
            dtype=self.dtype,
        )
        return super().forward(
            input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        kwargs["position_ids"] = segment_positions(input_ids, attention_mask, self.config.reset_on_newline)
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def entropies(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        unit: Literal["bits", "nats"] = "bits",
        **kwargs: Any,
    ) -> torch.FloatTensor:
        """
        How uncertain the next byte is: `entropies[:, i]` is about byte `i + 1`, given the bytes up to `i`.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Bytes.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for padding, on either side.
            unit (`str`, *optional*, defaults to `"bits"`):
                `"bits"` or `"nats"`.
            **kwargs:
                For [`~ByteEntropyPredictor.forward`].

        Returns:
            `torch.FloatTensor` of shape `(batch_size, sequence_length)`, in float32: Between 0 and 8 bits; 0 for padding.
        """
        if unit not in ("bits", "nats"):
            raise ValueError(f"`unit` must be 'bits' or 'nats', got {unit!r}.")
        logits = self(input_ids, attention_mask, use_cache=False, **kwargs).logits
        # Not torch.special.entr, which is several times as slow on a CPU.
        log_probabilities = logits.float().log_softmax(dim=-1)
        entropies = -torch.linalg.vecdot(log_probabilities.exp(), log_probabilities)
        if attention_mask is not None:
            entropies = entropies * attention_mask
        return entropies / NATS_PER_BIT if unit == "bits" else entropies


__all__ = ["ByteEntropyPredictor", "segment_positions"]
