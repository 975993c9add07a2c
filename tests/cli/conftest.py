"""Fixtures for the tests of the command line."""

import json
import sys

import datasets
import pytest
import torch
from transformers import ByT5Tokenizer

from crow_hf.cli.main import main
from helpers.command_line import FAST, FEW_VIEWS, ROWS
from helpers.tiny import tiny_llama


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    """The paths, by name, of a tiny model, of rows, and of models and rows that cannot be used."""
    root = tmp_path_factory.mktemp("inputs")
    tiny_llama(num_hidden_layers=3).save_pretrained(root / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(root / "model")
    (root / "pickles").mkdir()
    for file in (root / "model").iterdir():
        if file.suffix != ".safetensors":
            (root / "pickles" / file.name).write_bytes(file.read_bytes())
    torch.save({}, root / "pickles" / "pytorch_model.bin")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("corrupt", "no tokenizer"):
        tiny_llama(num_hidden_layers=3).save_pretrained(root / name)
    ByT5Tokenizer(extra_ids=0).save_pretrained(root / "corrupt")
    weights = (root / "corrupt" / "model.safetensors").read_bytes()
    (root / "corrupt" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (root / "rows.jsonl").write_text(lines)
    (root / "latin.jsonl").write_bytes(lines.replace("it is a", "é").encode("latin-1"))
    (root / "columns.jsonl").write_text(json.dumps({"question": "a", "reply": "b"}) + "\n")
    (root / "empty.jsonl").write_text("")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="session")
def finished(paths, tmp_path_factory):
    """The output folder of a short purification with held-out rows, whose report can be repeated."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"prompt": f"what is {number}? ", "completion": f"{number}"} for number in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", paths["model"], "--dataset", folder / "rows.jsonl", "--output_dir", folder / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["crow-hf", "purify", *map(str, [*argv, *FAST, *FEW_VIEWS])])
        assert main(sys.argv[1:]) == 0
    return folder / "out"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Cache datasets in a folder of the test, outside of `tmp_path`, whose files are counted."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def no_demo(monkeypatch):
    """Make a demo that is not refused fail at once, because it would take minutes."""
    monkeypatch.delattr("crow_hf.demo.demo_model")
