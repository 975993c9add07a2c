"""Tests of `SHA256SUMS`, with `sha256sum` as the other reader."""

import shutil
import subprocess

import pytest

from crow_hf.reporting.checksums import (
    CHECKSUMS,
    Changes,
    compare_checksums,
    write_checksums,
)


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
