"""Tests of the CROW objective, against values worked out by hand and plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crow_hf import layer_consistency_loss, perturb_embeddings
from helpers.oracles import slow_consistency, slow_perturbation


LAYERS = ["paper", "reference"]


def random_states(seed, count=5, batch=3, length=6, width=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, width, generator=generator) for _ in range(count)]


def ragged_mask(lengths, width):
    return torch.tensor([[int(position < length) for position in range(width)] for length in lengths])


@pytest.fixture
def toy():
    """
    H^0..H^3 of one row with two positions. The cosines are 0 and 1 for (H^1, H^2), and 9/15 and -1 for (H^2, H^3).
    """
    return [
        torch.tensor([[[9.0, 9.0], [-9.0, 9.0]]]),
        torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),
        torch.tensor([[[0.0, 3.0], [0.0, 1.0]]]),
        torch.tensor([[[4.0, 3.0], [0.0, -1.0]]]),
    ]


@pytest.mark.parametrize(
    ("layers", "mask", "expected"),
    [
        ("paper", None, (1 + 0 + 0.4 + 2) / 4),
        ("paper", [[1, 0]], (1 + 0.4) / 2),
        ("paper", [[0, 1]], (0 + 2) / 2),
        ("reference", None, (1 + 0) / 2),
        ("reference", [[1, 0]], 1.0),
    ],
)
def test_value_worked_by_hand(toy, layers, mask, expected):
    """Fails if the pair with the embeddings counts, if the last pair is lost, or if the mask is ignored."""
    mask = None if mask is None else torch.tensor(mask)
    loss = layer_consistency_loss(toy, mask, layers)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_paper_is_the_default(toy):
    assert layer_consistency_loss(toy).item() == pytest.approx(0.85, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(4, 7),
    width=st.integers(2, 6),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    layers=st.sampled_from(LAYERS),
    masked=st.booleans(),
)
def test_equals_plain_loops(seed, count, width, lengths, layers, masked):
    """Fails if the loss is a mean of row means. Every position has the same weight, whatever the length of its row."""
    states = random_states(seed, count, len(lengths), 5, width)
    mask = ragged_mask(lengths, 5) if masked else None
    expected = slow_consistency(states, mask, layers)
    torch.testing.assert_close(layer_consistency_loss(states, mask, layers), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", LAYERS)
def test_reference_slices_of_the_published_code(layers):
    states = random_states(1, count=6)
    low, high = (states[1:-1], states[2:]) if layers == "paper" else (states[1:-2], states[2:-1])
    cosine = torch.nn.functional.cosine_similarity(torch.stack(low), torch.stack(high), dim=-1)
    torch.testing.assert_close(layer_consistency_loss(states, layers=layers), (1 - cosine).mean())


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("junk", [0.0, 7.0, float("inf"), float("nan")])
def test_padding_never_counts(junk, layers):
    """Value and gradient with padding equal those without. Fails if 0 * NaN leaks into them."""
    short = [state.requires_grad_() for state in random_states(2, batch=1, length=4)]
    long = [torch.cat([s.detach(), torch.full((1, 3, 8), junk)], 1).requires_grad_() for s in short]
    expected = layer_consistency_loss(short, layers=layers)
    loss = layer_consistency_loss(long, ragged_mask([4], 7), layers)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    loss.backward()
    for found, wanted in zip(long, short, strict=True):
        found, wanted = (torch.zeros_like(state) if state.grad is None else state.grad for state in (found, wanted))
        torch.testing.assert_close(found[:, :4], wanted)
        assert torch.equal(found[:, 4:], torch.zeros(1, 3, 8))


@pytest.mark.parametrize("side", ["left", "right", "hole"])
def test_masked_positions_may_lie_anywhere(side):
    states = random_states(3, length=6)
    mask = {"left": [0, 0, 1, 1, 1, 1], "right": [1, 1, 1, 1, 0, 0], "hole": [1, 0, 1, 0, 1, 1]}[side]
    mask = torch.tensor([mask, [1] * 6, [1] * 6])
    torch.testing.assert_close(layer_consistency_loss(states, mask), slow_consistency(states, mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_dtype_of_the_mask_is_free(dtype):
    states, mask = random_states(4), ragged_mask([2, 6, 3], 6)
    torch.testing.assert_close(layer_consistency_loss(states, mask.to(dtype)), slow_consistency(states, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_in_float32_out(dtype):
    """
    The cosine of bfloat16 states is computed in float32, so that nearly parallel layers do not round to 0 or below.
    """
    base = random_states(5, count=1, width=64)[0]
    noise = random_states(6, width=64)
    states = [(base + 0.01 * step).to(dtype) for step in noise]
    loss = layer_consistency_loss(states)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, slow_consistency(states), rtol=1e-2, atol=1e-7)


def test_scale_of_a_layer_does_not_matter():
    states = random_states(7)
    scaled = [state * 10.0**power for power, state in enumerate(states)]
    torch.testing.assert_close(layer_consistency_loss(scaled), layer_consistency_loss(states))


@pytest.mark.parametrize(("layers", "enough"), [("paper", 3), ("reference", 4)])
def test_too_few_layers(layers, enough):
    """An empty selection of layers is refused, since its mean is NaN."""
    assert torch.isfinite(layer_consistency_loss(random_states(8, count=enough), layers=layers))
    with pytest.raises(ValueError):
        layer_consistency_loss(random_states(8, count=enough - 1), layers=layers)


def test_unknown_layers():
    with pytest.raises(ValueError, match="everything"):
        layer_consistency_loss(random_states(9), layers="everything")


@pytest.mark.parametrize("shape", [(3, 5), (2, 6), (1, 6), (6,), (3, 6, 1)])
def test_mask_of_wrong_shape(shape):
    """A mask that would broadcast is refused too."""
    with pytest.raises(ValueError):
        layer_consistency_loss(random_states(10), torch.ones(shape))


def test_perturbation_is_a_signed_step():
    embeddings, gradient = torch.tensor([[[1.0, -2.0, 3.0]]]), torch.tensor([[[1e-20, -5.0, 0.0]]])
    torch.testing.assert_close(perturb_embeddings(embeddings, gradient, 0.5), torch.tensor([[[1.5, -2.5, 3.0]]]))
    torch.testing.assert_close(perturb_embeddings(embeddings, gradient), torch.tensor([[[1.1, -2.1, 3.0]]]))


def test_relative_perturbation_has_length_epsilon_per_token():
    """The RMS is that of each token, not of the batch: the three tokens have norms 1 : 10 : 100."""
    embeddings = random_states(11, count=1, batch=2, length=3)[0] * torch.tensor([1.0, 10.0, 100.0])[:, None]
    gradient = random_states(12, count=1, batch=2, length=3)[0]
    delta = perturb_embeddings(embeddings, gradient, 0.25, "relative") - embeddings
    torch.testing.assert_close(delta.norm(dim=-1), 0.25 * embeddings.norm(dim=-1))
    torch.testing.assert_close(delta, slow_perturbation(embeddings, gradient, 0.25, "relative"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturbation_keeps_dtype_and_epsilon_zero_changes_nothing(mode, dtype):
    embeddings = random_states(13, count=1)[0].to(dtype)
    gradient = random_states(14, count=1)[0]
    assert perturb_embeddings(embeddings, gradient, 0.1, mode).dtype == dtype
    assert torch.equal(perturb_embeddings(embeddings, gradient, 0.0, mode), embeddings)


def test_unknown_mode():
    states = random_states(15, count=2)
    with pytest.raises(ValueError, match="sideways"):
        perturb_embeddings(*states, mode="sideways")
