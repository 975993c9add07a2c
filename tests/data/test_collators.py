"""Collators neither lose nor change a document, and packed documents do not attend to each other."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crow_hf import CrowDataCollator, PackedPatchDataCollator, PatchDataCollator
from helpers.tiny import tiny_llama


PAD = 263
PADDED = {"input_ids", "labels", "attention_mask", "patch_lengths"}
PACKED = {"input_ids", "labels", "position_ids", "patch_lengths", "patch_position_ids"}


def document(patches, seed=0, labels=False, kind=list):
    """Draw random ids in patches of these lengths. A padding id may be among them, because it is an ordinary id."""
    generator = np.random.default_rng([seed, *patches])
    ids = generator.integers(1, PAD + 1, sum(patches))
    row = {"input_ids": kind(ids.tolist()), "patch_lengths": kind(patches)}
    if labels:
        row["labels"] = kind(np.where(generator.random(sum(patches)) < 0.4, -100, ids).tolist())
    return row


def int16_array(values):
    return np.array(values, np.int16)


def int32_array(values):
    return np.array(values, np.int32)


@st.composite
def documents(draw, most_patches=9, most=8):
    """Draw rows of lists or arrays. Some have labels, and some have columns that the collator must ignore."""
    rows = []
    for seed in range(draw(st.integers(1, most))):
        patches = draw(st.lists(st.integers(1, 5), min_size=1, max_size=most_patches))
        kind = draw(st.sampled_from([list, int16_array, int32_array, np.array]))
        rows.append(document(patches, seed, draw(st.booleans()), kind))
        if draw(st.booleans()):
            rows[-1] |= {"meta": "{}", "source": "a.jsonl", "entropies": [0.5]}
    return rows


def plain(row):
    """Return the document as a tuple of ids, labels and patch lengths."""
    labels = row.get("labels", row["input_ids"])
    return tuple(tuple(int(value) for value in values) for values in (row["input_ids"], labels, row["patch_lengths"]))


def without_first_label(found):
    """Return the document as packing returns it. No earlier id predicts its first id."""
    ids, labels, patches = found
    return ids, (-100, *labels[1:]), patches


def is_count(values):
    return values.tolist() == list(range(len(values)))


def unpack(batch):
    """Split each packed row into documents where its positions restart, and assert every promise of the collator."""
    assert set(batch) == PACKED
    assert all(value.dtype == torch.long and value.dim() == 2 for value in batch.values())
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape
    assert batch["patch_lengths"].shape == batch["patch_position_ids"].shape
    packed = []
    for ids, labels, positions, lengths, patch_positions in zip(
        *(batch[name] for name in ("input_ids", "labels", "position_ids", "patch_lengths", "patch_position_ids")),
        strict=True,
    ):
        length, num_patches = int(lengths.sum()), int((lengths > 0).sum())
        assert (lengths[num_patches:] == 0).all() and (lengths >= 0).all()
        assert (ids[length:] == PAD).all() and (labels[length:] == -100).all()
        assert is_count(positions[length:]) and is_count(patch_positions[num_patches:])
        begins = (positions[:length] == 0).nonzero().flatten().tolist()
        patch_begins = (patch_positions[:num_patches] == 0).nonzero().flatten().tolist()
        assert begins[:1] == patch_begins[:1] == [0] and len(begins) == len(patch_begins)
        parts = []
        for begin, end, first, last in zip(
            begins, [*begins[1:], length], patch_begins, [*patch_begins[1:], num_patches], strict=True
        ):
            assert is_count(positions[begin:end]) and is_count(patch_positions[first:last])
            assert lengths[first:last].sum() == end - begin
            assert labels[begin] == -100
            parts.append(tuple(tuple(values.tolist()) for values in (ids[begin:end], labels[begin:end])))
            parts[-1] += (tuple(lengths[first:last].tolist()),)
        packed.append(parts)
    return packed


def first_fit_decreasing(sizes, capacity):
    """Return the number of bins."""
    bins = []
    for size in sorted(sizes, reverse=True):
        index = next((index for index, used in enumerate(bins) if used + size <= capacity), None)
        if index is None:
            bins.append(size)
        else:
            bins[index] += size
    return len(bins)


# ------------------------------------------------------------------------------------------------------------- padding


def test_collator_pads_right():
    """The mask follows the length of a row and not the pad id. Here the pad id is eos, and one row contains it."""
    rows = [{"input_ids": [5, 1], "labels": [-100, 1]}, {"input_ids": [7, 8, 1, 9], "labels": [7, 8, 1, 9]}]
    batch = CrowDataCollator(pad_token_id=1)(rows)
    expected = {
        "input_ids": [[5, 1, 1, 1], [7, 8, 1, 9]],
        "labels": [[-100, 1, -100, -100], [7, 8, 1, 9]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
    }
    assert set(batch) == set(expected)
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == values


def test_padding_worked_by_hand():
    rows = [
        {"input_ids": [1, 70, 71, 72, 2], "patch_lengths": [1, 3, 1], "meta": "{}"},
        {"input_ids": np.array([1, 80, 2]), "patch_lengths": np.array([1, 2]), "labels": np.array([-100, 80, 2])},
    ]
    batch = PatchDataCollator()(rows)
    assert set(batch) == PADDED
    assert all(value.dtype == torch.long for value in batch.values())
    assert batch["input_ids"].tolist() == [[1, 70, 71, 72, 2], [1, 80, 2, PAD, PAD]]
    assert batch["labels"].tolist() == [[1, 70, 71, 72, 2], [-100, 80, 2, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["patch_lengths"].tolist() == [[1, 3, 1], [1, 2, 0]]


def test_the_longest_row_and_the_most_patches_may_differ():
    batch = PatchDataCollator()([document([9]), document([1, 1, 1])])
    assert batch["input_ids"].shape == (2, 9)
    assert batch["patch_lengths"].tolist() == [[9, 0, 0], [1, 1, 1]]


@settings(max_examples=60, deadline=None)
@given(rows=documents(), pad=st.sampled_from([PAD, 0, 7]))
def test_padding_loses_nothing(rows, pad):
    """A padding id inside a document is an ordinary token."""
    before = [plain(row) for row in rows]
    batch = PatchDataCollator(pad_token_id=pad)(rows)
    assert set(batch) == PADDED
    assert batch["input_ids"].shape == (len(rows), max(len(ids) for ids, _, _ in before))
    assert batch["patch_lengths"].shape == (len(rows), max(len(patches) for _, _, patches in before))
    for index, (ids, labels, patches) in enumerate(before):
        length, num_patches = len(ids), len(patches)
        found = {name: value[index].tolist() for name, value in batch.items()}
        assert found["input_ids"][:length] == list(ids) and set(found["input_ids"][length:]) <= {pad}
        assert found["labels"][:length] == list(labels) and set(found["labels"][length:]) <= {-100}
        assert found["attention_mask"] == [1] * length + [0] * (len(found["input_ids"]) - length)
        assert found["patch_lengths"][:num_patches] == list(patches)
        assert set(found["patch_lengths"][num_patches:]) <= {0}
    assert [plain(row) for row in rows] == before


# ------------------------------------------------------------------------------------------------------------- packing


def test_packing_worked_by_hand():
    """With documents of 3, 1 and 2 patches and rows of 4, the longest and the shortest document share a row."""
    rows = [
        {"input_ids": [10, 11, 12, 13], "patch_lengths": [1, 2, 1], "meta": "{}"},
        {"input_ids": np.array([20, 21]), "patch_lengths": np.array([2])},
        {"input_ids": [30, 31, 32], "patch_lengths": [2, 1], "labels": [30, -100, 32]},
    ]
    batch = PackedPatchDataCollator(max_patches=4)(rows)
    assert set(batch) == PACKED
    order = sorted(range(2), key=lambda row: batch["input_ids"][row, 0].item())
    found = {name: value[order].tolist() for name, value in batch.items()}
    assert found["input_ids"] == [[10, 11, 12, 13, 20, 21], [30, 31, 32, PAD, PAD, PAD]]
    assert found["labels"] == [[-100, 11, 12, 13, -100, 21], [-100, -100, 32, -100, -100, -100]]
    assert found["position_ids"] == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]
    assert found["patch_lengths"] == [[1, 2, 1, 2], [2, 1, 0, 0]]
    assert found["patch_position_ids"] == [[0, 1, 2, 0], [0, 1, 0, 1]]


@settings(max_examples=80, deadline=None)
@given(rows=documents(), spare=st.integers(0, 12))
def test_packing_loses_nothing(rows, spare):
    before = [plain(row) for row in rows]
    max_patches = max(len(patches) for _, _, patches in before) + spare
    packed = unpack(PackedPatchDataCollator(max_patches)(rows))
    assert sorted(part for parts in packed for part in parts) == sorted(map(without_first_label, before))
    sizes = [[len(patches) for _, _, patches in parts] for parts in packed]
    assert all(0 < sum(row) <= max_patches for row in sizes)
    assert len(packed) == first_fit_decreasing([len(patches) for _, _, patches in before], max_patches)
    assert [plain(row) for row in rows] == before


@pytest.mark.parametrize(
    ("sizes", "max_patches", "num_rows"),
    [
        ([1, 1, 1, 5, 5, 5], 6, 3),
        ([4, 3, 2, 6, 7, 8], 10, 3),
        ([2, 3, 4, 5, 6], 10, 2),
        ([5] * 4, 9, 4),
        ([1] * 10, 5, 2),
    ],
)
def test_few_rows(sizes, max_patches, num_rows):
    """Fails for first-fit in the given order, and for next-fit."""
    rows = [document([1] * size, seed) for seed, size in enumerate(sizes)]
    assert len(unpack(PackedPatchDataCollator(max_patches)(rows))) == num_rows


@settings(max_examples=60, deadline=None)
@given(rows=documents(most_patches=20, most=4), max_patches=st.integers(1, 6))
def test_long_documents_are_cut_at_patch_borders(rows, max_patches):
    """The parts of a document join to the document. The first label of each part is removed, as in a document."""
    packed = unpack(PackedPatchDataCollator(max_patches)(rows))
    assert all(sum(len(patches) for _, _, patches in parts) <= max_patches for parts in packed)
    parts = [part for row in packed for part in row]
    assert len(packed) == first_fit_decreasing([len(patches) for _, _, patches in parts], max_patches)
    for ids, labels, patches in map(plain, rows):
        wanted = []
        for first in range(0, len(patches), max_patches):
            begin, end = sum(patches[:first]), sum(patches[: first + max_patches])
            piece = ids[begin:end], labels[begin:end], patches[first : first + max_patches]
            wanted.append(without_first_label(piece))
        for piece in wanted:
            assert piece in parts, "cut elsewhere, altered or lost"
            parts.remove(piece)
    assert not parts


def test_one_patch_in_each_row():
    batch = PackedPatchDataCollator(max_patches=1)([document([2, 1, 3])])
    assert sorted(batch["patch_lengths"].flatten().tolist()) == [1, 2, 3]
    assert unpack(batch) and batch["input_ids"].shape == (3, 3)


def test_packing_with_another_padding_id():
    batch = PackedPatchDataCollator(2, pad_token_id=0)([document([3, 1]), document([1])])
    assert sorted(batch["input_ids"][:, -1].tolist())[0] == 0
    assert (batch["input_ids"] == 0).sum() == 3


def test_packing_is_reproducible():
    rows = [document([1] * size, seed) for seed, size in enumerate([3, 1, 4, 1, 5, 9, 2, 6])]
    first, second = (PackedPatchDataCollator(10)(rows) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in PACKED)


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.fixture(scope="module", name="model")
def model_fixture():
    """Return a Llama for the byte vocabulary. It has no cache, because transformers finds no documents with one."""
    return tiny_llama(vocab_size=PAD + 1, pad_token_id=PAD, use_cache=False).eval()


def model_inputs(batch):
    return {name: batch[name] for name in ("input_ids", "position_ids")}


def assert_as_if_alone(model, batch):
    """Assert that the logits of each part of each row are those of the part in a batch of its own."""
    with torch.no_grad():
        logits = model(**model_inputs(batch)).logits
    count = 0
    for row, parts in enumerate(unpack(batch)):
        begin = 0
        for ids, _, _ in parts:
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([ids])).logits[0]
            torch.testing.assert_close(logits[row, begin : begin + len(ids)], alone, rtol=1e-4, atol=1e-4)
            begin += len(ids)
            count += 1
    return count


@settings(max_examples=25, deadline=None)
@given(rows=documents(most=5), max_patches=st.integers(1, 25))
def test_no_attention_across_documents(model, rows, max_patches):
    """The model gets only `input_ids` and `position_ids`, as models of transformers expect them."""
    assert_as_if_alone(model, PackedPatchDataCollator(max_patches)(rows))


def test_no_attention_across_many_documents(model):
    rows = [document([1 + (size + patch) % 4 for patch in range(size)], size) for size in range(1, 13)]
    batch = PackedPatchDataCollator(30)(rows)
    assert batch["input_ids"].shape[0] == 3
    assert assert_as_if_alone(model, batch) == len(rows)


def test_the_check_sees_attention_across_documents(model):
    """Shows that the tests above can fail: with positions that do not restart, the logits differ."""
    batch = PackedPatchDataCollator(20)([document([2, 3, 1], 1), document([4, 1], 2)])
    running = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    with torch.no_grad():
        right = model(**model_inputs(batch)).logits
        wrong = model(input_ids=batch["input_ids"], position_ids=running).logits
    assert (right - wrong).abs().max() > 0.01


def test_no_attention_across_documents_of_patches(model):
    """A model over patches separates the documents by `patch_position_ids` in the same way."""
    batch = PackedPatchDataCollator(9)([document([1, 2, 1, 3], 1), document([2, 2], 2), document([1, 1, 1, 1, 4], 3)])
    positions = batch["patch_position_ids"]
    embeddings = torch.randn(*positions.shape, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = model(inputs_embeds=embeddings, position_ids=positions).logits
    for row, parts in enumerate(unpack(batch)):
        first = 0
        for _, _, patches in parts:
            piece = slice(first, first + len(patches))
            with torch.no_grad():
                alone = model(inputs_embeds=embeddings[row : row + 1, piece]).logits[0]
            torch.testing.assert_close(together[row, piece], alone, rtol=1e-4, atol=1e-4)
            first += len(patches)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_loss_is_that_of_the_documents(model, labelled):
    """Loss and gradients over the packed rows equal those summed over single documents."""
    rows = [document([1 + patch % 3 for patch in range(size)], size, labelled) for size in (7, 2, 5, 1, 4)]
    batch = PackedPatchDataCollator(9)(rows)

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()))

    packed = model(**model_inputs(batch), labels=batch["labels"]).loss
    total, count = 0.0, 0
    for ids, labels, _ in map(plain, rows):
        targets = torch.tensor(labels[1:], dtype=torch.long)
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    torch.testing.assert_close(packed, total / count, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(gradients(packed), gradients(total / count), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_padded_logits_are_those_of_the_documents(model):
    rows = [document([1 + patch % 3 for patch in range(size)], size) for size in (7, 2, 5)]
    batch = PatchDataCollator()(rows)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, (ids, _, _) in enumerate(map(plain, rows)):
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            torch.testing.assert_close(logits[row, : len(ids)], alone, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ refusals


COLLATORS = [PatchDataCollator(), PackedPatchDataCollator(max_patches=50)]


@pytest.mark.parametrize("collator", COLLATORS, ids=["padded", "packed"])
@pytest.mark.parametrize("kind", [list, np.array])
@pytest.mark.parametrize(
    "patches",
    [[10, 10], [10, 10, 10], [], [12, 12, 0], [0, 24], [30, -6], [-24], [25, -1]],
)
def test_wrong_patch_lengths_name_the_row(collator, kind, patches):
    """For 24 ids, the lengths have another sum, or one of them is below 1."""
    wrong = {"input_ids": kind([5] * 24), "patch_lengths": kind(patches)}
    rows = [document([11, 13], seed) for seed in range(7)]
    for index in (0, 4):
        rows_with_it = [*rows[:index], wrong, *rows[index:]]
        with pytest.raises(ValueError) as raised:
            collator(rows_with_it)
        assert index in [int(number) for number in re.findall(r"(?<![-\d])\d+", str(raised.value))]


@pytest.mark.parametrize("collator", COLLATORS, ids=["padded", "packed"])
def test_rows_without_patches_are_refused(collator):
    with pytest.raises(ValueError, match="patch_lengths") as raised:
        collator([document([1, 2]), {"input_ids": [5, 6, 7]}])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("max_patches", [0, -3])
def test_rows_for_no_patches_are_refused(max_patches):
    with pytest.raises(ValueError, match="max_patches"):
        PackedPatchDataCollator(max_patches=max_patches)
