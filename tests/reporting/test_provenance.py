"""Tests of the hashes of what a purification reads."""

import hashlib

from crow_hf import Target, get_judge
from crow_hf.reporting.provenance import checksums_of_judge, checksums_of_model
from helpers.tiny import tiny_llama


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
