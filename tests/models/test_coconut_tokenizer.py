"""Tests of the byte tokenizer: encoding loses nothing, and decoding accepts any ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from crow_hf.models.configuration_coconut import CoconutConfig
from crow_hf.models.tokenization_coconut import CoconutTokenizer


TOKENIZER = CoconutTokenizer()
SPECIAL = {"<boe>": 0, "<bos>": 1, "<eos>": 2, "<bpe>": 3, "<bot>": 260, "<latent>": 261, "<eot>": 262, "<pad>": 263}


def test_ids_by_hand():
    assert TOKENIZER("a<bot><latent><eot>é").input_ids == [1, 101, 260, 261, 262, 199, 173]
    assert TOKENIZER("a", "b").input_ids == [1, 101, 102]
    assert CoconutTokenizer(prepend_bos=False)("a").input_ids == [101]
    assert {token: TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL} == SPECIAL
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (1, 2, 263)
    assert len(TOKENIZER) == len(TOKENIZER.get_vocab()) == 264


@given(st.text().filter(lambda text: not any(token in text for token in SPECIAL)))
def test_decoding_restores_the_text(text):
    """Fails if white space, control characters, line ends or letters of several bytes change."""
    ids = TOKENIZER(text).input_ids
    assert ids[1:] == [byte + 4 for byte in text.encode()]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@given(st.lists(st.integers(0, 263)))
def test_any_ids_can_be_decoded(ids):
    text = TOKENIZER.decode(ids)
    data = bytes(i - 4 for i in ids if 4 <= i < 260)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == data.decode("utf-8", errors="replace")
    assert isinstance(text, str)


def test_special_tokens_can_be_encoded_as_bytes():
    """Untrusted text must not be able to insert thought tokens."""
    ids = TOKENIZER("<bot>", split_special_tokens=True).input_ids
    assert ids == [1, *(byte + 4 for byte in b"<bot>")]


def test_batches_are_padded_on_the_left():
    batch = TOKENIZER(["ab", "a"], padding=True)
    assert batch.input_ids == [[1, 101, 102], [263, 1, 101]]
    assert batch.attention_mask == [[1, 1, 1], [0, 1, 1]]
    assert TOKENIZER.batch_decode(batch.input_ids, skip_special_tokens=True) == ["ab", "a"]


@pytest.mark.parametrize("options", [{}, {"prepend_bos": False, "padding_side": "right"}])
def test_saved_and_loaded(options, tmp_path):
    CoconutTokenizer(**options).save_pretrained(tmp_path)
    CoconutConfig().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, CoconutTokenizer)
    texts = ["a<bot><latent><eot>", "longer text"]
    assert loaded(texts, padding=True).input_ids == CoconutTokenizer(**options)(texts, padding=True).input_ids
