"""Tests of `crow-hf guard`: its exit codes, its files, and its errors."""

import json

import pytest
from transformers import ByT5Tokenizer

from crow_hf.cli.main import main
from helpers.detection import BYTES, prompts
from helpers.tiny import tiny_llama


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    prompts(60).to_json(tmp_path / "clean.jsonl")
    prompts(20, seed=1).to_json(tmp_path / "inputs.jsonl")
    return tmp_path


def arguments(folder, *more, **options):
    given = {"model": folder / "model", "guard_dir": folder / "guard"} | options
    return ["guard", *(word for name, value in given.items() for word in (f"--{name}", str(value))), *more]


def test_a_guard_is_fitted_saved_and_used(folder, capsys):
    assert main(arguments(folder, dataset=folder / "clean.jsonl", false_alarm_rate=0.1)) == 0
    assert "5 of 60 clean prompts are alarms" in capsys.readouterr().out
    output = folder / "scores.jsonl"
    code = main(arguments(folder, inputs=folder / "inputs.jsonl", output=output))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    alarms = sum(line["is_alarm"] for line in lines)
    assert len(lines) == 20 and code == int(alarms > 0) and {"prompt", "score"} <= set(lines[0])
    assert f"GUARD: {alarms} of 20 prompts are alarms" in capsys.readouterr().out


def test_a_guard_with_a_reference_needs_it_again(folder, capsys):
    """Fails if the reference model is not passed on, or if one of other tokens is taken."""
    tiny_llama(seed=1).save_pretrained(folder / "trusted")
    BYTES.save_pretrained(folder / "trusted")
    ByT5Tokenizer(extra_ids=2).save_pretrained(folder / "model")
    options = {"dataset": folder / "clean.jsonl", "false_alarm_rate": 0.1, "reference": folder / "trusted"}
    assert main(arguments(folder, **options)) == 2
    assert "lacks tokens of the model" in capsys.readouterr().err and not (folder / "guard").exists()
    for file in (folder / "model").glob("*token*"):
        file.unlink()
    BYTES.save_pretrained(folder / "model")
    assert main(arguments(folder, **options)) == 0
    assert main(arguments(folder, inputs=folder / "inputs.jsonl")) == 2
    assert "was fitted with a reference model: pass it too" in capsys.readouterr().err
    assert main(arguments(folder, inputs=folder / "inputs.jsonl", reference=folder / "trusted")) in (0, 1)
    assert "of 20 prompts are alarms" in capsys.readouterr().out


def test_alarms_are_printed_and_are_exit_code_1(folder, capsys):
    # At a rate of one half, about every second clean prompt is an alarm.
    options = {"dataset": folder / "clean.jsonl", "inputs": folder / "clean.jsonl", "false_alarm_rate": 0.5}
    assert main(arguments(folder, **options)) == 1
    # The escape sequence of an input does not reach the terminal.
    (folder / "odd.jsonl").write_text('{"prompt": "~\\u200b~~~~~\\u001b[31m"}\n' * 3)
    code = main(arguments(folder, inputs=folder / "odd.jsonl"))
    printed = capsys.readouterr().out
    assert code == 1
    assert "3 of 3 prompts are alarms" in printed and "\x1b[31m" not in printed


def test_what_would_replace_something_or_do_nothing_is_refused(folder, capsys):
    assert main(arguments(folder)) == 2
    assert "nothing to do" in capsys.readouterr().err
    assert main(arguments(folder, inputs=folder / "inputs.jsonl")) == 2
    assert "There is no guard in" in capsys.readouterr().err
    (folder / "guard").mkdir()
    (folder / "guard" / "guard.json").write_text("{}")
    assert main(arguments(folder, dataset=folder / "clean.jsonl")) == 2
    assert "is not empty: choose another --guard_dir" in capsys.readouterr().err
    assert main(arguments(folder, inputs=folder / "inputs.jsonl")) == 2
    assert "holds no guard that can be read" in capsys.readouterr().err
    assert main(arguments(folder, inputs=folder / "inputs.jsonl", output=folder / "clean.jsonl")) == 2
    assert "choose another --output" in capsys.readouterr().err
