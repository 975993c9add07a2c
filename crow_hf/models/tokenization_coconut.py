"""The tokenizer of the byte-latent model: one token per byte."""

from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from .byte_vocabulary import (
    BEGIN_THOUGHT_TOKEN_ID,
    BOS_TOKEN_ID,
    BYTE_OFFSET,
    END_THOUGHT_TOKEN_ID,
    EOS_TOKEN_ID,
    PAD_TOKEN_ID,
    THOUGHT_TOKEN_ID,
)


class CoconutTokenizer(PreTrainedTokenizer):
    """
    A tokenizer over UTF-8 bytes with BLT's ids: 4 special tokens, 256 bytes, 3 tokens of continuous thoughts, and
    padding.

    It needs no vocabulary files. A text begins with `<bos>` and has no end token. Bytes that are not valid UTF-8 are
    decoded to the replacement character, `\ufffd`.

    Args:
        prepend_bos (`bool`, *optional*, defaults to `True`):
            Whether a text begins with `<bos>`.
        padding_side (`str`, *optional*, defaults to `"left"`):
            Side of the padding. Generation needs padding on the left.

    Example:

    ```python
    >>> tokenizer = CoconutTokenizer()
    >>> tokenizer("a<bot><latent><eot>").input_ids
    [1, 101, 260, 261, 262]
    ```
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, prepend_bos: bool = True, padding_side: str = "left", **kwargs: Any) -> None:
        tokens = {
            0: "<boe>",
            BOS_TOKEN_ID: kwargs.pop("bos_token", "<bos>"),
            EOS_TOKEN_ID: kwargs.pop("eos_token", "<eos>"),
            3: "<bpe>",
            BEGIN_THOUGHT_TOKEN_ID: "<bot>",
            THOUGHT_TOKEN_ID: "<latent>",
            END_THOUGHT_TOKEN_ID: "<eot>",
            PAD_TOKEN_ID: kwargs.pop("pad_token", "<pad>"),
        }
        self.prepend_bos = prepend_bos
        self._added_tokens_decoder = {
            index: token if isinstance(token, AddedToken) else AddedToken(token, special=True, normalized=False)
            for index, token in tokens.items()
        }
        named = {"bos_token": BOS_TOKEN_ID, "eos_token": EOS_TOKEN_ID, "pad_token": PAD_TOKEN_ID}
        kwargs.setdefault("extra_special_tokens", [str(tokens[index]) for index in tokens.keys() - named.values()])
        super().__init__(
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            **{name: self._added_tokens_decoder[index] for name, index in named.items()},
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Number of bytes, without special tokens."""
        return 256

    def get_vocab(self) -> dict[str, int]:
        """Return tokens and their ids. The token of a byte is the character with its value as code point."""
        return {chr(byte): byte + BYTE_OFFSET for byte in range(256)} | self.added_tokens_encoder

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return `<bos>`, the first text, and the second text if there is one."""
        begin = [BOS_TOKEN_ID] if self.prepend_bos else []
        return [*begin, *token_ids_0, *(token_ids_1 or [])]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Decode tokens to text. Bytes that are not valid UTF-8 become the replacement character."""
        special = self.added_tokens_encoder
        data = (token.encode() if token in special else bytes([ord(token)]) for token in tokens)
        return b"".join(data).decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Do nothing, because the tokenizer has no vocabulary files."""
        return ()

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(byte) for byte in text.encode("utf-8")]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) + BYTE_OFFSET

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index - BYTE_OFFSET)


CoconutTokenizer.register_for_auto_class("AutoTokenizer")

__all__ = ["CoconutTokenizer"]
