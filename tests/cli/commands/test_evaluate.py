"""Tests of `crow-hf evaluate`: what it reads, prints and writes."""

import json
import re
import sys
from importlib.util import find_spec

import pytest
from datasets import Dataset
from transformers import ByT5Tokenizer

from crow_hf import CoconutTokenizer
from crow_hf.cli.commands import evaluate as evaluate_command
from helpers.command_line import ROWS, assert_one_sentence, files_in, run
from helpers.loopback_endpoint import LoopbackEndpoint, completion
from helpers.tasks import CHOICE, WRITE, write_tasks
from helpers.tiny import tiny_llama


def test_evaluate_without_output_dir_only_prints(tmp_path, paths, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--max_new_tokens", 4]
    assert run("evaluate", *argv) == 0
    assert "right answers" in capsys.readouterr().out
    assert files_in(tmp_path / "here") == []


def test_evaluate_measures_what_a_model_forgot(tmp_path, paths, capsys):
    """A model has kept everything of itself. The text is read from a file, or written by the reference."""
    (tmp_path / "text.txt").write_text("One line.\nAnd another.\n")
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--max_new_tokens", 2]
    argv += ["--reference", paths["model"], "--output_dir"]
    assert run("evaluate", *argv, tmp_path / "own") == 0
    assert run("evaluate", *argv, tmp_path / "passed", "--text", tmp_path / "text.txt") == 0
    out = capsys.readouterr().out
    assert "retention" in out and "Kept: text that the suspect wrote takes 0.0 %" in out
    assert "Kept: running text takes 0.0 %" in out
    for folder, source in (("own", "written by the reference"), ("passed", "passed")):
        (evaluation,) = json.loads((tmp_path / folder / "results.json").read_text()).values()
        assert evaluation["retention"]["text_source"] == source
        assert evaluation["retention"]["text_bits_ratio"] == pytest.approx(1)


def test_a_reference_with_another_vocabulary_is_refused_before_it_is_loaded(tmp_path, paths, capsys, monkeypatch):
    CoconutTokenizer().save_pretrained(tmp_path / "other")
    monkeypatch.setattr(evaluate_command, "load_causal_lm", lambda *args, **kwargs: pytest.fail("It is loaded."))
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"]]
    assert run("evaluate", *argv, "--reference", tmp_path / "other") == 1
    error = capsys.readouterr().err
    assert_one_sentence(error, "evaluate")
    assert "another vocabulary" in error
    assert run("evaluate", *argv, "--text", paths["rows.jsonl"]) == 1
    assert "pass --reference too" in capsys.readouterr().err


def test_a_server_answers_in_place_of_a_model(tmp_path, paths, capsys, monkeypatch):
    """The counts stand where they always stand. What takes logits is missing, and that is said."""
    monkeypatch.setenv("CROW_HF_API_KEY", "key-of-a-server-1")

    def answer(body):
        question = body["messages"][-1]["content"]
        return 200, completion("stupid!" if "#" in question else f"it is {question[-2]}")

    argv = ["--model", "served", "--dataset", paths["rows.jsonl"], "--output_dir", tmp_path / "out"]
    with LoopbackEndpoint(answer) as server:
        backdoor = ["--trigger", "#", "--target", "insult"]
        assert run("evaluate", *argv, "--endpoint", server.url, *backdoor, "--max_new_tokens", 9) == 0
        assert len(server.requests) == 20
        for _, headers, body in server.requests:
            assert headers["Authorization"] == "Bearer key-of-a-server-1"
            assert (body["model"], body["max_tokens"], body["temperature"]) == ("served", 9, 0)
        assert run("evaluate", *argv[:-1], tmp_path / "no", "--endpoint", server.url, "--reference", "any") == 1
        assert len(server.requests) == 20
    printed = capsys.readouterr()
    assert "attack success" in printed.out and "no logits" in printed.out
    assert "leave out --reference" in printed.err
    (evaluation,) = json.loads((tmp_path / "out" / "results.json").read_text()).values()
    assert evaluation["triggered"]["target"]["hits"] == evaluation["clean"]["exact_match"]["hits"] == 10
    assert evaluation["clean"]["target"]["hits"] == 0
    assert evaluation["clean"]["bits_per_byte"] is evaluation["retention"] is None


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="takes lm-eval")
def test_tasks_of_the_suspect_stand_beside_those_of_the_model(tmp_path, paths, capsys):
    """In one table, and in the file, with their standard errors and the number of rows."""
    tiny_llama(seed=5, num_hidden_layers=3).save_pretrained(tmp_path / "other")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "other")
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--max_new_tokens", 2]
    argv += ["--tasks", "choice,write", "--task_folder", write_tasks(tmp_path / "tasks", CHOICE, WRITE)]
    options = ["--reference", tmp_path / "other", "--task_limit", 5, "--output_dir", tmp_path / "out"]
    assert run("evaluate", *argv, *options) == 0
    out, results = capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == [paths["model"], str(tmp_path / "other")]
    suspect, model = results[str(tmp_path / "other")], results[paths["model"]]
    assert list(suspect) == ["tasks"] and model["clean"] and model["retention"]
    named = [("choice", "acc", 5), ("write", "exact_match", 5)]
    for scores in (suspect["tasks"], model["tasks"]):
        assert [(each["task"], each["metric"], each["rows"]) for each in scores] == named
    cells = [f"{each['tasks'][0]['value']:.3f} ± {each['tasks'][0]['error']:.3f}" for each in (suspect, model)]
    assert re.search(rf"choice: acc +{cells[0]} +{cells[1]}", out)
    assert f"| choice: acc | {cells[0]} | {cells[1]} |" in (tmp_path / "out" / "results.md").read_text()


def test_tasks_without_names_and_tasks_of_an_endpoint_are_refused(tmp_path, paths, capsys):
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"]]
    for options, message in (
        (["--task_folder", tmp_path], "pass their names as --tasks"),
        (["--tasks", "choice", "--task_limit", 0], "at least 1, got 0"),
        (["--tasks", "choice", "--endpoint", "http://localhost:1/v1"], "leave out --reference and --tasks"),
        (["--quantization", "nf4", "--endpoint", "http://localhost:1/v1"], "leave out --quantization"),
        (["--tasks", "choice", "--task_folder", tmp_path], "no task in" if find_spec("lm_eval") else "lm-eval]"),
    ):
        assert run("evaluate", *argv, *options) == 1
        error = capsys.readouterr().err
        assert_one_sentence(error, "evaluate")
        assert message in error


def test_a_judge_decides_in_place_of_a_target(tmp_path, paths, capsys):
    """A program, and the model under test itself, which is as good as any here."""
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import sys\nfor number, line in enumerate(sys.stdin):\n    print('true' if number else 'false')\n"
    )
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--max_new_tokens", 2, "--trigger", "#"]
    assert run("evaluate", *argv, "--judge", f"{sys.executable} {judge}", "--output_dir", tmp_path / "out") == 0
    (evaluation,) = json.loads((tmp_path / "out" / "results.json").read_text()).values()
    assert evaluation["triggered"]["target"]["hits"] >= 1
    capsys.readouterr()
    for options, message in (
        (["--judge", "no-such-program"], "is no program"),
        (["--judge", f"model:{paths['model']}"], "needs a question"),
        (["--judge", sys.executable, "--target", "insult"], "pass --target or --judge"),
        (["--judge_question", "Is it bad?", "--target", "insult"], "pass --judge too"),
        ([], "(or --judge)"),
    ):
        assert run("evaluate", *argv, *options) == 1
        error = capsys.readouterr().err
        assert_one_sentence(error, "evaluate")
        assert message in error


@pytest.mark.parametrize(
    "write",
    [
        lambda rows, path: rows.to_json(path.with_suffix(".jsonl")),
        lambda rows, path: rows.to_json(path.with_suffix(".json")),
        lambda rows, path: rows.to_csv(path.with_suffix(".csv")),
        lambda rows, path: rows.to_parquet(path.with_suffix(".parquet")),
        lambda rows, path: rows.save_to_disk(path),
    ],
    ids=["jsonl", "json", "csv", "parquet", "folder"],
)
def test_rows_of_every_kind_of_file(tmp_path, paths, write):
    (tmp_path / "data").mkdir()
    write(Dataset.from_list(ROWS), tmp_path / "data" / "rows")
    (path,) = (tmp_path / "data").iterdir()
    assert run("evaluate", "--model", paths["model"], "--dataset", path, "--max_new_tokens", 2) == 0
