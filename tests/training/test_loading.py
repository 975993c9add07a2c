"""Tests of loading a suspect: only safetensors are read, and none of its code is run."""

import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from crow_hf import load_causal_lm
from crow_hf.training.loading import load_tokenizer
from helpers.tiny import same_weights, tiny_llama, weights_of


IDS = torch.arange(3, 11)[None]


@pytest.fixture
def model_folder(tmp_path):
    """A tiny Llama saved as safetensors."""
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, weights=None, **config):
    """Replace the weights or fields of the config of a saved model."""
    if weights is not None:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.fixture
def adapter_folder(tmp_path, model_folder):
    """A LoRA that changes the logits of its base model."""
    base = LlamaForCausalLM.from_pretrained(model_folder)
    adapter = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickle_into(folder, name, trap):
    """Replace the safetensors of `folder` by a pickle that writes the file `trap` when it is read."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with open(folder / name, "wb") as file:
        pickle.dump(Bomb(trap), file)


def test_bomb_goes_off(tmp_path):
    """The pickle works. The tests below would otherwise prove nothing."""
    pickle_into(tmp_path, "weights.bin", tmp_path / "trap")
    pickle.loads((tmp_path / "weights.bin").read_bytes()).close()
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("as_text", [False, True])
def test_model_folder(model_folder, as_text):
    model = load_causal_lm(str(model_folder) if as_text else model_folder)
    assert isinstance(model, LlamaForCausalLM)
    assert same_weights(weights_of(model), weights_of(tiny_llama()))


def test_sharded_model_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert same_weights(weights_of(load_causal_lm(tmp_path / "model")), weights_of(tiny_llama()))


@pytest.mark.parametrize("folder", ["model_folder", "adapter_folder"])
def test_keyword_arguments_reach_the_model(request, folder):
    model = load_causal_lm(request.getfixturevalue(folder), dtype="bfloat16")
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("is_trainable", [False, True])
def test_adapter_folder(adapter_folder, model_folder, is_trainable):
    """
    Fails if a new adapter is loaded instead of the saved one, if the base is trainable, or if the adapter is not.
    """
    model = load_causal_lm(adapter_folder, is_trainable=is_trainable)
    assert isinstance(model, PeftModel)
    expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_folder), adapter_folder)
    with torch.no_grad():
        logits, base_logits = model.eval()(IDS).logits, load_causal_lm(model_folder)(IDS).logits
        torch.testing.assert_close(logits, expected.eval()(IDS).logits)
    assert not torch.allclose(logits, base_logits, atol=1e-2)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == ({name for name in weights_of(model) if "lora_" in name} if is_trainable else set())
    assert model.name_or_path == str(adapter_folder), "the report would be about the base"


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth", "last.ckpt"],
)
def test_pickled_model_is_refused(tmp_path, model_folder, name):
    pickle_into(model_folder, name, tmp_path / "trap")
    with pytest.raises(ValueError, match="safetensors"):
        load_causal_lm(model_folder)
    assert not (tmp_path / "trap").exists()


def test_pickled_adapter_is_refused(tmp_path, adapter_folder):
    pickle_into(adapter_folder, "adapter_model.bin", tmp_path / "trap")
    with pytest.raises(ValueError, match="safetensors"):
        load_causal_lm(adapter_folder)
    assert not (tmp_path / "trap").exists()


def test_adapter_on_a_pickled_base_is_refused(tmp_path, adapter_folder, model_folder):
    """The adapter itself is in safetensors, but the base model that it names is a pickle."""
    pickle_into(model_folder, "pytorch_model.bin", tmp_path / "trap")
    with pytest.raises(ValueError, match="safetensors"):
        load_causal_lm(adapter_folder)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("folder", ["model_folder", "adapter_folder"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"])
def test_pickles_beside_safetensors_stay_unread(request, tmp_path, folder, name):
    path = request.getfixturevalue(folder)
    with open(path / name, "wb") as file:
        pickle.dump(Bomb(tmp_path / "trap"), file)
    load_causal_lm(path)
    assert not (tmp_path / "trap").exists()


def test_code_of_the_model_stays_unread(tmp_path, model_folder):
    """`auto_map` in the config names Python files, which must not be run."""
    config = json.loads((model_folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (model_folder / "config.json").write_text(json.dumps(config))
    (model_folder / "evil.py").write_text(f"open({str(tmp_path / 'trap')!r}, 'w').close()\n")
    assert isinstance(load_causal_lm(model_folder), LlamaForCausalLM)
    assert not (tmp_path / "trap").exists()


def test_model_that_needs_its_code_is_refused(tmp_path, model_folder):
    """Checks the error. The one of transformers advises to run the code."""
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (model_folder / "config.json").write_text(json.dumps(config))
    (model_folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    (model_folder / "evil.py").write_text(f"open({str(tmp_path / 'trap')!r}, 'w').close()\n")
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(ValueError, match="which is never run. Read the code") as error:
            load(model_folder)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    "files", [[], ["README.md"], ["training_args.bin"], ["config.json"], ["config.json", "training_args.bin"]]
)
def test_folder_without_weights_is_refused(tmp_path, model_folder, files):
    """`training_args.bin` does not count as weights, so the error does not mention pickles."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        source = model_folder / name
        (folder / name).write_bytes(source.read_bytes() if source.exists() else b"x")
    with pytest.raises(ValueError, match="folder") as error:
        load_causal_lm(folder)
    assert "pickle" not in str(error.value)


def test_decoy_beside_a_pickled_adapter(adapter_folder, tmp_path):
    """PEFT reads the pickle if adapter_model.safetensors is missing, no matter what other safetensors there are."""
    decoy = (adapter_folder / "adapter_model.safetensors").read_bytes()
    pickle_into(adapter_folder, "adapter_model.bin", tmp_path / "trap")
    (adapter_folder / "decoy.safetensors").write_bytes(decoy)
    with pytest.raises(ValueError, match="pickled weights"):
        load_causal_lm(adapter_folder)
    assert not (tmp_path / "trap").exists()


def test_tokenizer_of_an_adapter_is_that_of_its_base(adapter_folder, model_folder, byte_tokenizer):
    byte_tokenizer.save_pretrained(model_folder)
    assert load_tokenizer(adapter_folder)("ab")["input_ids"] == byte_tokenizer("ab")["input_ids"]


def test_training_is_in_float32(model_folder):
    LlamaForCausalLM.from_pretrained(model_folder, dtype="bfloat16").save_pretrained(model_folder)
    assert load_causal_lm(model_folder).dtype == torch.bfloat16
    assert load_causal_lm(model_folder, is_trainable=True).dtype == torch.float32
    assert load_causal_lm(model_folder, is_trainable=True, dtype="bfloat16").dtype == torch.bfloat16


def test_a_repository_is_looked_for_where_its_files_are(tmp_path):
    """A repository that exists only in the given cache is found there."""
    repository = tmp_path / "models--me--model"
    tiny_llama().save_pretrained(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    with pytest.raises(ValueError, match="neither a local folder nor a model that can be read"):
        load_causal_lm("me/model", local_files_only=True)
    assert load_causal_lm("me/model", cache_dir=tmp_path, local_files_only=True).config.model_type == "llama"


def test_missing_weights_are_named(model_folder):
    """Fails if a layer that was not downloaded is silently initialized at random."""
    weights = load_file(model_folder / "model.safetensors")
    change(model_folder, {name: value for name, value in weights.items() if ".layers.1.mlp." not in name})
    with pytest.raises(
        ValueError, match=r"lack 3 tensors that its config requires, such as model\.layers\.1\.mlp"
    ) as error:
        load_causal_lm(model_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "kwargs"),
    [({"intermediate_size": 40}, {}), ({}, {"foo": 1}), ({}, {"dtype": "float99"})],
    ids=["sizes", "unknown", "dtype"],
)
def test_what_the_model_does_not_take_is_one_sentence(config, kwargs, model_folder):
    change(model_folder, **config)
    with pytest.raises(ValueError, match=r"cannot be loaded .*\. Check `model_init_kwargs`") as error:
        load_causal_lm(model_folder, **kwargs)
    assert "\n" not in str(error.value)


def test_the_tokenizers_own_trouble_is_told(model_folder):
    """The error names the damaged config, so that nobody looks for a missing tokenizer."""
    (model_folder / "config.json").write_text("{nope")
    with pytest.raises(ValueError, match="no readable tokenizer .*config.json"):
        load_tokenizer(model_folder)
