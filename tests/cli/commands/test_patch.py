"""Tests of the command `crow-hf patch`, which shows patches or writes a patched dataset."""

import pytest
from datasets import Dataset, load_from_disk

from crow_hf import ByteEntropyPredictor, EntropyPatcher, load_entropy_predictor
from helpers.command_line import assert_one_sentence, files_in, run
from helpers.documents import Page


def test_command_shows_a_text(capsys):
    assert run("patch", "--text", "hello there") == 0
    out = capsys.readouterr().out
    assert out.replace("│", "").replace("\N{NO-BREAK SPACE}", " ").startswith("hello there")
    assert "11 bytes in" in out
    assert "0.8828 of the largest (7.06 bits) at 0.0% of the bytes" in out


def test_command_takes_other_units(capsys):
    shown = []
    for unit, largest in {"share": 1, "bits": 8}.items():
        thresholds = ("--threshold", 0.5 * largest, "--relative_threshold", 0.25 * largest)
        assert run("patch", "--text", "hello there, how are you", *thresholds, "--unit", unit) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "0.5 of the largest (4 bits)" in shown[0]


def test_command_shows_any_file_and_writes_the_page(tmp_path, capsys):
    (tmp_path / "data.bin").write_bytes(bytes(range(256)) * 3)
    page = tmp_path / "page.html"
    assert run("patch", "--file", tmp_path / "data.bin", "--html", page, "--max_bytes", 700) == 0
    assert "700 bytes in" in capsys.readouterr().out
    assert len(Page(page).boxes) == 700


def test_command_takes_rules_without_entropy(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run("patch", "--text", "abcdefg", "--rule", "stride", "--max_patch_length", 3, "--html", page) == 0
    assert "│abc│def│g" in capsys.readouterr().out
    assert all("unknown" in box["class"] for box in Page(page).boxes)


def test_command_calibrates(capsys):
    assert run("patch", "--text", "the cat sat on the mat and slept for a while " * 20, "--target_patch_size", 3) == 0
    assert " 2.9" in (out := capsys.readouterr().out) or " 3.0" in out


def test_command_writes_the_same_dataset_as_the_transform(tmp_path):
    rows = Dataset.from_dict({"text": ["hello there", "", "second row\nwith a newline"], "other": [1, 2, 3]})
    rows.to_json(tmp_path / "rows.jsonl")
    assert (
        run("patch", "--dataset", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out", "--threshold", 0.25) == 0
    )
    written = load_from_disk(tmp_path / "out")
    expected = rows.map(EntropyPatcher(threshold=0.25), batched=True, remove_columns=["text", "other"])
    assert written.column_names == ["input_ids", "patch_lengths"]
    assert written[:] == expected[:]


def test_command_takes_another_predictor(tmp_path, capsys):
    """Fails if the command always uses the default predictor."""
    other = ByteEntropyPredictor(hidden_size=16, num_layers=1, num_heads=2, ff_dim=16)
    for name, predictor in {"same": load_entropy_predictor(), "other": other}.items():
        predictor.save_pretrained(tmp_path / name)
    shown = {}
    for name in (None, "same", "other"):
        options = [] if name is None else ["--predictor", tmp_path / name]
        assert run("patch", "--text", "hello", "--rule", "global", "--threshold", 0.5, *options) == 0
        shown[name] = capsys.readouterr().out
    assert shown[None] == shown["same"] != shown["other"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--text"),
        ({"text": "a", "file": "b"}, "--text"),
        ({"dataset": "rows.jsonl"}, "--output_dir"),
        ({"text": "a", "output_dir": "out"}, "--dataset"),
        ({"dataset": "rows.jsonl", "output_dir": "out", "html": "page.html"}, "--html"),
        ({"dataset": "none.jsonl", "output_dir": "out"}, "none.jsonl"),
        ({"dataset": "rows.jsonl", "output_dir": "full"}, "full"),
        ({"file": "none.txt"}, "none.txt"),
        ({"text": "a", "html": "full/precious.txt"}, "--html"),
        ({"text": "a", "rule": "best"}, "invalid choice (choose from"),
        ({"text": "a", "threshold": "0.5", "unit": "byte"}, "nats"),
        ({"text": "a", "threshold": "7.06"}, "unit"),
        ({"text": "a", "rule": "stride"}, "max_patch_length"),
        ({"text": "a", "max_patch_length": "0"}, "max_patch_length"),
        ({"text": "a", "predictor": "missing"}, "missing"),
        ({"text": "a", "target_patch_size": "0.5"}, "target_patch_size"),
        ({"text": "", "target_patch_size": "2"}, "bytes"),
        ({"dataset": "rows.jsonl", "output_dir": "out", "column": "none"}, "none"),
    ],
)
def test_command_refuses_on_one_line(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    assert run("patch", *(part for name, value in options.items() for part in (f"--{name}", value))) == 1
    error = capsys.readouterr().err
    assert_one_sentence(error, "patch")
    assert said in error
    assert files_in(tmp_path) == ["full", "full/precious.txt", "rows.jsonl"]
