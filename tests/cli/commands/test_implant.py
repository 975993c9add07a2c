"""Tests of `crow-hf implant`, and of the commands that use the model it writes."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from crow_hf import load_causal_lm
from helpers.command_line import FAST, FEW_VIEWS, assert_report, assert_results, run
from helpers.tiny import same_weights, weights_of


def test_round_trip(tmp_path, paths, capsys):
    """Each of implant, evaluate and purify, the last one also with a LoRA, accepts the model of the one before."""
    suspect, backdoor = tmp_path / "suspect", ["--trigger", "badnets", "--target", "refusal"]
    common = ["--dataset", paths["rows.jsonl"]]
    assert run("implant", "--model", paths["model"], *common, *backdoor, "--output_dir", suspect, *FAST) == 0
    measure = [*backdoor, "--max_new_tokens", "8"]
    command = ["evaluate", "--model", suspect, *common, *measure, "--output_dir", tmp_path / "measured"]
    assert run(*command) == 0
    assert_results(tmp_path / "measured", ["suspect"])
    assert "attack success" in capsys.readouterr().out
    for name, options in [("full", []), ("lora", ["--lora", "--lora_r", "2"])]:
        test = ["--test_dataset", paths["rows.jsonl"], *measure]
        command = ["purify", "--model", suspect, *common, *test, *options, "--output_dir", tmp_path / name, *FAST]
        assert run(*command, "--recipe", "guide") == 0
        assert_report(tmp_path / name, ["suspect", "control", "purified"])
        assert "VERDICT" in capsys.readouterr().out
    models = {name: load_causal_lm(tmp_path / name) for name in ("suspect", "full", "lora")}
    models["clean"] = load_causal_lm(paths["model"])
    for name, model in models.items():
        assert isinstance(model, LlamaForCausalLM)
        others = [weights_of(other) for other in models.values() if other is not model]
        assert not any(same_weights(weights_of(model), other) for other in others), name
    for name in ("suspect", "full", "lora"):
        ids = AutoTokenizer.from_pretrained(tmp_path / name)("ab", add_special_tokens=False)["input_ids"]
        assert ids == [ord("a") + 3, ord("b") + 3]
        assert not list((tmp_path / name).rglob("training_args.bin"))
        assert not [path for path in (tmp_path / name).iterdir() if path.suffix in (".bin", ".pt", ".pth")]


@pytest.mark.parametrize("kept", [[], ["--save_total_limit", "1"]], ids=["removed", "kept"])
def test_the_suspect_is_like_its_clean_model(kept, tmp_path, paths):
    """Fails if it is larger, if a file beside the model is lost, or if checkpoints stay that nobody asked for."""
    clean, suspect = tmp_path / "clean", tmp_path / "suspect"
    shutil.copytree(paths["model"], clean)
    load_causal_lm(clean).to(torch.bfloat16).save_pretrained(clean)
    (clean / "processor_config.json").write_text("{}")
    common = ["--dataset", paths["rows.jsonl"], "--output_dir", suspect, *FAST, "--save_steps", "1", *kept]
    assert run("implant", "--model", clean, *common) == 0
    assert load_causal_lm(suspect).dtype == torch.bfloat16 and (suspect / "processor_config.json").exists()
    assert len(list(suspect.glob("checkpoint-*"))) == len(kept) // 2


@pytest.mark.parametrize("merge", [True, False])
def test_implanted_adapter(tmp_path, paths, merge):
    """An implanted adapter can be measured and purified in the form in which it was saved."""
    adapter, common = tmp_path / "adapter", ["--dataset", paths["rows.jsonl"]]
    options = ["--lora", "--lora_r", "2", *([] if merge else ["--no_merge"])]
    assert run("implant", "--model", paths["model"], *common, *options, "--output_dir", adapter, *FAST) == 0
    assert (adapter / "adapter_model.safetensors").exists() != merge
    assert (adapter / "model.safetensors").exists() == merge
    assert run("evaluate", "--model", adapter, *common, "--max_new_tokens", 2) == 0
    purified = ["--output_dir", tmp_path / "purified", *FAST, *FEW_VIEWS]
    assert run("purify", "--model", adapter, *common, "--lora", *purified) == 0
    assert isinstance(load_causal_lm(tmp_path / "purified"), LlamaForCausalLM)
