"""Tests of `purify()`: each recipe from end to end on tiny models."""

import logging
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import ByT5Tokenizer, LlamaForCausalLM

from crow_hf import CrowTrainer, load_causal_lm
from crow_hf.evaluation.retention import measure_retention, retention_reference
from crow_hf.evidence.result import Purification
from crow_hf.methods.invariance.trainer import InvarianceTrainer
from crow_hf.recipes import holdout
from crow_hf.recipes import purification as purification_module
from crow_hf.recipes.presets import MAX_ROWS, RECIPES, lora_config
from crow_hf.recipes.purification import draw_rows, purify
from crow_hf.recipes.run import default_adapter, run_recipe
from crow_hf.reporting.record import adapter_settings
from helpers.recipes import ROWS, arguments
from helpers.tiny import same_weights, tiny_llama, weights_of


IDS = torch.tensor([list(range(3, 20))])


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def saved(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "suspect")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "suspect")
    return tmp_path / "suspect"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_path_and_an_object_give_the_same(recipe, saved, tmp_path, byte_tokenizer):
    """Fails if another recipe runs, or if the model at the path or its tokenizer is not used."""
    by_path = purify(str(saved), ROWS, recipe, arguments(tmp_path, recipe))
    by_object = purify(tiny_llama(), ROWS, recipe, arguments(tmp_path, recipe), processing_class=byte_tokenizer)
    assert isinstance(by_path, Purification) and by_path.recipe == recipe and by_path.canaries == []
    assert same_weights(weights_of(by_path.model), weights_of(by_object.model))
    assert by_path.model is by_path.trainer.model and by_path.screening is None
    assert type(by_path.trainer) is (InvarianceTrainer if recipe == "strong" else CrowTrainer)
    assert type(by_path.model) is LlamaForCausalLM
    assert not same_weights(weights_of(tiny_llama()), weights_of(by_path.model))


def test_recipe_strong_is_an_invariance_trainer(tmp_path, byte_tokenizer):
    """Fails if another adapter is trained, or if it is not merged at the end."""
    args = arguments(tmp_path, keep=0.2)
    found = purify(tiny_llama(), ROWS, args=args, processing_class=byte_tokenizer)
    again, adapter = arguments(tmp_path, keep=0.2), default_adapter("strong", tiny_llama(), args)
    trainer = InvarianceTrainer(tiny_llama(), again, ROWS, byte_tokenizer, adapter)
    trainer.train()
    assert same_weights(weights_of(found.model), weights_of(trainer.model.merge_and_unload()))


@pytest.mark.parametrize("text", [None, ["One text.", "Another."]])
def test_what_the_model_forgot_is_measured(text, tmp_path, byte_tokenizer, monkeypatch):
    """Fails if the reference is taken after the training, which changes the suspect, or if text is ignored."""
    monkeypatch.setattr(holdout, "can_write_prompts", lambda *args: True)
    args = arguments(tmp_path, "guide", learning_rate=1e-2, seed=4)
    found = purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer, text=text).retention
    reference = retention_reference(tiny_llama(), byte_tokenizer, ROWS, text, batch_size=8, seed=4, max_windows=16)
    assert found.answer_kl > 0.01 and found.text_kl > 0.01
    again = arguments(tmp_path, "guide", learning_rate=1e-2, seed=4)
    trainer = CrowTrainer(tiny_llama(), again, ROWS, processing_class=byte_tokenizer)
    trainer.train()
    wanted = measure_retention(trainer.model, byte_tokenizer, reference)
    assert found.text_source == ("passed" if text else "written by the reference")
    for name in ("answer_kl", "text_kl", "text_bits_ratio"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-4), name
    assert found.num_text_tokens == wanted.num_text_tokens and found.num_answer_tokens == wanted.num_answer_tokens


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        purify(tiny_llama(), ROWS, args=arguments(tmp_path))


@pytest.mark.parametrize(("max_rows", "used"), [(None, 5), (3, 3), (0, 12), (99, 12)])
def test_max_rows_is_the_number_of_rows_that_are_trained_on(max_rows, used, tmp_path, byte_tokenizer, monkeypatch):
    """With a batch size of 1, one epoch has as many steps as rows. 0 uses all rows, and `None` those of the recipe."""
    monkeypatch.setitem(MAX_ROWS, "guide", 5)
    args = arguments(tmp_path, "guide", max_steps=-1, num_train_epochs=1, per_device_train_batch_size=1)
    found = purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer, max_rows=max_rows)
    assert found.trainer.state.global_step == used == found.report["run"]["train_dataset"]["rows"]


@pytest.mark.parametrize(("recipe", "cap"), [("strong", 1000), ("paper", 100), ("guide", 100)])
def test_rows_are_drawn_at_random_up_to_the_default_of_the_recipe(recipe, cap, caplog, monkeypatch):
    """Fails if another number of rows is drawn, if a row is drawn twice, or if only the first rows are drawn."""
    monkeypatch.setattr(logging.getLogger("crow_hf"), "propagate", True)
    rows = Dataset.from_dict({"text": [str(number) for number in range(1500)]})
    drawn = draw_rows(rows, recipe, None, seed=1)["text"]
    assert len(drawn) == len(set(drawn)) == cap and f"{cap} of 1500 clean rows are used" in caplog.text
    assert drawn[:] == draw_rows(rows, recipe, None, seed=1)["text"][:]
    assert set(drawn) != set(draw_rows(rows, recipe, None, seed=2)["text"]) and set(drawn) != set(rows["text"][:cap])
    # Fewer rows, and rows that are asked for, are used as they are.
    caplog.clear()
    assert draw_rows(rows, recipe, 0, seed=1)["text"][:] == rows["text"][:]
    assert draw_rows(rows.select(range(cap)), recipe, None, seed=1)["text"][:] == rows["text"][:cap]
    stream = rows.to_iterable_dataset()
    assert draw_rows(stream, recipe, None, seed=1) is stream
    assert "clean rows are used" not in caplog.text


def test_negative_max_rows_is_refused_before_the_model_is_loaded(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(purification_module, "load_causal_lm", lambda *args, **kwargs: pytest.fail("It is loaded."))
    args = arguments(tmp_path, "guide")
    with pytest.raises(ValueError, match="`max_rows` is a number of rows, or 0 for all of them, got -1"):
        purify(str(saved), ROWS, "guide", args, max_rows=-1)
    assert not (tmp_path / "run0").exists()


def test_merge_saves_weights_with_the_logits_of_the_adapter(saved, tmp_path):
    """Fails if `merge=False` merges, or if the merged model, in memory or saved, answers differently."""
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapter, merged = (
        purify(saved, ROWS, "guide", arguments(tmp_path, "guide", learning_rate=0.1), peft_config=lora, merge=merge)
        for merge in (False, True)
    )
    assert isinstance(adapter.model, PeftModel) and type(merged.model) is LlamaForCausalLM
    loaded = [load_causal_lm(purification.trainer.args.output_dir) for purification in (adapter, merged)]
    assert isinstance(loaded[0], PeftModel) and type(loaded[1]) is LlamaForCausalLM
    trained = logits_of(adapter.model)
    assert not torch.allclose(trained, logits_of(tiny_llama()), atol=1e-2)
    for model in (merged.model, *loaded):
        torch.testing.assert_close(logits_of(model), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["strong", "guide"])
def test_an_unmerged_adapter_on_a_merged_suspect_is_refused(recipe, saved, tmp_path):
    """
    Fails if the adapter is saved without its base, the suspect with its own adapter merged. The folder would load as
    another model.
    """
    backdoored = get_peft_model(load_causal_lm(saved), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    backdoored.save_pretrained(tmp_path / "adapter")
    fresh = LoraConfig(target_modules=["v_proj"])
    options = {"processing_class": ByT5Tokenizer(extra_ids=0), "peft_config": fresh, "merge": False}
    for suspect in (backdoored, tmp_path / "adapter"):
        with pytest.raises(ValueError, match="`merge=True`"):
            purify(suspect, ROWS, recipe, arguments(tmp_path, recipe), **options)
    assert not list(tmp_path.glob("run*/*"))


def test_the_card_repeats_any_adapter(tmp_path, byte_tokenizer):
    """Fails if the card names other settings than those of the adapter, or settings that `--config` does not take."""
    own = LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
    needy = AdaLoraConfig(total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert adapter_settings(needy) == {"total_step": 10, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for config in (lora_config(2), own):
        args = arguments(tmp_path, "guide")
        purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer, peft_config=config)
        card = (Path(args.output_dir) / "README.md").read_text(encoding="utf-8")
        code = re.search(r"`peft_config=(.*)` too", card)
        assert ("lora_r: 2" in card) == (code is None) == (config is not own)
    assert eval(code.group(1), {"LoraConfig": LoraConfig}).to_dict() == own.to_dict()


@pytest.mark.parametrize("kind", ["adapter of the suspect", "fresh adapter"])
def test_an_adapter_on_a_base_without_a_name_is_told(kind, tmp_path, byte_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("crow_hf"), "propagate", True)
    lora, args = LoraConfig(target_modules=["q_proj"]), arguments(tmp_path, "guide")
    model, options = tiny_llama(), {"peft_config": lora, "merge": False}
    if kind != "fresh adapter":
        model, options = get_peft_model(model, lora), {}
    purify(model, ROWS, "guide", args, processing_class=byte_tokenizer, **options)
    assert "will not name its base model" in caplog.text


def test_a_budget_limits_what_is_forgotten(tmp_path, byte_tokenizer, caplog):
    """Fails if the suspect is not mixed in, if more of it is mixed in than needed, or if nobody is told how much."""

    def purified(**settings):
        args = arguments(tmp_path, learning_rate=1e-2, **settings)
        return purify(tiny_llama(), ROWS, args=args, processing_class=byte_tokenizer)

    free = purified()
    spent = free.retention.largest_kl
    wide = purified(max_kl=2 * spent)
    assert same_weights(weights_of(wide.model), weights_of(free.model)) and wide.kept == wide.report["kept"] == 0
    tight = purified(max_kl=spent / 10)
    assert 0.8 * spent / 10 < tight.retention.largest_kl <= spent / 10
    assert tight.report["kept"] == tight.kept > 0.3
    assert any("do not rely on the removal" in sentence for sentence in tight.report["verdict"]["explanation"])
    assert any("do not rely on the removal" in record.getMessage() for record in caplog.records)


def test_a_budget_takes_a_measurement(tmp_path, byte_tokenizer):
    with pytest.raises(ValueError, match="max_kl"):
        run_recipe(tiny_llama(), ROWS, "strong", arguments(tmp_path, max_kl=0.1), processing_class=byte_tokenizer)
