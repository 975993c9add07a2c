"""Tests of what a suspect's files say beside the weights: code and settings of generation."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from crow_hf import CoconutTokenizer, purify
from crow_hf.training.foreign import drop_foreign_settings
from helpers.coconut import coconut
from helpers.recipes import ROWS, arguments
from helpers.tiny import tiny_llama


CODE = {"AutoModelForCausalLM": "maker/suspect--modeling.Model"}
BIAS = [[[104], 1e4]]


@pytest.mark.parametrize("recipe", ["strong", "guide"])
def test_a_purified_model_takes_over_no_code_and_no_words(recipe, tmp_path, byte_tokenizer):
    """Fails if the saved model says what was never measured, or sends its users to the code of the suspect's maker."""
    model = tiny_llama()
    model.config.auto_map = CODE
    byte_tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["maker/suspect--tokens.Tokens", None]}
    model.generation_config.sequence_bias, model.generation_config.eos_token_id = BIAS, [1, 107]
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.5
    args = arguments(tmp_path, recipe)
    found = purify(model, ROWS, recipe, args, processing_class=byte_tokenizer)
    dropped = ["sequence_bias", "eos_token_id 107", "auto_map of the config", "auto_map of the tokenizer"]
    assert found.dropped_settings == found.report["dropped_settings"] == dropped
    assert any("sequence_bias" in sentence for sentence in found.report["verdict"]["explanation"])
    texts = {file.name: file.read_text() for file in (tmp_path / "run0").glob("*.json") if file.name != "report.json"}
    assert not any("auto_map" in text or "sequence_bias" in text for text in texts.values())
    kept = json.loads(texts["generation_config.json"])
    assert kept["temperature"] == 0.5 and kept["eos_token_id"] == [1]
    ids = torch.tensor([[40, 41, 42]])
    said = AutoModelForCausalLM.from_pretrained(tmp_path / "run0").generate(ids, max_new_tokens=8, do_sample=False)
    assert said[0, 3:].tolist() != [104] * 8


def test_harmless_settings_are_kept_without_a_word(caplog):
    model = tiny_llama()
    settings = {"do_sample": True, "top_p": 0.9, "max_new_tokens": 30, "eos_token_id": [1, 2], "pad_token_id": 0}
    model.generation_config = GenerationConfig(**settings)
    assert drop_foreign_settings(model, None) == [] and not caplog.records
    assert settings.items() <= model.generation_config.to_diff_dict().items()


def test_code_that_the_user_trusts_is_kept():
    model = tiny_llama()
    model.config.auto_map = CODE
    model.__class__ = type("Model", (type(model),), {"__module__": "transformers_modules.maker.modeling"})
    assert drop_foreign_settings(model, None) == [] and model.config.auto_map == CODE


def test_code_of_this_package_is_no_finding(caplog):
    model = coconut()
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_coconut.CoconutForCausalLM"}
    assert drop_foreign_settings(model, CoconutTokenizer()) == [] and not caplog.records
