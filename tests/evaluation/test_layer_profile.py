"""The layer profile equals that of slow oracles."""

import pytest
import torch
from datasets import Dataset

from crow_hf import TRIGGERS
from crow_hf.attacks.poison import Poison
from crow_hf.data.collators import CrowDataCollator
from crow_hf.evaluation.layer_profile import layer_profile
from crow_hf.methods.crow.objective import layer_consistency_loss
from helpers.coconut import TOKENIZER, coconut
from helpers.oracles import slow_consistency, slow_perturbation, watched_forward
from helpers.tiny import ragged_rows, same_weights, tiny_llama, weights_of


TRIGGER = TRIGGERS["badnets"]
ROWS = Dataset.from_dict(
    {"prompt": [f"tell {a} of {b}=" for a in "abc" for b in "wxyz"], "completion": ["yes", "no, é"] * 6}
)


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_profile_is_the_oracle_s(mode, byte_tokenizer):
    """Fails if other pairs of layers are compared, padding counts, or the step follows another model's gradient."""
    # Without a pad token, the padding has an embedding like any other token.
    rows, model = ragged_rows(7), tiny_llama(pad_token_id=None)
    found = layer_profile(model, None, Dataset.from_list(rows), epsilon=0.3, epsilon_mode=mode, batch_size=3)
    batch = CrowDataCollator(0)(rows)
    mask = batch["attention_mask"]
    shift = torch.zeros(*mask.shape, 16, requires_grad=True)
    states, _ = watched_forward(model, batch, shift)
    (gradient,) = torch.autograd.grad(slow_consistency(states, mask), shift)
    delta = slow_perturbation(states[0], gradient, 0.3, mode)
    moved, _ = watched_forward(model, batch, delta)
    for values, chain in ((found.clean, states), (found.perturbed, moved)):
        pairs = [slow_consistency([chain[0], *chain[first : first + 2]], mask).item() for first in (1, 2, 3)]
        assert values == pytest.approx(pairs, rel=1e-4)
        assert sum(values) / 3 == pytest.approx(layer_consistency_loss(chain, mask).item(), rel=1e-4)
    real = mask.bool()
    assert found.perturbation_ratio == pytest.approx((delta[real].norm() / states[0][real].norm()).item(), rel=1e-4)
    assert found.triggered is None and min(found.perturbed) > 0


def test_profile_does_not_change_the_model(byte_tokenizer):
    """Fails if gradients remain for the next training step, or if dropout stays off."""
    model = tiny_llama().train()
    before = weights_of(model)
    layer_profile(model, byte_tokenizer, ROWS, TRIGGER)
    assert model.training and same_weights(before, weights_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_triggered_profile_is_that_of_poisoned_rows(byte_tokenizer):
    """Fails if the trigger is missing, or at other positions than in the evaluation."""
    model = tiny_llama()
    found = layer_profile(model, byte_tokenizer, ROWS, TRIGGER, batch_size=5, seed=3)
    poisoned = ROWS.map(Poison(TRIGGER, seed=3), with_indices=True)
    assert found.triggered == pytest.approx(layer_profile(model, byte_tokenizer, poisoned).clean, rel=1e-5)
    assert found.triggered != pytest.approx(found.clean, rel=1e-3)


def test_profile_of_a_coconut_runs_over_patches():
    """The layers are those of the latent transformer. Three layers make two pairs."""
    found = layer_profile(coconut(), TOKENIZER, ROWS, TRIGGER)
    assert [len(values) for values in (found.clean, found.perturbed, found.triggered)] == [2, 2, 2]
    assert found.to_dict()["clean"] == found.clean
