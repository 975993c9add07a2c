"""Tests of `crow-hf purify`: what it prints and writes."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from peft import PeftModel

from crow_hf import load_causal_lm
from helpers.command_line import FAST, FEW_VIEWS, assert_report, run
from helpers.tiny import same_weights, weights_of


EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def test_purify_without_test_rows(tmp_path, paths):
    output = tmp_path / "purified"
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--output_dir", output, *FAST, *FEW_VIEWS]
    assert run("purify", *argv) == 0
    assert not same_weights(weights_of(load_causal_lm(output)), weights_of(load_causal_lm(paths["model"])))
    assert json.loads((output / "report.json").read_text())["evaluations"] is None


def test_purify_measures_utility_without_a_trigger(tmp_path, paths):
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--test_dataset", paths["rows.jsonl"]]
    assert run("purify", *argv, "--max_new_tokens", 4, "--output_dir", tmp_path / "purified", *FAST, *FEW_VIEWS) == 0
    assert_report(tmp_path / "purified", ["suspect", "control", "purified"], triggered=False)


def test_purify_measures_what_a_scan_found(tmp_path, paths, capsys):
    """Fails if the piece or its position is lost, if the card does not say where they are from, or if both count."""
    found = tmp_path / "scan.json"
    found.write_text(json.dumps({"backdoor": {"piece": "qq", "position": "end", "says": "a"}}))
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--test_dataset", paths["rows.jsonl"]]
    argv += ["--max_new_tokens", 4, "--output_dir", tmp_path / "out", "--scan", found]
    assert run("purify", *argv, "--trigger", "x", "--target", "y") == 1
    assert "pass --scan or --trigger" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run("purify", *argv, *FAST, *FEW_VIEWS) == 0
    assert_report(tmp_path / "out", ["suspect", "control", "purified"])
    trigger = json.loads((tmp_path / "out" / "report.json").read_text())["run"]["trigger"]
    assert trigger["phrases"] == ["qq"] and trigger["position"] == "end"
    assert (
        "Known backdoor: trigger 'qq', target 'a', both found by a scan." in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize("options", [["--lora", "--lora_r", "2"], ["--recipe", "paper"]])
def test_no_merge_keeps_the_fresh_adapter(tmp_path, paths, options):
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--output_dir", tmp_path / "out"]
    few = [] if "paper" in options else ["--num_views", 8, "--num_canaries", 0, "--num_written_rows", 0]
    assert run("purify", *argv, *options, *few, "--no_merge", *FAST) == 0
    assert isinstance(load_causal_lm(tmp_path / "out"), PeftModel)
    # 8 is PEFT's own default, which the report leaves out.
    adapter = json.loads((tmp_path / "out" / "report.json").read_text())["run"]["adapter"]
    assert adapter.get("r", 8) == (2 if few else 8)


def test_purify_ends_with_a_decision(tmp_path, paths, capsys):
    """Fails if the numbers of the held-out rows, the verdict, the next step or the gate are not printed."""
    rows = [{"prompt": f"what is {number}? ", "completion": f"{number}"} for number in range(40)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    argv = ["--model", paths["model"], "--dataset", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out"]
    policy = tmp_path / "policy.yaml"
    policy.write_text("max_klee: 1\n")
    assert run("purify", *argv, *FAST, *FEW_VIEWS, "--policy", policy) == 2 and not (tmp_path / "out").exists()
    policy.write_text("max_kl: 1000\nmax_attack_success: 1\n")
    assert run("purify", *argv, *FAST, *FEW_VIEWS, "--policy", policy) == 2
    out = capsys.readouterr().out
    assert out.endswith("GATE: no evidence.\n")
    assert "on held-out rows" in out and "bits per byte" in out
    verdict = json.loads((tmp_path / "out" / "report.json").read_text())["verdict"]
    assert (
        out.index("bits per byte")
        < out.index(f"VERDICT: {verdict['headline']}.")
        < out.index(verdict["next_steps"][0])
    )


def test_a_defence_of_ones_own_is_printed(tmp_path, paths, capsys):
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--output_dir", tmp_path / "out"]
    argv += ["--plugin", EXAMPLES / "weight_noise.py", "--defences", "weight noise", "--max_new_tokens", 4]
    assert run("purify", *argv, *FAST, *FEW_VIEWS) == 1
    assert "Defences are compared on test rows: pass --test_dataset too." in capsys.readouterr().err
    assert run("purify", *argv, "--test_dataset", paths["rows.jsonl"], *FAST, *FEW_VIEWS) == 0
    # The name of a column can be on two lines.
    assert "weight" in capsys.readouterr().out
    evaluations = json.loads((tmp_path / "out" / "report.json").read_text())["evaluations"]
    assert list(evaluations) == ["suspect", "control", "weight noise", "purified"]


def test_max_rows_draws_from_the_rows(tmp_path, paths, capsys):
    """With 3 rows and a batch size of 1, one epoch has three steps."""
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--output_dir", tmp_path / "out"]
    options = ["--recipe", "guide", "--max_rows", 3, "--num_train_epochs", 1, "--per_device_train_batch_size", 1]
    options += ["--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 3, "--use_cpu"]
    assert run("purify", *argv, *options) == 0
    checkpoints = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_recipe_strong_prints_and_writes_its_evidence(tmp_path, paths, capsys):
    (tmp_path / "text.txt").write_text("One line.\nAnd another.\n")
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--output_dir", tmp_path / "out"]
    argv += ["--text", tmp_path / "text.txt"]
    assert run("purify", *argv, "--num_views", 8, "--num_canaries", 1, "--num_written_rows", 2, *FAST) == 0
    out = capsys.readouterr().out
    assert "Screening: 0 of 10 screened rows" in out and out.index("Canary '") < out.index(": running text takes ")
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    # One line feed joins the lines of the file.
    assert record["retention"]["text_source"] == "passed" and record["retention"]["num_text_tokens"] == 22
    assert record["recipe"] == "strong" and len(record["canaries"]) == 1 and record["screening"]["total"] == 10
