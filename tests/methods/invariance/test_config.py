"""Tests of the arguments of Invariance training."""

import math

import pytest

from helpers.invariance import invariance_args


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
        ({"num_written_rows": -1}, "num_written_rows"),
        ({"max_answer_length": 0}, "max_answer_length"),
        ({"perturb": "patches"}, "perturb"),
        ({"alpha": -1.0}, "alpha"),
    ],
)
def test_bad_settings(settings, name, tmp_path):
    with pytest.raises(ValueError, match=f"`?{name}`?"):
        invariance_args(tmp_path, **settings)


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_counts_are_whole_numbers(value, tmp_path):
    with pytest.raises(ValueError, match="adversarial_steps"):
        invariance_args(tmp_path, adversarial_steps=value)
