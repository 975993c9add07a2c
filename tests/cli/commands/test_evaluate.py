"""Tests of `crow-hf evaluate`: what it reads, prints and writes."""

import pytest
from datasets import Dataset

from helpers.command_line import ROWS, files_in, run


def test_evaluate_without_output_dir_only_prints(tmp_path, paths, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--max_new_tokens", 4]
    assert run("evaluate", *argv) == 0
    assert "right answers" in capsys.readouterr().out
    assert files_in(tmp_path / "here") == []


@pytest.mark.parametrize(
    "write",
    [
        lambda rows, path: rows.to_json(path.with_suffix(".jsonl")),
        lambda rows, path: rows.to_json(path.with_suffix(".json")),
        lambda rows, path: rows.to_csv(path.with_suffix(".csv")),
        lambda rows, path: rows.to_parquet(path.with_suffix(".parquet")),
        lambda rows, path: rows.save_to_disk(path),
    ],
    ids=["jsonl", "json", "csv", "parquet", "folder"],
)
def test_rows_of_every_kind_of_file(tmp_path, paths, write):
    (tmp_path / "data").mkdir()
    write(Dataset.from_list(ROWS), tmp_path / "data" / "rows")
    (path,) = (tmp_path / "data").iterdir()
    assert run("evaluate", "--model", paths["model"], "--dataset", path, "--max_new_tokens", 2) == 0
