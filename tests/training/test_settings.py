"""Tests of the recorded settings: what a repetition needs, and no secrets."""

import json

import pytest

from crow_hf import CrowConfig, InvarianceConfig
from crow_hf.recipes.presets import recipe_config
from crow_hf.training.settings import recorded_settings


SECRET = "s3cret-Value"


@pytest.mark.parametrize("kind", [CrowConfig, InvarianceConfig])
def test_arguments_of_the_method_are_recorded_whatever_their_values(kind, tmp_path):
    """Fails if an argument of the method is left out because it has its default."""
    args = kind(str(tmp_path), use_cpu=True)
    recorded = recorded_settings(args)
    own = set(CrowConfig.__annotations__) | set(kind.__annotations__)
    assert own - {"logging_steps"} <= set(recorded)
    assert {name: recorded[name] for name in ("alpha", "epsilon")} == {"alpha": args.alpha, "epsilon": 0.1}


def test_changed_training_arguments_are_recorded_and_defaults_are_not(tmp_path):
    plain = recorded_settings(CrowConfig(str(tmp_path), use_cpu=True))
    changes = {"lr_scheduler_kwargs": {"num_cycles": 2}, "neftune_noise_alpha": 5.0, "torch_empty_cache_steps": 3}
    changed = recorded_settings(CrowConfig(str(tmp_path), use_cpu=True, **changes))
    assert changed == plain | changes and not set(changes) & set(plain)
    assert not {"label_names", "accelerator_config", "fsdp", "fsdp_config", "eval_strategy"} & set(plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler_type": "linear"},
        {"warmup_steps": 0},
        {"learning_rate": 5e-5},
        {"num_train_epochs": 3.0, "per_device_train_batch_size": 8},
    ],
)
@pytest.mark.parametrize("recipe", ["paper", "strong"])
def test_a_setting_with_the_default_of_transformers_is_recorded(recipe, changes, tmp_path):
    """Fails if a value is left out that a repetition would replace with the default of the recipe."""
    recorded = recorded_settings(recipe_config(recipe, str(tmp_path), use_cpu=True, **changes))
    assert {name: recorded[name] for name in changes} == changes
    again = recipe_config(recipe, str(tmp_path / "again"), **recorded)
    assert {name: getattr(again, name) for name in changes} == changes


def test_nothing_about_where_a_run_was_kept_is_recorded(tmp_path):
    """Fails if a folder, a repository, or the project of a tracker is recorded."""
    plain = CrowConfig(str(tmp_path / "one"), use_cpu=True)
    places = {"hub_model_id": "me/private", "hub_revision": "mine", "push_to_hub": True, "hub_private_repo": True}
    places |= {"run_name": "mine", "project": "mine", "trackio_space_id": "me/space", "report_to": "tensorboard"}
    places |= {"save_steps": 7, "save_total_limit": 1, "logging_steps": 5, "log_level": "error", "disable_tqdm": True}
    kept = CrowConfig(str(tmp_path / "two"), use_cpu=True, resume_from_checkpoint=str(tmp_path), **places)
    assert recorded_settings(kept) == recorded_settings(plain)


def test_settings_hold_no_secrets(tmp_path):
    args = CrowConfig(
        str(tmp_path), use_cpu=True, hub_token=SECRET, model_init_kwargs={"token": SECRET, "dtype": "float32"}
    )
    recorded = recorded_settings(args)
    assert SECRET not in json.dumps(recorded) and recorded["model_init_kwargs"] == {"dtype": "float32"}
