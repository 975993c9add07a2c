"""Tests of loading a suspect: only safetensors are read, and none of its code is run."""

import copy
import json
import pickle
import time

import pytest
import torch
from huggingface_hub import constants
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from crow_hf import load_causal_lm
from crow_hf.training.loading import load_tokenizer, merged
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
    [
        ({}, {"foo": 1}),
        ({}, {"dtype": "float99"}),
        ({"rope_parameters": {"rope_type": "spiral"}}, {}),
        ({"hidden_act": "swoosh"}, {}),
        ({"num_attention_heads": 0}, {}),
        ({"model_type": "qwen2_vl"}, {}),
        ({"model_type": "unheard_of"}, {}),
    ],
    ids=["unknown", "dtype", "rope", "activation", "no heads", "vision", "type"],
)
def test_what_the_model_does_not_take_is_one_sentence(config, kwargs, model_folder):
    change(model_folder, **config)
    with pytest.raises(ValueError, match=r"cannot be loaded .*\. Check `model_init_kwargs`") as error:
        load_causal_lm(model_folder, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 3}, r"have 9 tensors for which its config has no place, such as model\.layers\.3\."),
        ({"intermediate_size": 40}, r"have 12 tensors of another shape .* such as model\.layers\.0\.mlp\.down"),
    ],
)
def test_weights_that_a_config_does_not_take_are_named(config, said, model_folder):
    """Fails if the last layer of the suspect is silently dropped, or if a layer is initialized at random."""
    change(model_folder, **config)
    with pytest.raises(ValueError, match=said) as error:
        load_causal_lm(model_folder)
    assert "\n" not in str(error.value)


# Adapters


def adapter_of(folder, base, config, seed=0):
    """Save a random adapter of the base model in `folder` and return its logits."""
    adapter = get_peft_model(base, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
        adapter.save_pretrained(folder)
        return adapter.eval()(IDS).logits


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "The adapter .*adapter names no base model"),
        ("", "The adapter .*adapter names no base model"),
        ("/home/someone/llama", "base model that .* adapter .*adapter names .*someone/llama is neither"),
    ],
)
def test_an_adapter_without_its_base_is_refused(base, said, adapter_folder):
    """Fails with an error about the base alone, which the user did not name, or if this folder is taken for it."""
    path = adapter_folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(ValueError, match=said):
            load(adapter_folder)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 264]),
        LoraConfig(target_modules=["q_proj"]),
    ],
    ids=["copies", "LoRA", "tokens", "resized only"],
)
@pytest.mark.parametrize("tokens", [250, 270])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_with_other_tokens_than_their_base(tied, tokens, config, tmp_path):
    """The base model gets as many embeddings as it had when the adapter was trained, and computes the same."""
    if tokens < 264 and config.trainable_token_indices:
        pytest.skip("The adapter trains a token that there is not.")
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(tokens)
    wanted = adapter_of(tmp_path / "adapter", base, copy.deepcopy(config))
    model = load_causal_lm(tmp_path / "adapter").eval()
    torch.testing.assert_close(model(IDS).logits, wanted)
    torch.testing.assert_close(merged(model)(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_prompt_tuning_is_refused(tmp_path, model_folder):
    base = LlamaForCausalLM.from_pretrained(model_folder)
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(ValueError, match="PROMPT_TUNING, which puts vectors before the prompt"):
        load_causal_lm(tmp_path / "a")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "lm_head"]),
        LoraConfig(target_modules=["q_proj", "embed_tokens"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        LoraConfig(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[]),
        LoHaConfig(target_modules=["q_proj", "lm_head"]),
    ],
    ids=["LoRA on head", "LoRA on embeddings", "head", "embeddings", "tied", "IA3", "LoHa"],
)
def test_merging_into_tied_embeddings_computes_the_same(config, tmp_path):
    """Fails if what an adapter adds to one of two tied layers is added to both. Also after saving."""
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    wanted = adapter_of(tmp_path / "adapter", LlamaForCausalLM.from_pretrained(tmp_path / "base"), config)
    whole = merged(load_causal_lm(tmp_path / "adapter").eval())
    torch.testing.assert_close(whole(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    whole.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(load_causal_lm(tmp_path / "whole")(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_tied_embeddings_stay_tied_if_the_adapter_leaves_them_alone(tmp_path):
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), LoraConfig(target_modules=["q_proj"]))
    whole = merged(model)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight and whole.config.tie_word_embeddings


def test_a_merge_that_changes_the_logits_is_refused(monkeypatch):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **kwargs: tiny_llama(), raising=False)
    with pytest.raises(ValueError, match="cannot be merged, because the merged model computes other logits"):
        merged(model)


def test_a_hub_that_does_not_answer_costs_no_retries(monkeypatch):
    """Fails if each file of a mistyped name is asked for many times, which takes a minute."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(ValueError, match="neither a local folder nor a model"):
            load("someone/mistyped")
    assert time.monotonic() - begin < 3


def test_the_tokenizers_own_trouble_is_told(model_folder):
    """The error names the damaged config, so that nobody looks for a missing tokenizer."""
    (model_folder / "config.json").write_text("{nope")
    with pytest.raises(ValueError, match="no readable tokenizer .*config.json"):
        load_tokenizer(model_folder)


@pytest.mark.parametrize("base", [5, [], {"a": 1}, "itself"])
@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_base_models_that_are_no_names_or_the_adapter_itself(base, load, tmp_path):
    """Fails if an adapter that names itself is followed without end."""
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    base = str(tmp_path) if base == "itself" else base
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match="names (no base model|another adapter)"):
        load(tmp_path)


def test_a_tokenizer_that_fails_on_text_is_refused(model_folder, byte_tokenizer):
    """Fails if a setting that is only read while a text is encoded fails in the middle of the work."""
    byte_tokenizer.save_pretrained(model_folder)
    config = model_folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": "512"}))
    with pytest.raises(ValueError, match="no readable tokenizer .*TypeError"):
        load_tokenizer(model_folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "README.md", "templates/tool.jinja", "templates"])
@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_links_to_files_elsewhere_are_refused(load, name, model_folder, tmp_path, byte_tokenizer):
    """Fails if a private file would be saved, and perhaps pushed, with the purified model."""
    byte_tokenizer.save_pretrained(model_folder)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    link = model_folder / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "private" / ("" if name == "templates" else "key"))
    with pytest.raises(ValueError, match="is a link to a place outside"):
        load(model_folder)


def test_links_within_a_repository_are_followed(model_folder, tmp_path, byte_tokenizer):
    """Snapshots in the cache of the Hub are links to the blobs of their repository, and a folder may be a link."""
    byte_tokenizer.save_pretrained(model_folder)
    snapshot, blobs = tmp_path / "models--owner--name" / "snapshots" / "commit", tmp_path / "models--owner--name/blobs"
    snapshot.mkdir(parents=True)
    model_folder.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(snapshot)
    assert len(load_tokenizer(tmp_path / "link")) == len(byte_tokenizer)
    assert same_weights(weights_of(load_causal_lm(tmp_path / "link")), weights_of(tiny_llama()))
