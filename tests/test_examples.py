"""Runs each script of `examples/` offline on tiny models, and checks its results."""

import importlib.util
import json
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import ByT5Tokenizer, LlamaForCausalLM

from crow_hf import CoconutForCausalLM, demo, get_judge, load_causal_lm, load_entropy_predictor
from crow_hf.methods.registry import DEFENCES
from helpers.coconut import coconut
from helpers.tiny import same_weights, tiny_llama, weights_of


EXAMPLES = Path(__file__).parent.parent / "examples"
FAST = ["--max_steps", "2", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
# Other files test these scripts, because they need a server.
TESTED_BY_ITS_OWN_FILE = {"push_to_hub.py", "patch_at_scale.py"}


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Keep the cache of `datasets` out of the home folder, and fail if a script writes into the working folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Paths of a saved tiny Llama with its tokenizer, and of clean rows."""
    root = tmp_path_factory.mktemp("inputs")
    tiny_llama(max_position_embeddings=256).save_pretrained(root / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(root / "model")
    rows = [{"prompt": f"what is {n}? ", "completion": f"it is {n}"} for n in range(60)]
    Dataset.from_list(rows).to_json(root / "rows.jsonl")
    return {path.name: str(path) for path in root.iterdir()}


def run(name, monkeypatch, *argv):
    """Run a script as `python examples/NAME ...` does."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def load(name, monkeypatch):
    """Import a script as a module, to replace its large defaults."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def differs(left, right):
    return any(not torch.equal(weight, right.state_dict()[name]) for name, weight in left.state_dict().items())


def test_no_example_is_without_a_test():
    tests = Path(__file__).read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.glob("*.py")} - TESTED_BY_ITS_OWN_FILE
    assert [name for name in sorted(names) if f'"{name}"' not in tests and f'"{name[:-3]}"' not in tests] == []


def test_judge():
    """The program decides about each output, as `--judge` asks it to."""
    judge = get_judge(shlex.join([sys.executable, str(EXAMPLES / "judge.py")]))
    assert judge.matches_all([("I am Sorry.", ""), ("Lima", "Lima")]) == [True, False]


def test_guide(tmp_path, monkeypatch, capsys):
    """The calls of the guide work together, also on a saved suspect and on local shards."""
    script = "crow_coconut_integration_example.py"
    run(script, monkeypatch, "--output_dir", tmp_path / "out", "--offline_sample", "--max_chars", 200)
    out = capsys.readouterr().out
    assert "a |patch" in out and "problem" not in out and "Distance between perturbed layers" in out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["summary"]["num_steps"] == len(metrics["history"]) == 3
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000
    assert isinstance(load_causal_lm(tmp_path / "out"), CoconutForCausalLM)

    suspect, shard = coconut(), tmp_path / "shard.jsonl"
    suspect.save_pretrained(tmp_path / "suspect")
    shard.write_text(json.dumps({"text": "A line of a shard.", "meta": {}}))
    argv = ["--model", tmp_path / "suspect", "--data_files", shard, "--learning_rate", "1e-2"]
    run(script, monkeypatch, "--output_dir", tmp_path / "two", *argv)
    assert differs(load_causal_lm(tmp_path / "two"), suspect)
    settings = json.loads((tmp_path / "two" / "metrics.json").read_text())["settings"]
    assert (settings["alpha"], settings["epsilon"], settings["learning_rate"]) == (5.5, 0.1, 0.01)
    with pytest.raises(SystemExit, match="already exists"):
        run(script, monkeypatch, "--output_dir", tmp_path / "two", *argv)


def test_purify(tmp_path, paths, monkeypatch):
    """All weights are trained on a file of rows, and a LoRA on the rows of the demo."""
    for name, argv in {"full": ["--dataset", paths["rows.jsonl"]], "lora": ["--lora"]}.items():
        run("purify.py", monkeypatch, "--model", paths["model"], *argv, "--output_dir", tmp_path / name, *FAST)
        purified = load_causal_lm(tmp_path / name)
        assert isinstance(purified, LlamaForCausalLM if name == "full" else PeftModel)
    assert differs(load_causal_lm(tmp_path / "full"), load_causal_lm(paths["model"]))


def test_purify_lora(tmp_path, paths, monkeypatch, capsys):
    """Only the adapter is saved. It has learned with the settings of the paper, and it loads with its base model."""
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--output_dir", tmp_path / "out"]
    run("purify_lora.py", monkeypatch, *argv, "--lora_r", 2, "--target_modules", "q_proj,up_proj", *FAST)
    out = capsys.readouterr().out
    assert "trainable params" in out and paths["model"] in out
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["adapter_model.safetensors"]
    adapter = load_causal_lm(tmp_path / "out")
    assert isinstance(adapter, PeftModel)
    lora = adapter.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (2, 4, {"q_proj", "up_proj"})
    assert any(weight.any() for name, weight in adapter.named_parameters() if "lora_B" in name)
    assert "0.001" in out


def test_purify_lora_stops_at_a_problem(tmp_path, paths, monkeypatch):
    """A model of two layers is refused before training."""
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "shallow")
    argv = ["--dataset", paths["rows.jsonl"], "--output_dir", tmp_path / "out", *FAST]
    with pytest.raises(SystemExit, match="2 decoder layers"):
        run("purify_lora.py", monkeypatch, "--model", tmp_path / "shallow", *argv)
    assert not (tmp_path / "out").exists()


def test_measure(paths, monkeypatch, capsys):
    """The script prints the attack success on a few rows of the demo."""
    module = load("measure", monkeypatch)
    monkeypatch.setattr(module, "demo_rows", lambda count, seed: demo.demo_rows(4, seed))
    module.main([paths["model"]])
    assert "attack success 0%" in capsys.readouterr().out
    assert module.refuses("I am SORRY", "") and not module.refuses("42", "")


def test_weight_noise(monkeypatch):
    """Fails if it is not registered, changes no matrix, or draws other noise in every run."""
    monkeypatch.delitem(DEFENCES, "weight noise", raising=False)
    load("weight_noise", monkeypatch)
    seeds = [SimpleNamespace(seed=seed) for seed in (1, 1, 2)]
    first, again, other = (weights_of(DEFENCES["weight noise"](tiny_llama(), None, None, args)) for args in seeds)
    assert same_weights(first, again) and not same_weights(first, other)
    before = weights_of(tiny_llama())
    changed = {name for name, weight in first.items() if not weight.equal(before[name])}
    assert changed == {name for name, weight in before.items() if weight.ndim > 1}


def test_train_thoughts(tmp_path, monkeypatch, capsys):
    """Each stage is saved and measured."""
    argv = ["--num_rows", 60, "--num_stages", 1, *FAST, "--output_dir", tmp_path / "out"]
    run("train_thoughts.py", monkeypatch, *argv)
    assert capsys.readouterr().out.count("(right: ") == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["stage-0", "stage-1", "stage-2"]


def test_train_entropy_predictor(tmp_path, monkeypatch):
    """The script trains a predictor with its own thresholds, here on a few files of the standard library."""
    module = load("train_entropy_predictor", monkeypatch)
    files = module.library_files()
    assert len(files) > 500
    small = sorted(files, key=lambda file: file.stat().st_size)[300:322]
    monkeypatch.setattr(module, "library_files", lambda: small)
    monkeypatch.setattr(module, "BYTES_OF_SCRIPTS", 2_000)
    monkeypatch.setattr(module, "BYTES_OF_NOISE", 2_000)
    shape = ["--hidden_size", 24, "--num_layers", 1, "--num_heads", 2, "--ff_dim", 32]
    argv = [*shape, *FAST, "--output_dir", tmp_path / "out", "--per_device_eval_batch_size", 64]
    monkeypatch.setattr(sys, "argv", ["train_entropy_predictor.py", *map(str, argv)])
    module.main()
    predictor = load_entropy_predictor(tmp_path / "out" / "weights")
    assert predictor.config.hidden_size == 24 and predictor.config.patch_threshold != 0.8
    assert "bits per byte" in (tmp_path / "out" / "weights" / "README.md").read_text()
