"""Tests of `SHA256SUMS`, with `sha256sum` as the other reader."""

import hashlib
import shutil
import subprocess

import pytest

from crow_hf import Target, get_judge
from crow_hf.reporting.checksums import (
    CHECKSUMS,
    Changes,
    checksums_of_judge,
    checksums_of_model,
    compare_checksums,
    write_checksums,
)
from helpers.tiny import tiny_llama


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "README.md").write_text("a card\n")
    (tmp_path / "a name with spaces").write_text("")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    (tmp_path / ".lock").write_text("")
    write_checksums(tmp_path)
    return tmp_path


LISTED = ["README.md", "a name with spaces", "additional_chat_templates/tool.jinja", "model.safetensors"]


def test_hashes_are_those_of_sha256sum(folder):
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    done = subprocess.run(["sha256sum", "--check", CHECKSUMS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK\n") == len(LISTED)


def test_every_change_is_found(folder):
    assert compare_checksums(folder) == Changes(LISTED, [], [], []) and not compare_checksums(folder)
    # The size stays the same.
    (folder / "model.safetensors").write_bytes(bytes(999) + b"\1")
    (folder / "README.md").unlink()
    (folder / "modeling_own.py").write_text("")
    changes = compare_checksums(folder)
    assert changes == Changes(LISTED[1:3], ["model.safetensors"], ["README.md"], ["modeling_own.py"]) and changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which a purification writes last: wait until it is finished"),
        ("no hashes\n", "is damaged: each line needs a hash"),
        ("\ufffd".encode("utf-16"), "is damaged"),
        (f"{'0' * 64}  ../secret\n", "names '../secret', outside of the folder: do not trust it"),
    ],
)
def test_what_is_no_list_of_hashes(folder, content, message):
    file = folder / CHECKSUMS
    file.unlink()
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        compare_checksums(folder)


def test_the_files_that_a_model_is_loaded_from(tmp_path, byte_tokenizer):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_text("not read")
    found = checksums_of_model(str(tmp_path))
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"} <= found.keys()
    assert "optimizer.pt" not in found
    for name, digest in found.items():
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert checksums_of_model("no/such-model") is None and checksums_of_model("") is None
    assert checksums_of_judge(get_judge(f"model:{tmp_path}", "Is it bad?")) == found
    assert checksums_of_judge(Target("x", ("x",))) is checksums_of_judge(None) is None
