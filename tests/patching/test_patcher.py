"""Tests of the patcher: lossless, independent of other documents, equal to one call per byte, and cached."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from datasets.fingerprint import Hasher
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st

from crow_hf import ByteEntropyConfig, EntropyPatcher, entropy_patching, from_binary, load_entropy_predictor
from crow_hf.models.boundaries import RULES
from crow_hf.models.byte_vocabulary import BOS_TOKEN_ID, BYTE_OFFSET, EOS_TOKEN_ID
from crow_hf.patching.patcher import split_patches
from crow_hf.recipes.patch_checkup import PROSE
from helpers.documents import words
from helpers.tiny import tiny_predictor


# Random bytes have few newlines. Texts of few letters have many patches.
DOCUMENTS = st.one_of(st.binary(max_size=80), st.text("ab \n", max_size=80).map(str.encode))
PREDICTOR = tiny_predictor()
WINDOWED = tiny_predictor(sliding_window=6, max_position_embeddings=32)
THRESHOLDS = {"threshold": 5.2, "relative_threshold": 0.6, "unit": "bits"}


def starts_of(document):
    return np.cumsum(document.patch_lengths) - document.patch_lengths


@settings(max_examples=60, deadline=None)
@given(st.lists(DOCUMENTS, max_size=5), st.sampled_from(RULES), st.sampled_from([PREDICTOR, WINDOWED]), st.booleans())
def test_nothing_is_lost_or_altered(documents, rule, predictor, special):
    patcher = EntropyPatcher(
        predictor, rule=rule, max_patch_length=7, add_special_tokens=special, return_binary_patches=True, **THRESHOLDS
    )
    patched = patcher.patch(documents)
    assert [b"".join(split_patches(document)) for document in patched] == documents
    columns = patcher({"bytes": documents})
    for document, ids, lengths, binary in zip(
        documents, columns["input_ids"], columns["patch_lengths"], columns["binary_patches"], strict=True
    ):
        expected = [byte + BYTE_OFFSET for byte in document]
        assert ids.tolist() == ([BOS_TOKEN_ID, *expected, EOS_TOKEN_ID] if special else expected)
        assert lengths.sum() == len(ids) and (lengths > 0).all() and lengths.max(initial=0) <= 7
        assert [len(bits) for bits in binary] == [
            8 * np.count_nonzero(ids[s : s + n] >= BYTE_OFFSET)
            for s, n in zip(np.cumsum(lengths) - lengths, lengths, strict=True)
        ]
        assert b"".join(from_binary(binary)) == document


@settings(max_examples=40, deadline=None)
@given(st.lists(DOCUMENTS, min_size=1, max_size=5), st.sampled_from([PREDICTOR, WINDOWED]))
def test_patches_do_not_depend_on_other_documents(documents, predictor):
    patcher = EntropyPatcher(predictor, **THRESHOLDS)
    for together, document in zip(patcher.patch(documents), documents, strict=True):
        alone = patcher.patch([document])[0]
        np.testing.assert_allclose(together.entropies, alone.entropies, atol=1e-4)
        assert_same_where_clear(together, alone, patcher.rule)


def assert_same_where_clear(one, other, rule, margin=1e-3):
    """Check that the starts agree, except where float32 rounding near a threshold decides."""
    entropies = one.entropies
    rises = np.diff(entropies, prepend=np.inf)
    threshold, relative_threshold = rule.bits
    doubtful = (abs(entropies - threshold) < margin) | (abs(rises - relative_threshold) < margin)
    clear = ~np.append(False, doubtful[:-1])
    starts = [np.isin(np.arange(len(entropies)), starts_of(document)) for document in (one, other)]
    assert (starts[0] == starts[1])[clear].all()


@settings(max_examples=30, deadline=None)
@given(DOCUMENTS.filter(len), st.sampled_from([rule for rule in RULES if rule != "stride"]), st.data())
def test_patches_of_a_prefix_are_a_prefix_of_the_patches(document, rule, data):
    """The last patch of the prefix is still open and may differ."""
    patcher = EntropyPatcher(PREDICTOR, rule=rule, **THRESHOLDS)
    prefix = document[: data.draw(st.integers(1, len(document)))]
    closed = patcher.patches(prefix)[:-1]
    assert patcher.patches(document)[: len(closed)] == closed


@pytest.mark.parametrize("document", [b"ab ba\nab\n\nthe end", bytes(range(60)), b"\n", b"a"])
def test_equal_to_one_call_per_byte(document):
    """Compares with the original loop: one forward pass per byte, and a new patch where the model is uncertain."""
    patches, current, before = [], b"", None
    for index in range(len(document)):
        if index:
            entropy = PREDICTOR.entropies(torch.tensor([list(document[:index])]))[0, -1].item()
            rise = entropy - before if before is not None else float("-inf")
            if entropy > 5.2 or rise > 0.6 or document[index - 1] == ord("\n"):
                patches, current = [*patches, current], b""
            before = entropy
        current += document[index : index + 1]
    assert entropy_patching(document, PREDICTOR, **THRESHOLDS) == [*patches, current]


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("length", [31, 32, 33, 53, 54, 500])
def test_windows_give_the_entropies_of_one_long_pass(reset, length):
    document = words(b"abcdefgh", length) + b"\n" + words(b"abc\n", 100)
    patcher = EntropyPatcher(WINDOWED, reset_on_newline=reset)
    assert patcher.is_exact
    expected = WINDOWED.entropies(torch.tensor([list(document)]), reset_on_newline=reset)[0]
    np.testing.assert_allclose(patcher.patch([document])[0].entropies[1:-1], expected.numpy(), atol=1e-4)


def test_without_a_sliding_window_every_byte_sees_half_a_context():
    predictor = tiny_predictor(max_position_embeddings=16, reset_on_newline=False)
    patcher = EntropyPatcher(predictor)
    assert not patcher.is_exact
    document = words(b"abcdefgh", 40)
    entropies = patcher.patch([document])[0].entropies[1:-1]
    for begin, known, end in ((0, 0, 16), (8, 8, 24), (16, 8, 32), (24, 8, 40)):
        window = predictor.entropies(torch.tensor([list(document[begin:end])]))[0, known:]
        np.testing.assert_allclose(entropies[begin + known : end], window.numpy(), atol=1e-4)


def test_long_and_many_documents_are_scored_in_several_batches():
    """Fails if entropies of documents get mixed up in batches of many lengths."""
    documents = [words(b"abcd \n", length, seed=length) for length in range(0, 700, 7)]
    patcher = EntropyPatcher(WINDOWED)
    for document, patched in zip(documents, patcher.patch(documents), strict=True):
        if document:
            expected = WINDOWED.entropies(torch.tensor([list(document)]))[0]
            np.testing.assert_allclose(patched.entropies[1:-1], expected.numpy(), atol=1e-4)


def rows():
    return {"text": ["hello there\nyou", "", "Grüße, 漢字 👍", "x" * 100], "number": [1, 2, 3, 4]}


def test_map_with_processes_and_streams_gives_the_same_rows():
    patcher = EntropyPatcher(WINDOWED, return_entropies=True, return_binary_patches=True, **THRESHOLDS)
    mapped = Dataset.from_dict(rows()).map(patcher, batched=True)
    assert mapped.column_names == ["text", "number", "input_ids", "patch_lengths", "entropies", "binary_patches"]
    assert all(len(row["entropies"]) == len(row["input_ids"]) == sum(row["patch_lengths"]) for row in mapped)
    in_processes = Dataset.from_dict(rows()).map(patcher, batched=True, batch_size=1, num_proc=2)
    streamed = Dataset.from_dict(rows()).to_iterable_dataset().map(patcher, batched=True, batch_size=3)
    for row, other, third in zip(mapped, in_processes, streamed, strict=True):
        for column in ("input_ids", "patch_lengths", "binary_patches"):
            assert row[column] == other[column]
            assert [np.asarray(value).tolist() for value in row[column]] == [
                np.asarray(value).tolist() for value in third[column]
            ]
        np.testing.assert_allclose(row["entropies"], other["entropies"], atol=1e-4)


def test_a_copy_keeps_the_precision_and_draws_no_random_numbers():
    patcher = EntropyPatcher(tiny_predictor().to(torch.bfloat16))
    torch.manual_seed(0)
    copied = pickle.loads(pickle.dumps(patcher))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert drawn == torch.rand(1) and copied.predictor.dtype == torch.bfloat16
    (one,), (other,) = patcher.patch([b"hello there"]), copied.patch([b"hello there"])
    assert (one.entropies == other.entropies).all()
    assert Hasher.hash(patcher) != Hasher.hash(EntropyPatcher(tiny_predictor()))


def test_second_map_hits_the_cache_and_another_setting_does_not(tmp_path):
    Dataset.from_dict(rows()).to_json(tmp_path / "rows.jsonl")
    dataset = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")

    def fingerprint(patcher):
        return dataset.map(patcher, batched=True)._fingerprint

    first = fingerprint(EntropyPatcher(WINDOWED, **THRESHOLDS))
    used = EntropyPatcher(tiny_predictor(sliding_window=6, max_position_embeddings=32), **THRESHOLDS)
    used.patch([b"some text"])
    used.predictor(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert fingerprint(used) == first
    WINDOWED.save_pretrained(tmp_path / "predictor")
    assert fingerprint(EntropyPatcher(tmp_path / "predictor", **THRESHOLDS)) == first
    others = [
        EntropyPatcher(WINDOWED, **THRESHOLDS | {"threshold": 5.3}),
        EntropyPatcher(WINDOWED, **THRESHOLDS | {"relative_threshold": 0.7}),
        EntropyPatcher(WINDOWED, rule="global", **THRESHOLDS),
        EntropyPatcher(WINDOWED, reset_on_newline=False, **THRESHOLDS),
        EntropyPatcher(WINDOWED, max_patch_length=9, **THRESHOLDS),
        EntropyPatcher(WINDOWED, return_entropies=True, **THRESHOLDS),
        EntropyPatcher(WINDOWED, add_special_tokens=False, **THRESHOLDS),
        EntropyPatcher(tiny_predictor(1, sliding_window=6, max_position_embeddings=32), **THRESHOLDS),
        EntropyPatcher(tiny_predictor(sliding_window=5, max_position_embeddings=32), **THRESHOLDS),
    ]
    assert len({first, *map(fingerprint, others)}) == len(others) + 1


def test_fingerprint_is_the_same_in_another_process():
    script = (
        "from datasets.fingerprint import Hasher; from crow_hf import EntropyPatcher; "
        "print(Hasher.hash(EntropyPatcher()))"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == Hasher.hash(EntropyPatcher())


def test_a_pickled_patcher_patches_the_same_and_keeps_the_threads():
    patcher = EntropyPatcher(WINDOWED, **THRESHOLDS)
    threads = torch.get_num_threads()
    copied = pickle.loads(pickle.dumps(patcher))
    assert torch.get_num_threads() == threads
    assert copied.patches(b"hello there, you") == patcher.patches(b"hello there, you")


@pytest.mark.parametrize(("unit", "largest"), [("share", 1), ("bits", 8), ("nats", 8 * math.log(2))])
def test_thresholds_can_have_any_unit(unit, largest):
    rule = EntropyPatcher(PREDICTOR, 0.65 * largest, 0.075 * largest, unit=unit).rule
    assert rule.bits == pytest.approx((5.2, 0.6))
    text = b"hello there, how are you"
    given = entropy_patching(text, PREDICTOR, 0.65 * largest, 0.075 * largest, unit)
    assert given == entropy_patching(text, PREDICTOR, **THRESHOLDS)


@pytest.mark.parametrize("thresholds", [(1.01, 0.1), (0.8, -0.1), (math.nan, 0.1), (5.2, 0.6)])
def test_thresholds_beyond_the_largest_entropy_are_refused(thresholds):
    """Fails if bits are read as shares without a word."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        EntropyPatcher(PREDICTOR, *thresholds)
    with pytest.raises(StrictDataclassError, match="between 0 and 1"):
        ByteEntropyConfig(patch_threshold=thresholds[0], patch_relative_threshold=thresholds[1])


def test_the_guides_thresholds_give_patches_of_a_usual_size(patching_warnings):
    """The guide's own call, with the predictor that ships with the package, on English."""
    patches = entropy_patching(PROSE.encode(), load_entropy_predictor(), threshold=0.8, relative_threshold=0.1)
    assert b"".join(patches) == PROSE.encode()
    assert 2 < len(PROSE) / len(patches) < 6
    assert not patching_warnings()


DATA = "naïve 🦜".encode()


@pytest.mark.parametrize(
    "byte_sequence",
    [
        DATA.decode(),
        bytearray(DATA),
        memoryview(DATA),
        list(DATA),
        np.frombuffer(DATA, np.uint8),
        torch.tensor(list(DATA), dtype=torch.uint8),
        torch.tensor(list(DATA)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_byte_sequence_can_have_any_type(byte_sequence):
    assert entropy_patching(byte_sequence, PREDICTOR, **THRESHOLDS) == entropy_patching(DATA, PREDICTOR, **THRESHOLDS)


@pytest.mark.parametrize("nothing", [b"", "", [], torch.tensor([], dtype=torch.uint8)])
def test_no_bytes_are_no_patches(nothing):
    assert entropy_patching(nothing, PREDICTOR) == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (None, "NoneType"),
        (7, "int"),
        ([1.5], "float"),
        ([256], "between 0 and 255"),
        (torch.tensor([-1]), "between 0 and 255"),
        ([[1, 2], [3, 4]], "shape"),
        (["a"], "list"),
        ({"text": "a"}, "dict"),
    ],
)
def test_anything_else_is_refused(other, said):
    with pytest.raises(ValueError, match=said):
        entropy_patching(other, PREDICTOR)


def test_contradictory_settings_are_refused():
    with pytest.raises(ValueError, match="260"):
        EntropyPatcher(tiny_predictor(vocab_size=260))
    with pytest.raises(ValueError, match="share, bits, nats"):
        EntropyPatcher(WINDOWED, 0.5, unit="bit")
    with pytest.raises(ValueError, match="return_entropies"):
        EntropyPatcher(WINDOWED, rule="whitespace", return_entropies=True)


def test_thresholds_default_to_those_of_the_predictor():
    predictor = tiny_predictor(patch_threshold=0.75, patch_relative_threshold=0.5, reset_on_newline=False)
    rule = EntropyPatcher(predictor).rule
    assert (rule.threshold, rule.relative_threshold, rule.reset_on_newline) == (0.75, 0.5, False)
    rule = EntropyPatcher(predictor, 1.0, 0.0, reset_on_newline=True).rule
    assert (rule.threshold, rule.relative_threshold, rule.reset_on_newline) == (1.0, 0.0, True)


def test_an_untrained_predictor_gives_one_warning(patching_warnings):
    patcher = EntropyPatcher(tiny_predictor(initializer_range=1e-4))
    patcher.patch([b"hello there"])
    patcher.patch([b"hello there"])
    (warning,) = patching_warnings()
    assert "untrained" in warning and "load_entropy_predictor" in warning


def test_copies_in_workers_warn_too(patching_warnings):
    pickle.loads(pickle.dumps(EntropyPatcher(tiny_predictor(initializer_range=1e-4)))).patch([b"hello there"])
    assert "untrained" in patching_warnings()[0]


def test_noise_does_not_make_a_trained_predictor_look_untrained(patching_warnings):
    EntropyPatcher(load_entropy_predictor()).patch([np.random.default_rng(0).bytes(2000)])
    assert not any("untrained" in warning for warning in patching_warnings())


@pytest.mark.parametrize(("thresholds", "size"), [((0.0, 0.0), "1.0"), ((1.0, 1.0), "24.0")])
def test_unusual_patch_sizes_give_a_warning(patching_warnings, thresholds, size):
    EntropyPatcher(WINDOWED, *thresholds).patch([b"hello there, how are you"] * 9)
    (warning,) = patching_warnings()
    assert size in warning and "calibrate_threshold" in warning


def test_default_patches_have_a_usual_size(patching_warnings):
    text = b"The method returns the first element of the list. It raises an error if the list is empty."
    assert 2 < len(text) / len(EntropyPatcher().patches(text)) < 9
    assert not patching_warnings()
