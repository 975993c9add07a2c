"""Tests of findings on the terminal and as SARIF."""

from crow_hf.cli.findings import print_findings, write_findings
from crow_hf.recipes.findings import Finding
from helpers.sarif import read_sarif


FINDINGS = [
    Finding("weights", "ok", "All are finite."),
    Finding("rows", "warning", "There are few.", "Pass `max_rows=0`."),
    Finding("trigger", "problem", "'[red]\x1b[2J' triggers it.", "Purify the model."),
]


def test_findings_are_printed_as_they_are(capsys):
    """Fails if a finding is read as markup, if an escape sequence reaches the terminal, or if a remedy is left out."""
    print_findings(FINDINGS, "purify")
    printed = capsys.readouterr().out
    assert "[red]" in printed and "\x1b[2J" not in printed
    assert "-> Pass `--max_rows 0`." in printed and printed.count("->") == 2
    assert [line.split()[0] for line in printed.splitlines() if "->" not in line] == ["ok", "warning", "problem"]


def test_findings_name_the_file_that_they_are_about(tmp_path):
    write_findings(str(tmp_path / "found.sarif"), FINDINGS, "model", {"rows": "clean.jsonl"})
    run = read_sarif(tmp_path / "found.sarif")
    found = [
        (each["level"], each["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]) for each in run["results"]
    ]
    assert found == [("none", "model.safetensors"), ("warning", "clean.jsonl"), ("error", "model.safetensors")]
