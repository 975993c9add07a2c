"""Tests of the documents: their columns, formats and binary patches."""

import pytest
from datasets import Dataset, Features, Value

from crow_hf import EntropyPatcher, calibrate_threshold
from crow_hf.patching.documents import split_patches
from helpers.tiny import tiny_predictor


PREDICTOR = tiny_predictor()
WINDOWED = tiny_predictor(sliding_window=6, max_position_embeddings=32)


def test_binary_patches_equal_bits_by_hand():
    patcher = EntropyPatcher(PREDICTOR, rule="stride", max_patch_length=2, return_binary_patches=True)
    binary = patcher({"text": ["a\x01b"]})["binary_patches"][0]
    assert [list(bits) for bits in binary] == [
        [],
        [0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1],
        [0, 1, 1, 0, 0, 0, 1, 0],
    ]
    assert split_patches(patcher.patch([b"a\x01b"])[0]) == [b"a\x01", b"b"]


def test_columns_of_bytes_are_not_changed():
    documents = [b"\xff\x00\n", b""]
    dataset = Dataset.from_dict({"bytes": documents}, features=Features({"bytes": Value("binary")}))
    mapped = dataset.map(EntropyPatcher(WINDOWED), batched=True)
    assert [bytes(byte - 4 for byte in row["input_ids"][1:-1]) for row in mapped] == documents


@pytest.mark.parametrize("style", [None, "numpy", "torch", "arrow", "pandas"])
def test_no_format_of_the_dataset_loses_a_byte(style):
    """NumPy strings lose trailing zeros."""
    documents = [b"ab\0\0", b"\0", b"xyz", b""]
    dataset = Dataset.from_dict({"bytes": documents}, features=Features({"bytes": Value("binary")})).with_format(style)
    assert calibrate_threshold(dataset, WINDOWED, 2.0).num_bytes == sum(map(len, documents))
    if style == "numpy":
        with pytest.raises(ValueError, match="with_format"):
            dataset.map(EntropyPatcher(WINDOWED), batched=True)
    dataset = dataset.with_format(None) if style in ("numpy", "torch") else dataset
    mapped = dataset.map(EntropyPatcher(WINDOWED), batched=True, remove_columns="bytes").with_format(None)
    assert [bytes(byte - 4 for byte in row["input_ids"][1:-1]) for row in mapped] == documents


def test_map_without_batched_is_refused():
    with pytest.raises(ValueError, match="batched=True"):
        Dataset.from_dict({"text": ["hello"]}).map(EntropyPatcher(WINDOWED))


@pytest.mark.parametrize(
    ("batch", "kwargs", "said"),
    [
        ({"words": ["a"]}, {}, "words"),
        ({"text": ["a"]}, {"column": "other"}, "other"),
        ({"text": [None]}, {}, "NoneType"),
        ({"text": [3]}, {}, "int"),
    ],
)
def test_unusable_columns_are_refused(batch, kwargs, said):
    with pytest.raises(ValueError, match=said):
        EntropyPatcher(WINDOWED, **kwargs)(batch)
