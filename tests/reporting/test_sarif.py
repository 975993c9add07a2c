"""Tests of SARIF files, with the models of another package as their reader."""

from sarif_pydantic import Sarif

from crow_hf.reporting.sarif import SarifResult, write_sarif


def test_another_reader_finds_the_same(tmp_path):
    results = [
        SarifResult("chat template", "error", "It has a condition.", "chat_template.jinja"),
        SarifResult("max_kl", "none", "At most 0.01.", "a report%.json"),
        SarifResult("chat template", "warning", "It has a \ud800 long text.", "chat_template.jinja"),
    ]
    write_sarif(tmp_path / "out.sarif", results, "a folder")
    (run,) = Sarif.model_validate_json((tmp_path / "out.sarif").read_bytes()).runs
    assert [rule.id for rule in run.tool.driver.rules] == ["chat-template", "max_kl"]
    assert [(each.rule_id, each.rule_index) for each in run.results] == [
        ("chat-template", 0),
        ("max_kl", 1),
        ("chat-template", 0),
    ]
    assert [each.level.value for each in run.results] == ["error", "none", "warning"]
    assert [each.locations[0].physical_location.artifact_location.uri for each in run.results] == [
        "chat_template.jinja",
        "a%20report%25.json",
        "chat_template.jinja",
    ]
    assert [each.message.text for each in run.results][::2] == ["It has a condition.", "It has a ? long text."]
