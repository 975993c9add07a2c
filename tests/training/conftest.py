"""Fixtures for the tests of checkpoints, failed writes and Ctrl-C."""

import json

import datasets
import pytest
import torch
from transformers import ByT5Tokenizer

from helpers.checkpoints import KINDS, ROWS, build, outcome
from helpers.tiny import tiny_llama


@pytest.fixture(scope="module")
def one_thread():
    """Run on one thread, like the processes that are killed. The number of threads changes the last bits of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """The kind, the folder and the outcome of a run that was never stopped, with a checkpoint at each step."""
    folder = tmp_path_factory.mktemp(request.param) / "whole"
    trainer = build(request.param, folder)
    trainer.train()
    return request.param, folder, outcome(trainer)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A folder with a suspect and a file of clean rows."""
    root = tmp_path_factory.mktemp("inputs")
    tiny_llama(num_hidden_layers=3, hidden_size=64, vocab_size=259).save_pretrained(root / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(root / "model")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Cache datasets in a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
