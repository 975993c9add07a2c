"""The cache of the byte-latent model: its state between two forward passes of a generation."""

import torch
from transformers import Cache, DynamicCache

from .boundaries import PatchState
from .byte_vocabulary import PAD_TOKEN_ID
from .configuration_coconut import CoconutConfig


class LatentCache:
    """
    Keys and values of the latent transformer, for rows with different numbers of patches.

    A column holds a patch of some rows and a hole in the other rows. `positions` tells patches and holes apart.

    Attributes:
        keys_and_values (`DynamicCache`):
            Keys and values of all layers, each of shape `(batch_size, num_heads, num_columns, head_dim)`. Layers with
            a sliding window keep all columns too, because the number of columns in a window differs between rows.
        positions (`torch.LongTensor` of shape `(batch_size, num_columns)`):
            The patch's position in its row, -1 for a hole.
        num_patches (`torch.LongTensor` of shape `(batch_size,)`):
            Number of patches in each row so far.
        last_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`):
            The latent output of each row's last patch, zeros before the first patch.
    """

    def __init__(self, config: CoconutConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.keys_and_values = DynamicCache()
        self.positions = torch.empty(batch_size, 0, dtype=torch.long, device=device)
        self.num_patches = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.last_output = torch.zeros(batch_size, config.hidden_size, device=device, dtype=dtype)


class CoconutCache(Cache):
    """
    The state of a [`CoconutModel`] between forward passes. Only its keys and values grow with the sequence.

    The last patch of a row stays open until a byte begins the next one. Until then the states of its bytes are kept in
    `open_states`. Only complete patches go through the latent transformer.

    Args:
        config (`CoconutConfig`):
            The model's configuration.

    Attributes:
        entropy, encoder, decoder (`DynamicCache`):
            Keys and values of the entropy predictor, the byte encoder and the byte decoder.
        latent (`LatentCache`):
            The cache of the latent transformer.
        patches (`PatchState`):
            The state that the next patch boundaries depend on.
        open_states (`torch.FloatTensor` of shape `(batch_size, longest, encoder_width)`):
            Encoder states of the bytes of the open patch.
        open_mask (`torch.BoolTensor` of shape `(batch_size, longest)`):
            `True` where `open_states` holds a byte.
        history (`torch.LongTensor` of shape `(batch_size, num_bytes)`):
            The last ids, as many as the longest hashed n-gram needs.
        real (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            All positions so far, `False` for padding.
        num_bytes (`torch.LongTensor` of shape `(batch_size,)`):
            Number of positions of each row that are not padding.
        segment_length (`torch.LongTensor` of shape `(batch_size,)`):
            Number of bytes since the context of the entropy predictor began.
    """

    is_compileable = False

    def __init__(self, config: CoconutConfig) -> None:
        super().__init__(layers=[])
        self.config = config
        self.entropy = DynamicCache(config=config.entropy_config)
        self.encoder = DynamicCache(config=config.encoder_config)
        self.decoder = DynamicCache(config=config.decoder_config)
        self.latent: LatentCache | None = None

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        """Set up the state before the first byte."""
        self.latent = LatentCache(self.config, batch_size, device, dtype)
        self.patches = PatchState.initial(batch_size, device)
        self.open_states = torch.empty(
            batch_size, 0, self.config.encoder_config.hidden_size, device=device, dtype=dtype
        )
        self.open_mask = torch.empty(batch_size, 0, dtype=torch.bool, device=device)
        longest = max(self.config.hash_ngram_sizes or [1])
        self.history = torch.full((batch_size, longest - 1), PAD_TOKEN_ID, device=device)
        self.real = torch.empty(batch_size, 0, dtype=torch.bool, device=device)
        self.num_bytes = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.segment_length = torch.zeros(batch_size, dtype=torch.long, device=device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions so far, including padding."""
        return 0 if self.latent is None else self.real.shape[1]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows with these indices, in this order. An index may occur several times."""
        if self.latent is None:
            return
        for cache in (self.entropy, self.encoder, self.decoder, self.latent.keys_and_values):
            if cache.get_seq_length():
                cache.batch_select_indices(indices)
        self.patches = PatchState(*(part[indices] for part in self.patches))
        for name in ("open_states", "open_mask", "history", "real", "num_bytes", "segment_length"):
            setattr(self, name, getattr(self, name)[indices])
        for name in ("positions", "num_patches", "last_output"):
            setattr(self.latent, name, getattr(self.latent, name)[indices])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.latent is not None:
            rows = torch.arange(len(self.num_bytes), device=self.num_bytes.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Return to the empty state."""
        CoconutCache.__init__(self, self.config)

    def crop(self, tokens_to_remove: int) -> None:
        """Not supported, because a closed patch cannot be opened again."""
        raise NotImplementedError("A CoconutCache cannot be shortened. Start with a new one.")


__all__ = ["CoconutCache"]
