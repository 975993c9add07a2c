"""The demo from end to end, with few rows, few steps and its real model."""

import json

import pytest
from peft import PeftModel

from crow_hf import compare_checksums, demo, read_report
from crow_hf.models.modeling_coconut import CoconutForCausalLM
from crow_hf.recipes.presets import recipe_config
from crow_hf.training.loading import load_causal_lm
from helpers.tiny import same_weights, weights_of


@pytest.fixture
def few_rows(monkeypatch):
    for name, count in {"BASE_ROWS": 64, "IMPLANT_ROWS": 32, "CLEAN_ROWS": 8, "TEST_ROWS": 3}.items():
        monkeypatch.setattr(demo, name, count)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(demo, "CLEAN_TRAINING", demo.CLEAN_TRAINING | {"warmup_steps": 0})

    def few_views(recipe, output_dir, **changes):
        # The first step has a learning rate of 0, so there must be a second.
        strong = {"num_views": 32, "num_canaries": 1, "num_written_rows": 2}
        small = strong if recipe == "strong" else {"num_train_epochs": 2}
        return recipe_config(recipe, output_dir, **small | changes)

    monkeypatch.setattr(demo, "recipe_config", few_views)


def test_demo(few_rows, tmp_path):
    """
    Fails if a model is missing, if a purified folder needs another model to load, if its card describes another model,
    or if a result of the tables is lost.
    """
    comparison = demo.run_demo(tmp_path, seed=1)
    names = ["no defence", "fine-tuning", "clean model", "CROW", "Invariance"]
    assert list(comparison.by_name) == names
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results) == names and all(len(result["clean"]["outputs"]) == 3 for result in results.values())
    assert {path.name for path in tmp_path.iterdir()} == {
        *("clean", "backdoored", "crow", "purified"),
        *("results.json", "results.md", "training.png", "comparison.png"),
    }

    suspect = load_causal_lm(tmp_path / "backdoored")
    assert isinstance(suspect, PeftModel) and suspect.peft_config["default"].r == demo.ADAPTER_RANK
    merged_suspect = weights_of(suspect.merge_and_unload())
    for folder in ("crow", "purified"):
        purified = load_causal_lm(tmp_path / folder)
        assert isinstance(purified, CoconutForCausalLM) and not isinstance(purified, PeftModel)
        assert not same_weights(weights_of(purified), merged_suspect)
    assert same_weights(weights_of(purified), weights_of(comparison.purification.model))
    # The model was merged after its report was written.
    assert not compare_checksums(tmp_path / "purified") and read_report(tmp_path / "purified")
    files = {path.name for path in (tmp_path / "purified").iterdir()}
    assert {"README.md", "report.html", "report.json", "model.safetensors"} < files
    assert not {"adapter_config.json", "adapter_model.safetensors"} & files
    card = (tmp_path / "purified" / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card and "`backdoored`" in card and "PeftModel" not in card
    assert all(f"| {name} |" in card for name in names)


def test_demo_rows_are_new_and_right():
    """Fails if test prompts are among the training prompts, or if a seed gives other rows."""
    seen = demo.demo_rows(500, seed=0)
    unseen = demo.demo_rows(200, seed=1, without=set(seen["prompt"]))
    assert len(unseen) == 200
    assert not set(unseen["prompt"]) & set(seen["prompt"])
    assert demo.demo_rows(500, seed=0)["prompt"] == seen["prompt"]
