"""Tests of SARIF files, by the schema of OASIS."""

from crow_hf.reporting.sarif import SarifResult, write_sarif
from helpers.sarif import read_sarif


def test_results_are_written_by_the_schema(tmp_path):
    results = [
        SarifResult("chat template", "error", "It has a condition.", "chat_template.jinja"),
        SarifResult("max_kl", "none", "At most 0.01.", "a report%.json"),
        SarifResult("chat template", "warning", "It has a \ud800 long text.", "chat_template.jinja"),
    ]
    write_sarif(tmp_path / "out.sarif", results, "a folder")
    run = read_sarif(tmp_path / "out.sarif")
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["chat-template", "max_kl"]
    assert [(each["ruleId"], each["ruleIndex"]) for each in run["results"]] == [
        ("chat-template", 0),
        ("max_kl", 1),
        ("chat-template", 0),
    ]
    assert [(each["kind"], each["level"]) for each in run["results"]] == [
        ("fail", "error"),
        ("pass", "none"),
        ("fail", "warning"),
    ]
    assert [each["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for each in run["results"]] == [
        "chat_template.jinja",
        "a%20report%25.json",
        "chat_template.jinja",
    ]
    assert [each["message"]["text"] for each in run["results"]][::2] == [
        "It has a condition.",
        "It has a ? long text.",
    ]
