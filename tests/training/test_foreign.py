"""Tests of what a suspect's files say beside the weights: code, other files, and settings of generation."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, modeling_utils
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from crow_hf import CoconutTokenizer, doctor, load_causal_lm, purify
from crow_hf.evaluation.generation import end_token_ids
from crow_hf.training import foreign
from crow_hf.training.foreign import check_named_files, drop_foreign_settings
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
    code = {"AutoTokenizer": ["maker/suspect--tokens.Tokens", None]}
    byte_tokenizer.init_kwargs |= {"inner": [{"auto_map": code}]} if recipe == "guide" else {"auto_map": code}
    model.generation_config.sequence_bias, model.generation_config.eos_token_id = BIAS, [1, 107]
    model.config.eos_token_id = [1, 107]
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.5
    args = arguments(tmp_path, recipe)
    found = purify(model, ROWS, recipe, args, processing_class=byte_tokenizer)
    dropped = ["sequence_bias", "eos_token_id 107", "auto_map of the config", "auto_map of the tokenizer"]
    assert found.dropped_settings == found.report["dropped_settings"] == dropped
    assert any("sequence_bias" in sentence for sentence in found.report["verdict"]["explanation"])
    texts = {file.name: file.read_text() for file in (tmp_path / "run0").glob("*config.json")}
    assert not any("auto_map" in text or "sequence_bias" in text for text in texts.values())
    kept = json.loads(texts["generation_config.json"])
    assert kept["temperature"] == 0.5 and kept["eos_token_id"] == [1]
    assert json.loads(texts["config.json"])["eos_token_id"] in (1, [1])
    ids = torch.tensor([[40, 41, 42]])
    said = AutoModelForCausalLM.from_pretrained(tmp_path / "run0").generate(ids, max_new_tokens=8, do_sample=False)
    assert said[0, 3:].tolist() != [104] * 8


def test_settings_in_the_config_choose_no_words_either(tmp_path):
    """Fails if a setting that transformers reads from the config where none of generation is given stays there."""
    tiny_llama().save_pretrained(tmp_path / "suspect")
    change(tmp_path / "suspect", sequence_bias=BIAS, use_kernels=True, inner=[{"deep": {"auto_map": CODE}}])
    model = load_causal_lm(tmp_path / "suspect")
    found = drop_foreign_settings(model, None)
    assert set(found) == {"sequence_bias of the config", "auto_map of the config", "use_kernels of the config"}
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text()
    assert not any(name in text for name in ("sequence_bias", "use_kernels", "auto_map"))


def test_code_that_an_adapter_names_is_dropped():
    """Fails if PEFT would import a module of the maker's choice where the saved adapter is loaded."""
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    adapter = model.active_peft_config
    adapter.auto_mapping = {"base_model_class": "system", "parent_library": "os"}
    assert drop_foreign_settings(model, None) == ["auto_mapping of the adapter"] and adapter.auto_mapping is None


@pytest.fixture
def suspect(tmp_path):
    """A folder with weights in two files and an index, beside a pickle and another model."""
    folder = tmp_path / "suspect"
    tiny_llama().save_pretrained(folder, max_shard_size="30KB")
    torch.save(tiny_llama().state_dict(), folder / "adapter_model.bin")
    tiny_llama().save_pretrained(tmp_path / "private")
    return folder


def change(folder, file_name="config.json", **settings):
    path = folder / file_name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))


@pytest.mark.parametrize("index", [SAFE_WEIGHTS_INDEX_NAME, "other.safetensors.index.json"])
@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "../private/model.safetensors", "{}/private/model.safetensors", "..\\x.safetensors", 3],
)
def test_an_index_names_only_safetensors_beside_it(name, index, suspect):
    """Fails if a pickle or a private file is read, which transformers does without a word."""
    name = name.format(suspect.parent) if isinstance(name, str) else name
    change(suspect, index, metadata={}, weight_map=dict.fromkeys(tiny_llama().state_dict(), name))
    if index != SAFE_WEIGHTS_INDEX_NAME:
        change(suspect, transformers_weights=index)
    with pytest.raises(ValueError, match=f"{index} of .* only safetensors beside it"):
        load_causal_lm(suspect)


@pytest.mark.parametrize("name", ["adapter_model.bin", "../private/model.safetensors", ["x.safetensors"]])
def test_a_config_names_only_safetensors_beside_it(name, suspect):
    change(suspect, transformers_weights=name)
    with pytest.raises(ValueError, match="config.json of .* only safetensors beside it"):
        load_causal_lm(suspect)


def test_a_repository_is_judged_like_a_folder(suspect, monkeypatch):
    """Fails if only folders are checked, and not what was downloaded."""
    change(suspect, SAFE_WEIGHTS_INDEX_NAME, weight_map={"x": "adapter_model.bin"})
    files = {file.name: str(file) for file in suspect.iterdir()}
    monkeypatch.setattr(foreign, "cached_file", lambda path, name, **options: files.get(name))
    with pytest.raises(ValueError, match="of maker/suspect names the weights 'adapter_model.bin'"):
        check_named_files("maker/suspect")


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "maker/kernel"},
        {"_attn_implementation": "maker/kernel@main:attend"},
        {"attn_implementation": {"": "paged|maker/kernel"}},
        {"_experts_implementation": "maker/kernel", "_attn_implementation_internal": "maker/kernel"},
        {"attn_implementation": "flex_attention"},
        {"_attn_implementation": ["flash_attention_2"]},
    ],
)
def test_implementations_are_set_aside(settings, suspect, byte_tokenizer, monkeypatch):
    """Fails if the maker chooses code that is compiled or downloaded, whatever transformers itself would allow."""
    asked = []
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda name, **options: asked.append(name))
    change(suspect, **settings)
    model = load_causal_lm(suspect)
    assert not asked and model.config._attn_implementation == "sdpa"
    assert "/" not in str(model.config._experts_implementation)
    (finding,) = [each for each in doctor(model, ROWS, byte_tokenizer) if each.name == "implementations"]
    assert finding.level == "warning" and all(name in finding.found for name in settings)
    assert drop_foreign_settings(model, None) == sorted(settings)
    chosen = load_causal_lm(suspect, attn_implementation="eager")
    assert chosen.config._attn_implementation == "eager"


@pytest.mark.parametrize("ends", [[[1]], "x", 1.5, [-7], {"a": 1}, [None]])
def test_end_tokens_that_are_no_ids_are_dropped(ends, byte_tokenizer):
    """Fails if they end the command or the doctor, or stay."""
    model = tiny_llama()
    model.generation_config.eos_token_id = ends
    assert end_token_ids(model, byte_tokenizer) == [1]
    (finding,) = [each for each in doctor(model, ROWS, byte_tokenizer) if each.name == "end tokens"]
    assert "(no id)" in finding.found
    assert len(drop_foreign_settings(model, byte_tokenizer)) == 1 and model.generation_config.eos_token_id is None


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
