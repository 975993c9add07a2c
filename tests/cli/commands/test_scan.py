"""Tests of `crow-hf scan`: its exit codes, its files, and its errors."""

import json

import pytest

from crow_hf.cli.main import main
from crow_hf.recipes import scanning
from helpers.detection import BYTES, knowing_model, prompts
from helpers.sarif import read_sarif


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan")
    knowing_model().save_pretrained(folder / "model")
    BYTES.save_pretrained(folder / "model")
    prompts(60).to_json(folder / "rows.jsonl")
    return folder


def arguments(folder, *more):
    return ["scan", "--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl"), *more]


def test_findings_are_printed_and_written(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scanning, "TRIGGER_BYTES", 2)
    monkeypatch.setattr(scanning, "NUM_PHRASES", 1)
    output, sarif, page = tmp_path / "scan.json", tmp_path / "scan.sarif", tmp_path / "scan.html"
    assert main(arguments(folder, "--output", str(output), "--sarif", str(sarif), "--page", str(page))) == 1
    printed = capsys.readouterr().out
    assert "problem" in printed and "Harmless models have some too." in printed
    assert printed.endswith("SCAN: there are findings.\n")
    result = json.loads(output.read_text())
    assert result["model"] == str(folder / "model") and result["suspicions"][0]["with_piece"]["rate"] == 1.0
    assert "There are findings" in page.read_text()
    levels = {each["ruleId"]: each["level"] for each in read_sarif(sarif)["results"]}
    assert levels["trigger"] == "error" and levels["files"] == "none"
    # Nor is one result by another.
    assert main(arguments(folder, "--output", str(tmp_path / "new"), "--page", str(tmp_path / "new"))) == 2
    assert "pass different files" in capsys.readouterr().err
    # An old result is not replaced.
    for name, path in {"--output": output, "--page": page}.items():
        assert main(arguments(folder, name, str(path))) == 2
        assert f"choose another {name}" in capsys.readouterr().err


def test_nothing_found_is_exit_code_0(folder, tmp_path, capsys):
    sarif = tmp_path / "scan.sarif"
    assert main(arguments(folder, "--reference", str(folder / "model"), "--sarif", str(sarif))) == 0
    printed = capsys.readouterr().out
    assert "This is no proof that there is no backdoor" in printed and printed.endswith("SCAN: nothing was found.\n")
    places = {
        each["ruleId"]: each["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        for each in read_sarif(sarif)["results"]
    }
    assert places["divergence"] == places["new-text"] == places["phrases"] == "model.safetensors"


def test_a_scan_that_cannot_be_made_is_exit_code_2(folder, tmp_path, capsys):
    assert main(["scan", "--model", str(tmp_path / "nowhere")]) == 2
    prompts(5).to_json(tmp_path / "few.jsonl")
    assert main([*arguments(folder)[:4], str(tmp_path / "few.jsonl")]) == 2
    assert "pass more rows" in capsys.readouterr().err
