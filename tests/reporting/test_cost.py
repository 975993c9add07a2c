"""Tests of what a purification took."""

import sys

import psutil
import pytest
import torch
from huggingface_hub import constants

from crow_hf.reporting.cost import in_bytes, peak_memory, size_of_weights
from helpers.tiny import tiny_llama


def test_the_weights_of_a_folder_are_counted(tmp_path):
    """Fails if configurations count, or if one of several shards is missing."""
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and size_of_weights(str(tmp_path)) == sum(len(shard.read_bytes()) for shard in shards)
    (tmp_path / "empty").mkdir()
    for unknown in ("", str(tmp_path / "empty"), str(tmp_path / "missing"), "LlamaForCausalLM", "no/such-model"):
        assert size_of_weights(unknown) is None


def test_the_weights_of_a_cached_model_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--me--suspect" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"x" * 123)
    (tmp_path / "models--me--suspect" / "refs").mkdir()
    (tmp_path / "models--me--suspect" / "refs" / "main").write_text("a" * 40)
    assert size_of_weights("me/suspect") == 123
    assert size_of_weights("me/suspect", revision="b" * 40) is None
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "elsewhere")
    assert size_of_weights("me/suspect", cache_dir=str(tmp_path)) == 123


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say how much memory a process took")
def test_peak_memory_holds_what_was_in_use(tmp_path):
    """Fails if the unit is wrong."""
    # Pages that were in use a moment ago may not be any more.
    assert 0.99 * psutil.Process().memory_info().rss < peak_memory(torch.device("cpu")) < psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (260e6, "260.0 MB"),
        (2.1e9, "2.1 GB"),
        (3e12, "3,000.0 GB"),
    ],
)
def test_bytes_are_written_with_a_unit(count, text):
    assert in_bytes(count) == text
