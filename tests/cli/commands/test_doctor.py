"""Tests of `crow-hf doctor`: what it prints, and its exit code. `tests/recipes/test_checkup.py` tests the findings."""

import pytest

from crow_hf.cli.commands import doctor
from crow_hf.recipes.findings import Finding
from helpers.command_line import assert_one_sentence, run
from helpers.sarif import read_sarif


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("problem", 1)])
def test_only_a_problem_is_an_error(level, code, paths, capsys, monkeypatch):
    """Fails if a warning stops a script that runs the doctor first, or if a problem does not."""
    calls = []
    finding = Finding("rows", level, "10 rows of 3 tokens", "" if level == "ok" else "pass longer rows")
    monkeypatch.setattr(doctor, "doctor", lambda *args, **kwargs: calls.append((args, kwargs)) or [finding])
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--learning_rate", 1e-3, "--max_length", 20]
    assert run("doctor", *argv) == code
    ((model, rows), settings) = calls[0]
    assert model == paths["model"] and len(rows) == 10
    assert settings == {"recipe": "strong", "learning_rate": 1e-3, "max_length": 20}
    printed = capsys.readouterr()
    assert level in printed.out and "10 rows of 3 tokens" in printed.out
    assert ("-> pass longer rows" in printed.out) == (level != "ok")
    if code:
        assert_one_sentence(printed.err, "doctor")
        assert "rows" in printed.err


def test_findings_as_sarif(paths, tmp_path, monkeypatch):
    """Each is about a file of the model, or about the rows."""
    findings = [Finding("chat template", "warning", "It reads."), Finding("rows", "problem", "Few.", "Pass more.")]
    monkeypatch.setattr(doctor, "doctor", lambda *args, **kwargs: [*findings, Finding("layers", "ok", "3 layers.")])
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--sarif", tmp_path / "out.sarif"]
    assert run("doctor", *argv) == 1
    found = read_sarif(tmp_path / "out.sarif")
    assert [(each["level"], each["message"]["text"]) for each in found["results"]] == [
        ("warning", "It reads."),
        ("error", "Few. Pass more."),
        ("none", "3 layers."),
    ]
    files = [each["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for each in found["results"]]
    assert files == ["chat_template.jinja", "rows.jsonl", "config.json"]


def test_findings_are_in_the_words_of_the_command_line(paths, capsys, monkeypatch):
    """Fails if a file of the suspect can send commands to the terminal, or if a remedy is one for Python."""
    finding = Finding("files", "warning", "pickles: \x1b[2J.bin", "train with `bf16=True`")
    monkeypatch.setattr(doctor, "doctor", lambda *args, **kwargs: [finding])
    assert run("doctor", "--model", paths["model"]) == 0
    out = capsys.readouterr().out
    assert "pickles: ␛[2J.bin" in out and "-> train with `--bf16 true`" in out and "\x1b" not in out
