"""The byte vocabulary: BLT's 260 ids (4 special tokens, 256 bytes), 3 tokens of continuous thoughts, and padding."""

import torch


BOS_TOKEN_ID = 1
EOS_TOKEN_ID = 2
BYTE_OFFSET = 4
BEGIN_THOUGHT_TOKEN_ID = 260
THOUGHT_TOKEN_ID = 261
END_THOUGHT_TOKEN_ID = 262
PAD_TOKEN_ID = 263
VOCAB_SIZE = 264

NEWLINE = ord("\n")


def is_byte(input_ids: torch.Tensor) -> torch.Tensor:
    """Return a `bool` tensor of the same shape: `True` for bytes, `False` for special tokens."""
    return (input_ids >= BYTE_OFFSET) & (input_ids < BYTE_OFFSET + 256)
