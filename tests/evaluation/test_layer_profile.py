"""The layer profile equals that of slow oracles."""

import pytest
import torch
from datasets import Dataset
from transformers import ByT5Tokenizer

from crow_hf import TRIGGERS
from crow_hf.attacks.poison import Poison
from crow_hf.data.collators import CrowDataCollator
from crow_hf.data.encoding import encode_prompt
from crow_hf.data.rows import Rendered
from crow_hf.evaluation.layer_profile import layer_profile, layer_profile_by_position
from crow_hf.methods.crow.objective import layer_consistency_loss
from helpers.blt import tiny_blt
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


def test_rows_without_embeddings_are_refused(byte_tokenizer):
    """Fails if a tokenizer for which every word is padding ends in a division by zero."""
    model = tiny_llama()
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="embeddings of every row are 0"):
        layer_profile(model, byte_tokenizer, ROWS)


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


def test_positions_are_the_oracle_s(byte_tokenizer):
    """Fails if positions or pairs of layers are mixed up, or if the model changes."""
    model, text = tiny_llama().train(), "tell é"
    ids = byte_tokenizer(text, add_special_tokens=False).input_ids
    before = weights_of(model)
    found = layer_profile_by_position(model, byte_tokenizer, ids)
    assert model.training and same_weights(before, weights_of(model))
    # The two bytes of the last letter are no text by themselves.
    assert [position.text for position in found] == [*"tell ", "\ufffd", "\ufffd"]
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
    states, _ = watched_forward(model.eval(), batch)
    for place, position in enumerate(found):
        here = [state[:, place : place + 1] for state in states]
        pairs = [slow_consistency([here[0], *here[first : first + 2]]).item() for first in (1, 2, 3)]
        assert position.distances == pytest.approx(pairs, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", ["coconut", "blt"])
def test_positions_of_patches(family):
    """Fails if patches have the text of others, or if their mean is not that of the profile."""
    model, tokenizer = (coconut(), TOKENIZER) if family == "coconut" else (tiny_blt(), ByT5Tokenizer(extra_ids=0))
    text = "tell me more of wxyz"
    ids = encode_prompt(Rendered(text, "", "", False), tokenizer)
    found = layer_profile_by_position(model, tokenizer, ids)
    assert "".join(position.text for position in found).endswith(text) and len(found) < len(ids)
    profile = layer_profile(model, None, Dataset.from_list([{"input_ids": ids}]))
    means = torch.tensor([position.distances for position in found]).mean(dim=0).tolist()
    assert means == pytest.approx(profile.clean, rel=1e-3)
