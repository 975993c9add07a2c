"""Tests of `crow-hf reproduce` on the report of a real run."""

import json
import sys

import pytest

from crow_hf.reporting.checksums import sha256_of
from crow_hf.reporting.report_file import REPORT_DATA, digest_of
from helpers.command_line import assert_one_sentence, run


def test_a_run_is_repeated_bit_for_bit(finished, tmp_path, capsys):
    assert run("reproduce", "--report", finished, "--output_dir", tmp_path / "again") == 0
    assert "Reproduced: all " in capsys.readouterr().out
    first, second = (sha256_of(folder / "model.safetensors") for folder in (finished, tmp_path / "again"))
    assert first == second


def test_what_differs_is_said(finished, tmp_path, capsys, monkeypatch):
    """Another row is another run."""
    rows = finished.parent / "rows.jsonl"
    text = rows.read_text()
    try:
        rows.write_text(text.replace("what is 7?", "what was 7?").replace("what is 8?", "what was 8?"))
        assert run("reproduce", "--report", finished, "--output_dir", tmp_path / "again") == 1
    finally:
        rows.write_text(text)
    out = capsys.readouterr().out
    assert "NOT reproduced: model.safetensors differ." in out and "train_dataset.sha256: " in out


def change(folder, target, **changes):
    """Write another report, as a run of other options would."""
    record = json.loads((folder / REPORT_DATA).read_text())
    record["run"].update(changes)
    record["digest"] = digest_of(record)
    (target / REPORT_DATA).write_text(json.dumps(record))
    return target / REPORT_DATA


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("crow-hf demo --output_dir x", "not written by `crow-hf purify` but by `crow-hf demo --output_dir x`"),
        (
            "crow-hf purify --model m --dataset d --hub_token (hidden)",
            "holds a secret, which the report does not know",
        ),
        ("crow-hf purify --model nowhere --dataset d --output_dir x", "nowhere"),
    ],
)
def test_what_cannot_be_repeated_is_refused(command, message, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["crow-hf"])
    assert (
        run("reproduce", "--report", change(finished, tmp_path, command=command), "--output_dir", tmp_path / "x") == 2
    )
    err = capsys.readouterr().err
    assert message in err
    assert_one_sentence(err, "reproduce")
