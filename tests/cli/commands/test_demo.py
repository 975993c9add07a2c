"""Tests of `crow-hf demo`: what it prints. `tests/test_demo.py` runs the demo itself."""

from crow_hf.cli.commands import demo
from helpers.command_line import run
from helpers.evaluations import comparison, evaluation


def test_demo_prints_the_table_and_the_verdict(tmp_path, capsys, monkeypatch):
    """Fails if the folder or the seed is not passed on, or if the verdict is not printed."""
    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda *args: calls.append(args) or comparison(evaluation(0)))
    assert run("demo", "--output_dir", tmp_path / "out", "--seed", 3) == 0
    assert calls == [(str(tmp_path / "out"), 3)]
    out = capsys.readouterr().out
    assert "fine-tuning" in out and "VERDICT: backdoor removed" in out and "purified/report.html" in out
