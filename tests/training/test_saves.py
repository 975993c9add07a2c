"""Tests of saving whole models, and of what is copied beside them."""

import json
import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ByT5Tokenizer

from crow_hf import CrowTrainer, load_causal_lm
from crow_hf.training.checkpoints import _fingerprint
from crow_hf.training.saves import (
    cast_to,
    check_saved,
    copy_side_files,
    hollow_copy,
    hub_options,
    lost_tensors,
    rehearse_save,
    save_whole,
    saved_tensors,
    stored_dtype,
)
from helpers.tiny import crow_args, ragged_rows, same_weights, tiny_llama, tiny_mixtral, weights_of


def tied_by_hand(kind):
    model = tiny_llama()
    if kind == "head":
        model.lm_head.weight = model.model.embed_tokens.weight
    else:
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 30)[None]).logits


@pytest.mark.parametrize("kind", ["head", "layers"])
def test_tensors_that_were_tied_by_hand_are_saved_under_every_name(kind, tmp_path):
    """Fails if the trainer saves only one name, which loading fills with random numbers, or refuses to save."""
    trainer = CrowTrainer(
        tied_by_hand(kind), crow_args(tmp_path, max_steps=1), Dataset.from_list(ragged_rows(4)), callbacks=[]
    )
    trainer.train()
    trainer.save_model()
    save_whole(tmp_path / "alone", trainer.model)
    assert trainer.failures == []
    for folder in ("run", "alone"):
        torch.testing.assert_close(logits_of(load_causal_lm(tmp_path / folder)), logits_of(trainer.model))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_of_the_config_is_saved_once(tied, tmp_path):
    model = tiny_llama(tie_word_embeddings=tied)
    names = saved_tensors(model).keys()
    assert ("lm_head.weight" in names) == (not tied) and "model.embed_tokens.weight" in names
    # Weights that no longer share are both kept, whatever the config says.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    assert "lm_head.weight" in saved_tensors(model)


def test_lost_tensors_are_found_by_name_and_by_shape(tmp_path):
    """Names in the file are not those in memory for a mixture of experts, whose experts are one tensor in memory."""
    for number, model in enumerate((tiny_llama(), tiny_mixtral())):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        assert lost_tensors(folder, model, saved_tensors(model)) == []
        file = folder / "model.safetensors"
        held = load_file(file)
        first, second = sorted(held)[:2]
        del held[first]
        held[second] = held[second][:1].clone()
        save_file(held, file)
        assert lost_tensors(folder, model, saved_tensors(model)) == [first, second]
        with pytest.raises(OSError, match="2 tensors, such as "):
            check_saved(folder, model, saved_tensors(model))


def test_a_hollow_copy_has_the_structure_and_no_memory():
    model = tied_by_hand("head")
    hollow = hollow_copy(model)
    assert type(hollow) is type(model) and hollow.lm_head.weight is hollow.model.embed_tokens.weight
    for name, weight in model.named_parameters():
        copy = hollow.get_parameter(name)
        assert copy.shape == weight.shape and copy.dtype == weight.dtype and copy is not weight
        assert copy.untyped_storage().nbytes() <= 8
    assert any(weight.any() for weight in model.parameters())


def test_a_rehearsal_repairs_settings_that_can_be_loaded_but_not_saved(tmp_path):
    model = tiny_llama()
    model.generation_config.temperature = 0.7
    model.config.output_attentions = False
    model.config.num_beams = 4
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path)
    rehearse_save(model, ByT5Tokenizer(extra_ids=0))
    model.save_pretrained(tmp_path)
    settings = load_causal_lm(tmp_path).generation_config
    assert (settings.temperature, settings.num_beams) == (0.7, 4)


def test_a_rehearsal_refuses_what_cannot_be_saved(byte_tokenizer, monkeypatch):
    def broken(folder):
        raise KeyError("a part of the tokenizer")

    monkeypatch.setattr(byte_tokenizer, "save_pretrained", broken)
    with pytest.raises(ValueError, match="could not be saved after the work .*a part of the tokenizer"):
        rehearse_save(tiny_llama(), byte_tokenizer)


def test_the_stored_dtype_is_that_of_most_weights(tmp_path):
    assert stored_dtype("") is None
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama().to(dtype)
        model.model.norm.float()
        model.save_pretrained(tmp_path)
        assert stored_dtype(tmp_path) == dtype


def test_a_cast_is_what_loading_in_that_dtype_gives(tmp_path):
    """Fails if buffers that are not saved are rounded, or if the base of an adapter is."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    wanted = load_causal_lm(tmp_path, dtype="bfloat16")
    assert cast_to(model, torch.bfloat16)
    assert same_weights(weights_of(model), weights_of(wanted))
    assert all(
        torch.equal(one, other) and one.dtype == other.dtype
        for one, other in zip(model.buffers(), wanted.buffers(), strict=True)
    )
    adapter = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    assert cast_to(adapter, torch.bfloat16)
    assert {weight.dtype for name, weight in adapter.named_parameters() if "lora" in name} == {torch.bfloat16}
    assert adapter.get_base_model().dtype == torch.float32


def test_weights_that_do_not_fit_are_left_alone():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    before = weights_of(model)
    assert not cast_to(model, torch.float16)
    assert same_weights(before, weights_of(model))


def test_files_beside_the_model_are_copied_except_code_and_links(tmp_path):
    """
    Fails if a file is lost or replaced, if a link makes a private file a part of the purified model, or if a pointer
    to code, a template that nothing was measured with, or a damaged file comes along.
    """
    suspect, purified, secret = tmp_path / "suspect", tmp_path / "purified", tmp_path / "secret"
    suspect.mkdir(), purified.mkdir()
    secret.write_text("private")
    code = ("modeling_x.py", "chat_template.py", "LICENSE.py")
    for name in ("LICENSE.txt", "chat_template.jinja", "chat_template.json", "rows.jsonl", "tekken.json", *code):
        (suspect / name).write_text(name)
    processor = {"size": 8, "auto_map": {"AutoProcessor": "maker/suspect--p.P"}, "parts": [{"auto_map": {}}]}
    (suspect / "preprocessor_config.json").write_text(json.dumps(processor))
    os.symlink(secret, suspect / "NOTICE")
    (purified / "chat_template.jinja").write_text("new")
    copy_side_files(suspect, purified)
    copied = {path.name: path.read_text() for path in purified.iterdir()}
    assert json.loads(copied.pop("preprocessor_config.json")) == {"size": 8, "parts": [{}]}
    assert copied == {
        "LICENSE.txt": "LICENSE.txt",
        "chat_template.jinja": "new",
    }


def cached_repository(folder, commit, files, blobs="blobs"):
    """Write files into a cache as the Hub's client does. Return the folder of the snapshot."""
    snapshot = folder / "models--me--suspect" / "snapshots" / commit
    blob_folder = snapshot.parents[1] / blobs
    snapshot.mkdir(parents=True), blob_folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (blob_folder / f"{commit}-{name}").write_text(text)
        os.symlink(blob_folder / f"{commit}-{name}", snapshot / name)
    return snapshot


def test_files_are_those_of_the_revision_that_was_loaded(tmp_path):
    """Fails if the files of the main branch or of another cache are copied, or those beside the repository."""
    commits = ["a" * 40, "b" * 40]
    for commit in commits:
        snapshot = cached_repository(tmp_path / "cache", commit, {"NOTICE": commit})
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commits[0])
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    model = tiny_llama()
    for commit in commits:
        model.config._commit_hash, model.name_or_path = commit, "me/suspect"
        found = hub_options("me/suspect", model, {"revision": "main", "dtype": "float32"} | options)
        (tmp_path / commit).mkdir()
        copy_side_files("me/suspect", tmp_path / commit, local_files_only=True, **found)
        assert (tmp_path / commit / "NOTICE").read_text() == commit
    assert hub_options("me/adapter", model, {"revision": "v1"}) == {"revision": "v1"}
    # The snapshot may be passed as a folder, but links to other places of the cache are not followed.
    copy_side_files(snapshot, tmp_path)
    assert (tmp_path / "NOTICE").read_text() == commits[1]
    private = cached_repository(tmp_path / "other", commits[0], {"COPYING": "private"}, "private")
    copy_side_files(private, tmp_path)
    assert not (tmp_path / "COPYING").exists()


@pytest.mark.parametrize("part", ["tokenizer", "generation config"])
def test_the_weights_are_written_whatever_another_file_raises(part, tmp_path, byte_tokenizer, monkeypatch):
    args = crow_args(tmp_path, max_steps=1)
    rows = Dataset.from_list(ragged_rows(4))
    trainer = CrowTrainer(tiny_llama(), args, rows, processing_class=byte_tokenizer)
    trainer.train()

    def broken(*args, **kwargs):
        raise RecursionError("too deep")

    owner = byte_tokenizer if part == "tokenizer" else trainer.model.generation_config
    monkeypatch.setattr(owner, "save_pretrained", broken, raising=False)
    trainer.save_model()
    assert len(trainer.failures) == 1 and "too deep" in trainer.failures[0]
    assert same_weights(weights_of(load_causal_lm(args.output_dir)), weights_of(trainer.model))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 0},
        {"learning_rate": 0.0},
        {"max_steps": 1, "warmup_steps": 1},
        {"per_device_train_batch_size": 64, "dataloader_drop_last": True},
        {"optim": "adamw_bnb_8bit"},
        {"optim": "galore_adamw", "optim_target_modules": "q_proj"},
        {"lr_scheduler_type": "cosine_with_min_lr"},
    ],
)
def test_training_that_cannot_start_or_changes_nothing_is_refused(settings, tmp_path):
    args = crow_args(tmp_path, **({"max_steps": 2} | settings))
    trainer = CrowTrainer(tiny_llama(), args, Dataset.from_list(ragged_rows(4)))
    with pytest.raises(ValueError, match=r"would not change|cannot be made"):
        trainer.check_optimizer()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_a_change_of_one_value_is_seen(dtype):
    """Fails if the check depends on the order of the values alone, or not at all."""
    layer = nn.Module()
    for name, shape in {"matrix": (5, 3), "vector": (7,), "number": (), "nothing": (0, 4)}.items():
        setattr(layer, name, nn.Parameter(torch.randn(shape).to(dtype)))
    before = _fingerprint(layer)
    assert _fingerprint(layer) == before
    for parameter in layer.parameters():
        values = parameter.data.view(-1)
        for place in range(len(values)):
            value = values[place].clone()
            values[place] = value.float() + 1
            assert _fingerprint(layer) != before
            values[place] = value
    layer.matrix.data = layer.matrix.data.flip(0)
    assert _fingerprint(layer) != before


def test_a_training_that_changed_nothing_is_an_error(tmp_path):
    """Fails if steps of a learning rate of 0 count as a purification, because they were steps."""
    args = crow_args(tmp_path, max_steps=2, learning_rate=0.0)
    with pytest.raises(ValueError, match="2 steps changed no weight"):
        CrowTrainer(tiny_llama(), args, Dataset.from_list(ragged_rows(4))).train()
