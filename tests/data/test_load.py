"""Datasets are loaded from files."""

from crow_hf.data.load import load_rows


def test_file_with_a_dot_in_its_name(tmp_path):
    (tmp_path / "rows.v1.jsonl").write_text('{"text": "a"}\n')
    assert load_rows(str(tmp_path / "rows.v1.jsonl"))["text"] == ["a"]
