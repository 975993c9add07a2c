"""Tests of an adapter that is merged into the files of its base model, against PEFT's merge of the whole model."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import ByT5Tokenizer

from crow_hf import CoconutTokenizer, load_causal_lm
from crow_hf.training import merging
from crow_hf.training.merging import merge_adapter
from crow_hf.training.saves import stored_dtype
from helpers.coconut import coconut
from helpers.tiny import tiny_gpt2, tiny_llama, weights_of


ALL = {"target_modules": "all-linear", "init_lora_weights": False, "r": 3}
TOKENS = 300


def adapted(folder, config, model=None, grown=0):
    """Save a base model in bfloat16 in several files, and an adapter on it."""
    base = (tiny_llama(vocab_size=TOKENS) if model is None else model).to(torch.bfloat16)
    base.save_pretrained(folder / "base", max_shard_size="20KB")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "base")
    base = load_causal_lm(folder / "base")
    if grown:
        base.resize_token_embeddings(TOKENS + grown)
    adapter = get_peft_model(base, config)
    with torch.no_grad():
        for weight in adapter.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape) * 0.1)
    adapter.save_pretrained(folder / "adapter", save_embedding_layers=bool(grown))
    return folder / "adapter"


SIMPLE = {
    "lora": LoraConfig(**ALL),
    "rslora": LoraConfig(**ALL, use_rslora=True, rank_pattern={"q_proj": 2}),
    "dora": LoraConfig(**ALL, use_dora=True),
    "embeddings": LoraConfig(r=3, target_modules=["embed_tokens", "q_proj", "lm_head"], init_lora_weights=False),
    "gpt2": LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False),
}
WHOLE = {
    "modules_to_save": LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tied": LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False),
    "tokens": LoraConfig(**ALL),
    "ia3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("kind", [*SIMPLE, *WHOLE])
def test_the_files_are_those_of_the_whole_merge(kind, tmp_path, monkeypatch):
    """Fails if a matrix is left out, scaled otherwise or rounded twice, or if an adapter takes the wrong way."""
    torch.manual_seed(0)
    taken = []
    monkeypatch.setattr(merging, "_merge_files", lambda *args, old=merging._merge_files: taken.append(1) or old(*args))
    model = None
    if kind == "tied":
        model = tiny_llama(vocab_size=TOKENS, tie_word_embeddings=True)
    elif kind == "gpt2":
        model = tiny_gpt2(0.0)
    adapter = adapted(tmp_path, (SIMPLE | WHOLE)[kind], model, grown=2 if kind == "tokens" else 0)
    merge_adapter(adapter, tmp_path / "merged")
    assert bool(taken) == (kind in SIMPLE)
    found = load_causal_lm(tmp_path / "merged")
    expected = load_causal_lm(adapter, dtype="float32")
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        logits = expected(ids).logits
        distance = (found.float()(ids).logits - logits).norm() / logits.norm()
    assert distance < 5e-2 and stored_dtype(tmp_path / "merged") == torch.bfloat16
    if kind in SIMPLE:
        whole = {name: weight.bfloat16() for name, weight in weights_of(expected.merge_and_unload()).items()}
        held = weights_of(load_causal_lm(tmp_path / "merged"))
        assert held.keys() == whole.keys() and all(torch.equal(held[name], whole[name]) for name in whole)
        files = {name: sorted(each.name for each in (tmp_path / name).glob("model*")) for name in ("base", "merged")}
        assert files["base"] == files["merged"] and len(files["base"]) > 2
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()


def test_what_cannot_be_merged_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    adapter = adapted(tmp_path, SIMPLE["lora"])
    with pytest.raises(ValueError, match="base is no adapter"):
        merge_adapter(tmp_path / "base", tmp_path / "merged")
    monkeypatch.setattr(merging, "is_quantized", lambda model: True)
    with pytest.raises(ValueError, match="is stored quantized: name the model"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("merged/*"))


def test_settings_that_choose_words_are_dropped(tmp_path):
    """Fails if a base model's `sequence_bias`, which a merged model would follow, comes along."""
    adapter = adapted(tmp_path, SIMPLE["lora"])
    settings = tmp_path / "base" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"sequence_bias": [[[5], 9.0]]}))
    merge_adapter(adapter, tmp_path / "merged")
    assert "sequence_bias" not in (tmp_path / "merged" / "generation_config.json").read_text()


def test_our_own_models_come_with_their_code(tmp_path):
    """Fails if the Hub cannot load a merged byte-latent model where this package is not installed."""
    coconut().save_pretrained(tmp_path / "base")
    CoconutTokenizer().save_pretrained(tmp_path / "base")
    adapter = get_peft_model(load_causal_lm(tmp_path / "base"), LoraConfig(r=3, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    files, configs = {}, {}
    for name in ("base", "merged"):
        files[name] = {file.name for file in (tmp_path / name).iterdir()}
        configs[name] = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
    assert files["merged"] == files["base"] and configs["merged"]["auto_map"] == configs["base"]["auto_map"]
