"""Files that ask for many times the memory that they hold are refused before anything is built."""

import json
import os
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from crow_hf import load_causal_lm
from crow_hf.training.loading import load_tokenizer
from crow_hf.training.sizes import check_growth, check_layers, check_size
from helpers.tiny import tiny_llama


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_with_endless_tokens_is_refused(name, tmp_path):
    """Fails if it is read, which takes minutes."""
    tokens = [{"id": number, "content": f"w{number}"} for number in range(100_001)]
    (tmp_path / name).write_text(json.dumps({"added_tokens": tokens}))
    with pytest.raises(ValueError, match=f"{name} of .* adds over 100,000 tokens"):
        load_tokenizer(tmp_path)


@pytest.fixture
def suspect(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**12}, "more layers than any model has"),
        ({"text_config": {"n_layer": 10**6}}, "more layers than any model has"),
        ({"num_hidden_layers": 1_000}, "asks for 1000 layers"),
        ({"intermediate_size": 10**6}, "asks for a model of"),
        ({"vocab_size": 10**6}, "asks for a model of"),
    ],
)
def test_a_config_that_asks_for_more_than_the_files_hold_is_refused(suspect, changes, said):
    edit(suspect / "config.json", **changes)
    with pytest.raises(ValueError, match=said):
        load_causal_lm(suspect)


def test_sizes_of_layers_are_no_layers(tmp_path):
    """Fails if a wide model is refused for the names of its settings."""
    sizes = {"hidden_size_per_layer": 4096, "intermediate_size_per_layer": [8192], "n_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    check_layers(tmp_path)


def test_an_adapter_that_asks_for_a_high_rank_is_refused(suspect, tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(load_causal_lm(suspect), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    assert load_causal_lm(folder)
    for changes in ({"r": 10**5}, {"r": 2, "rank_pattern": {"q_proj": 10**5}}):
        edit(folder / "adapter_config.json", **changes)
        with pytest.raises(ValueError, match="asks for a rank of 100000"):
            load_causal_lm(folder)


def test_files_that_cannot_be_measured_are_a_sentence(suspect):
    """Fails if the measuring itself dies of damaged weights or of deep settings."""
    deep = "[" * 900 + "7" + "]" * 900
    (suspect / "config.json").write_text((suspect / "config.json").read_text().replace("{", f'{{"deep": {deep},', 1))
    check_layers(suspect)
    (suspect / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="cannot be read|cannot be loaded"):
        load_causal_lm(suspect)
    with pytest.raises(ValueError, match="The weights of .* cannot be read"):
        check_size(suspect, tiny_llama().config)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "README.md"])
def test_a_pipe_or_a_text_without_end_is_refused(suspect, name):
    (suspect / name).unlink(missing_ok=True)
    os.mkfifo(suspect / name)
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(ValueError, match=f"{name} in .* is a pipe or a device"):
            load(suspect)
    (suspect / name).unlink()
    (suspect / name).touch()
    os.truncate(suspect / name, 2**40)
    with pytest.raises(ValueError, match=f"{name} in .* has over 256 MiB"):
        load_tokenizer(suspect)


def test_a_tokenizer_that_makes_texts_longer_is_refused():
    """Fails if ten replacements, each by ten characters, may make ten billion characters of one."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.NFKC()])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    check_growth(PreTrainedTokenizerFast(tokenizer_object=backend))
    backend.decoder = decoders.Sequence([decoders.Replace("a", "a" * 10)] * 3)
    with pytest.raises(ValueError, match="its decoder makes up to 1,000 characters of one"):
        check_growth(PreTrainedTokenizerFast(tokenizer_object=backend))
    inner = normalizers.Sequence([normalizers.Prepend("a" * 11), normalizers.Lowercase()])
    backend.normalizer = normalizers.Sequence([normalizers.Replace("a", "a" * 10), inner])
    with pytest.raises(ValueError, match="its normalizer makes up to 110 characters of one"):
        check_growth(PreTrainedTokenizerFast(tokenizer_object=backend))


def free_memory(monkeypatch, count):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=count))


@pytest.mark.parametrize(("dtype", "width"), [({}, 4), ({"dtype": "bfloat16"}, 2), ({"dtype": torch.float64}, 8)])
def test_a_model_that_does_not_fit_into_memory_is_refused(suspect, monkeypatch, dtype, width):
    """Fails if its weights are read, or if one that just fits is refused."""
    model = tiny_llama()
    needed = width * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    free_memory(monkeypatch, needed)
    assert load_causal_lm(suspect, **dtype).dtype.itemsize == width
    free_memory(monkeypatch, needed - 1)
    with pytest.raises(ValueError, match=r"weights of .* take 0\.0 GB in (bfloat16|float\d\d), but only 0\.0 GB"):
        load_causal_lm(suspect, **dtype)


def test_a_base_that_does_not_fit_into_memory_is_refused(suspect, monkeypatch):
    get_peft_model(load_causal_lm(suspect), LoraConfig(target_modules=["q_proj"])).save_pretrained(suspect / "adapter")
    free_memory(monkeypatch, 1)
    with pytest.raises(ValueError, match="base model .* cannot be used: The weights of"):
        load_causal_lm(suspect / "adapter")


@pytest.mark.parametrize("kwargs", [{"device_map": "meta"}, {"device_map": "auto", "offload_folder": "offload"}])
def test_what_does_not_go_to_memory_is_not_refused(suspect, tmp_path, monkeypatch, kwargs):
    # The folder for what is offloaded is made here.
    monkeypatch.chdir(tmp_path)
    free_memory(monkeypatch, 1)
    load_causal_lm(suspect, **kwargs)


def test_processes_that_share_a_model_are_not_refused(suspect, monkeypatch):
    free_memory(monkeypatch, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    load_causal_lm(suspect)
