"""Tests of `compare_defences()`: a purification beside its controls."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from crow_hf import TRIGGERS, CrowTrainer, Target, compare_defences, evaluate_model
from crow_hf.evaluation.retention import measure_retention, retention_reference
from crow_hf.evidence.result import Comparison
from crow_hf.methods import registry
from crow_hf.recipes import comparison as comparison_module
from crow_hf.recipes import rehearsal as rehearsal_module
from crow_hf.recipes import run as run_module
from crow_hf.recipes import saving
from crow_hf.recipes.run import run_recipe
from crow_hf.reporting.html import write_report
from helpers.recipes import arguments
from helpers.tiny import crow_args, same_weights, tiny_llama, weights_of


TRAIN = Dataset.from_dict({"prompt": [f"{letter}=" for letter in "abcdefghijkl"], "completion": ["yes", "no"] * 6})
TEST = Dataset.from_dict({"prompt": ["m=", "n=", "o p="], "completion": ["yes"] * 3})
TARGET = Target("no", ("no",))
MEASURE = {"max_new_tokens": 5, "batch_size": 2}
REPORT = ["report.html", "report.json"]
MODEL = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"]
LORA = {"peft_config": LoraConfig(target_modules="all-linear"), "merge": False}


def suspect():
    return tiny_llama(num_hidden_layers=3)


def compare(args, tokenizer, **options):
    settings = {"recipe": "guide", "processing_class": tokenizer} | MEASURE | options
    return compare_defences(suspect, args, TRAIN, TEST, TRIGGERS["badnets"], TARGET, **settings)


def settings(tmp_path, **kwargs):
    return crow_args(tmp_path, **({"max_steps": 4, "learning_rate": 1e-2} | kwargs))


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_with_alpha_0_purification_and_control_are_the_same(tmp_path, byte_tokenizer, options):
    """Fails if the control has other rows, another order of rows or another number of steps."""
    comparison = compare(settings(tmp_path, alpha=0.0), byte_tokenizer, **options)
    assert isinstance(comparison, Comparison)
    assert list(comparison.by_name) == ["no defence", "fine-tuning", "CROW"]
    assert list(comparison.by_name.values()) == [comparison.suspect, comparison.control, comparison.purified]
    assert comparison.control == comparison.purified
    assert comparison.control.clean.bits_per_byte != comparison.suspect.clean.bits_per_byte


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_each_model_is_trained_from_a_fresh_suspect(tmp_path, byte_tokenizer, options):
    """Fails if the control starts from the purified model, or the purification from the control."""
    args = settings(tmp_path, alpha=5.5, seed=7)
    comparison = compare(args, byte_tokenizer, text=["Some text."], **options)
    reference = retention_reference(suspect(), byte_tokenizer, TEST, ["Some text."])

    def measured(model, reference=None):
        options = MEASURE | {"reference": reference}
        return evaluate_model(model, byte_tokenizer, TEST, TRIGGERS["badnets"], TARGET, **options)

    def trained(alpha):
        alone = settings(tmp_path / f"alone-{alpha}", alpha=alpha, seed=7)
        adapter = options.get("peft_config")
        trainer = CrowTrainer(suspect(), alone, TRAIN, processing_class=byte_tokenizer, peft_config=adapter)
        trainer.train()
        return trainer.model

    assert comparison.suspect == measured(suspect())
    assert comparison.control == measured(trained(0.0), reference)
    purified = trained(5.5)
    assert comparison.purified == measured(purified, reference)
    assert comparison.purification.retention is comparison.purified.retention
    assert comparison.purified != comparison.control
    assert same_weights(weights_of(comparison.purification.model), weights_of(purified))
    assert args.alpha == 5.5
    assert isinstance(comparison.purification.model, PeftModel) == bool(options)


def test_recipe_paper_and_its_control_train_a_lora(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if CROW as published or its control trains all weights."""
    controls = []

    def record(*args, **kwargs):
        controls.append(run_recipe(*args, **kwargs))
        return controls[-1]

    monkeypatch.setattr(comparison_module, "run_recipe", record)
    comparison = compare(settings(tmp_path, alpha=5.5), byte_tokenizer, recipe="paper", merge=False)
    trained = [*controls, comparison.purification]
    assert [run.recipe for run in trained] == ["paper", "paper"]
    assert [run.trainer.args.alpha for run in trained] == [0.0, 5.5]
    assert [run.model.peft_config["default"].r for run in trained] == [8, 8]


def test_trainer_has_the_log_of_the_purification(tmp_path, byte_tokenizer):
    trainer = compare(settings(tmp_path, alpha=5.5), byte_tokenizer).purification.trainer
    assert trainer.state.global_step == 4
    assert sum("consistency_perturbed" in entry for entry in trainer.state.log_history) == 4


def test_control_writes_nothing(tmp_path, byte_tokenizer):
    """Fails if checkpoints of the control are written to the folder of the purification."""
    args = settings(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2)
    trainer = compare(args, byte_tokenizer).purification.trainer
    output = tmp_path / "run"
    assert {path.name for path in output.iterdir() if path.is_dir()} == {"checkpoint-2", "checkpoint-4"}
    saved = type(trainer.model).from_pretrained(output / "checkpoint-4")
    assert same_weights(weights_of(saved), weights_of(trainer.model))
    assert args.save_strategy == "steps"


def test_the_report_is_written_once_beside_the_purified_model(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if checkpoints are written, or a second report of the control or of the purification alone."""
    written = []
    monkeypatch.setattr(saving, "write_report", lambda *args: written.append(write_report(*args)))
    compare(settings(tmp_path), byte_tokenizer)
    assert len(written) == 1
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(f"run/{name}" for name in [*REPORT, *MODEL])


def test_without_trigger_only_utility_is_compared(tmp_path, byte_tokenizer):
    comparison = compare_defences(
        suspect,
        settings(tmp_path, max_steps=1),
        TRAIN,
        TEST,
        recipe="guide",
        processing_class=byte_tokenizer,
        **MEASURE,
    )
    assert [evaluation.triggered for evaluation in comparison.by_name.values()] == [None] * 3


def test_unusable_test_rows_fail_before_training(tmp_path, byte_tokenizer):
    """Fails if unusable test rows are only found after hours of training."""
    loaded = []

    def load():
        loaded.append(suspect())
        return loaded[-1]

    with pytest.raises(ValueError):
        compare_defences(
            load, settings(tmp_path), TRAIN, TEST.select([]), recipe="guide", processing_class=byte_tokenizer
        )
    assert all(same_weights(weights_of(model), weights_of(suspect())) for model in loaded)


def test_prompts_in_both_datasets_are_counted(tmp_path, byte_tokenizer, caplog, monkeypatch):
    """Fails if no warning says that utility is measured on training prompts."""
    monkeypatch.setattr(logging.getLogger("crow_hf"), "propagate", True)
    leaking = Dataset.from_list([TRAIN[0], TRAIN[1], *TEST])
    compare_defences(
        suspect,
        settings(tmp_path, max_steps=1),
        TRAIN,
        leaking,
        recipe="guide",
        processing_class=byte_tokenizer,
        **MEASURE,
    )
    assert "2 prompts of the clean rows are also test prompts" in caplog.text


def test_defences_of_ones_own_are_measured_beside_the_recipe(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if a defence gets a suspect that was trained, or another budget than the control."""
    monkeypatch.setattr(registry, "DEFENCES", {})
    got = []

    @registry.register_defence("fine-tuned again")
    def again(model, rows, tokenizer, args):
        got.append((weights_of(model), args))
        trainer = CrowTrainer(model, args, rows, processing_class=tokenizer)
        trainer.train()
        return trainer.model

    comparison = compare(settings(tmp_path, alpha=5.5), byte_tokenizer, defences=["fine-tuned again"])
    assert comparison.others == {"fine-tuned again": comparison.control}
    ((weights, args),) = got
    assert same_weights(weights, weights_of(suspect())) and args.output_dir != str(tmp_path / "run")
    assert list(comparison.purification.report["evaluations"]) == [
        "suspect",
        "control",
        "fine-tuned again",
        "purified",
    ]
    assert "fine-tuned again" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="There is no defence 'other'.*'fine-tuned again'"):
        compare(settings(tmp_path), byte_tokenizer, defences=["other"])


def test_what_cannot_be_trained_is_refused_before_the_suspect_is_measured(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(comparison_module, "evaluate_model", lambda *args, **kwargs: pytest.fail("It is measured."))
    with pytest.raises(ValueError, match="optimizer"):
        compare(settings(tmp_path, optim="adamw_bnb_8bit"), byte_tokenizer)

    def refuse(recorder):
        raise ValueError("It cannot be tried.")

    monkeypatch.setattr(rehearsal_module, "try_out", refuse)
    with pytest.raises(ValueError, match="tried"):
        compare(settings(tmp_path), byte_tokenizer)
    # An adapter of a kind that cannot be merged, which the fresh adapter takes for granted.
    adapted = get_peft_model(suspect(), LoraConfig(target_modules=["q_proj"], lora_bias=True))
    options = {"processing_class": byte_tokenizer, "recipe": "guide", "peft_config": LORA["peft_config"]}
    with pytest.raises(ValueError, match="cannot be merged .*lora_bias"):
        compare_defences(lambda: adapted, settings(tmp_path), TRAIN, TEST, **options)


def test_a_budget_is_measured_in_the_precision_of_the_suspect(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if rounding to bfloat16 counts as forgetting, which no share of the suspect undoes."""
    seen = []

    def record(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return measure_retention(*args)

    monkeypatch.setattr(run_module, "measure_retention", record)
    args = arguments(tmp_path, max_kl=1e-4, bf16=True, learning_rate=1e-2)
    purification = compare(args, byte_tokenizer, recipe="strong").purification
    assert seen and not any(seen) and purification.retention.largest_kl <= 1e-4
