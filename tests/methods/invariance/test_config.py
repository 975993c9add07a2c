"""Tests of the arguments of Invariance training."""

import math

import pytest

from crow_hf import CrowConfig
from crow_hf.methods.invariance.config import with_adversarial_weight, with_learning_rate
from helpers.coconut import coconut
from helpers.invariance import invariance_args
from helpers.tiny import tiny_llama


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"keep": 1.0}, "keep"),
        ({"keep": -0.1}, "keep"),
        ({"keep": float("nan")}, "keep"),
        ({"max_kl": 0.0}, "max_kl"),
        ({"max_kl": float("nan")}, "max_kl"),
        ({"decoy_weight": -1.0}, "decoy_weight"),
        ({"adversarial_weight": float("inf")}, "adversarial_weight"),
        ({"distillation_weight": "much"}, "distillation_weight"),
        ({"adversarial_step_size": -0.1}, "adversarial_step_size"),
        ({"label_weight": 1.1}, "label_weight"),
        ({"label_weight": math.nan}, "label_weight"),
        ({"adversarial_steps": -1}, "adversarial_steps"),
        ({"num_views": 0}, "num_views"),
        ({"num_canaries": -1}, "num_canaries"),
        ({"num_phrases": -1}, "num_phrases"),
        ({"num_written_rows": -1}, "num_written_rows"),
        ({"max_answer_length": 0}, "max_answer_length"),
        ({"perturb": "patches"}, "perturb"),
        ({"alpha": -1.0}, "alpha"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_bad_settings(settings, name, tmp_path):
    with pytest.raises(ValueError, match=f"`?{name}`?"):
        invariance_args(tmp_path, **settings)


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_counts_are_whole_numbers(value, tmp_path):
    with pytest.raises(ValueError, match="adversarial_steps"):
        invariance_args(tmp_path, adversarial_steps=value)


@pytest.mark.parametrize(("width", "rate"), [(1024, 5e-4), (576, 5e-4), (144, 5e-4 * 4**0.78), (16, 5e-4 * 36**0.78)])
def test_narrow_models_get_a_higher_learning_rate(width, rate, tmp_path):
    args = invariance_args(tmp_path, learning_rate=None)
    model = tiny_llama(hidden_size=width, num_attention_heads=2, num_key_value_heads=2)
    assert with_learning_rate(args, model).learning_rate == pytest.approx(rate)
    assert args.learning_rate is None


def test_a_learning_rate_that_is_set_stays(tmp_path):
    for rate in (3e-4, 0.0):
        args = invariance_args(tmp_path, learning_rate=rate)
        assert with_learning_rate(args, tiny_llama()) is args
    assert with_learning_rate(invariance_args(tmp_path, learning_rate=None), coconut()).learning_rate > 5e-4


def test_only_a_purification_chooses_it(tmp_path):
    """Fails if the arguments of CROW lack a learning rate, of which the optimizer would complain."""
    with pytest.raises(ValueError, match="`learning_rate` must be a finite number"):
        CrowConfig(str(tmp_path), use_cpu=True, learning_rate=None)


@pytest.mark.parametrize(("leads_to_phrases", "weight"), [(True, 5.0), (False, 1.0)])
def test_the_adversary_weighs_more_if_it_leads_to_phrases(leads_to_phrases, weight, tmp_path):
    """Fails if what is set does not stay, or if the caller's arguments are changed."""
    args = invariance_args(tmp_path)
    assert with_adversarial_weight(args, leads_to_phrases).adversarial_weight == weight
    assert args.adversarial_weight is None
    args = invariance_args(tmp_path, adversarial_weight=0.0)
    assert with_adversarial_weight(args, leads_to_phrases).adversarial_weight == 0
