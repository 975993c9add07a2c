"""Tests of `crow-hf gate` on the folder of a real run."""

import shutil

import pytest

from helpers.command_line import assert_one_sentence, run
from helpers.sarif import read_sarif


def lines(out):
    """The lines of the table, as words."""
    return [line.split() for line in out.splitlines()]


def test_good_bad_and_thin_runs(finished, tmp_path, capsys):
    """Each decision has an exit code of its own. Options replace rules of the policy file."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("max_kl: 1000\nmin_rows: 8\nrequire: [retention]\n")
    gate = ["gate", "--report", finished, "--policy", policy]
    assert run(*gate, "--sarif", tmp_path / "out.sarif") == 0
    out = capsys.readouterr().out
    assert [line[:2] for line in lines(out)[:1]] == [["passed", "files"]] and out.endswith("GATE: passed.\n")
    found = read_sarif(tmp_path / "out.sarif")
    assert [each["ruleId"] for each in found["results"]] == ["files", "max_kl", "min_rows", "require-retention"]

    assert run(*gate, "--max_kl", "0") == 1
    assert "GATE: failed." in capsys.readouterr().out
    assert run(*gate, "--max_attack_success", "0.1") == 2
    out = capsys.readouterr().out
    assert "no trigger was passed" in " ".join(out.split()) and out.endswith("GATE: no evidence.\n")


def test_other_files_than_the_measured_ones_fail(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert run("gate", "--report", folder, "--min_rows", "1") == 1
    assert "changed: model.safetensors" in " ".join(capsys.readouterr().out.split())
    # The report alone says nothing about files.
    assert run("gate", "--report", folder / "report.json", "--min_rows", "1") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "The policy has no rule: pass at least one, such as `--max_attack_success`."),
        (["--max_kl", "-1"], "`--max_kl` is a number of nats per token, such as 0.05, got -1.0."),
        (
            ["--require", "scan"],
            "`require` is a list of accuracy, attack, canaries, control, last_look, retention, got 'scan'.",
        ),
        (["--policy", "nowhere.yaml", "--min_rows", "1"], "nowhere.yaml"),
        (["--min_rows", "few"], "--min_rows"),
    ],
)
def test_an_error_is_no_decision(options, message, finished, capsys):
    assert run("gate", "--report", finished, *options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert_one_sentence(err, "gate")


def test_without_a_report(tmp_path, capsys):
    assert run("gate", "--report", tmp_path, "--min_rows", "1") == 2
    assert "does not exist: wait until the purification is finished" in capsys.readouterr().err
