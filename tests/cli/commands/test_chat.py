"""Tests of `crow-hf chat` on the folder of a real run."""

import io

from crow_hf import load_causal_lm
from crow_hf.data.rows import render
from crow_hf.data.visible import printable
from crow_hf.evaluation.generation import write_answers
from crow_hf.training.loading import load_tokenizer
from helpers.command_line import assert_one_sentence, run


def test_both_models_answer_every_line(finished, paths, monkeypatch, capsys):
    """Fails if one model answers for both, if a blank line is a prompt, or if a long prompt ends the conversation."""
    prompts = ["what is 3? ", "what is 4? "]
    lines = [prompts[0], "", "x" * 5000, prompts[1]]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    monkeypatch.setenv("COLUMNS", "200")
    assert run("chat", "--run", finished, "--max_new_tokens", 8) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    expected = []
    for folder in (paths["model"], finished):
        model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
        rendered = [render({"prompt": prompt, "completion": ""}, tokenizer) for prompt in prompts]
        answers = write_answers(model, tokenizer, rendered, max_new_tokens=8)
        expected.append([printable(answer.text).strip() for answer in answers])
    assert rows == [list(pair) for pair in zip(*expected, strict=True)] and expected[0] != expected[1]
    assert out.count("suspect") == out.count("purified") == 2
    assert "exceed the model's context" in out


def test_without_a_run(tmp_path, capsys):
    assert run("chat", "--run", tmp_path) == 1
    err = capsys.readouterr().err
    assert "does not exist: wait until the purification is finished" in err
    assert_one_sentence(err, "chat")
