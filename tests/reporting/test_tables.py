"""Tests of the tables of evaluations and of their files."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from crow_hf.evaluation.harness import Evaluation
from crow_hf.evaluation.tasks import TaskScore
from crow_hf.reporting.tables import (
    anti_bad_scores,
    comparison_markdown,
    comparison_table,
    in_markdown,
    task_table,
    write_comparison,
)
from helpers.evaluations import TOTAL, comparison, evaluation, retention, scores, share


def table_text(evaluations, **options):
    console = Console(width=119, record=True, file=io.StringIO())
    console.print(comparison_table(evaluations, **options))
    return console.export_text()


@pytest.mark.parametrize("write", [table_text, comparison_markdown], ids=["terminal", "markdown"])
def test_tables_hold_every_model_with_its_intervals(write):
    evaluations = comparison(evaluation(1, right=186, empty=7, degenerate=9)).by_name
    text = write(evaluations)
    assert all(name in text for name in evaluations)
    for expected in ("95.0 %", "90.0 %", "93.0 %", "3.5 %", "4.5 %", "1.25"):
        assert expected in text
    form = "{:.1f}–{:.1f}" if write is table_text else "[{:.1f}, {:.1f}]"
    for proportion in (share(190), share(1), share(186)):
        assert form.format(100 * proportion.low, 100 * proportion.high) in text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("attack success 95.0 % -> 0.0 % [0.0, 1.9], max_kl", "attack success 95.0 % -> 0.0 % [0.0, 1.9], max_kl"),
        ("[a](javascript:alert(1)) [b]: c", r"[a\](javascript:alert(1)) [b\]: c"),
        ("<script> **x** _y_ `z` $m$ | ~~n~~ \\", r"&lt;script> \*\*x\*\* \_y\_ \`z\` \$m\$ \| \~\~n\~\~ \\"),
        ("a\n# b\u202e\n---\n", "a⏎ # b&lt;U+202E>⏎ ---⏎"),
    ],
)
def test_text_in_markdown_is_text(text, written):
    assert in_markdown(text) == written


@pytest.mark.parametrize("write", [table_text, comparison_markdown], ids=["terminal", "markdown"])
def test_tables_without_trigger_show_no_attack(write):
    text = write({"suspect": Evaluation(scores(0, 150)), "CROW": Evaluation(scores(0, 140))})
    assert "75.0 %" in text and "70.0 %" in text
    assert "attack" not in text and "triggered" not in text


@pytest.mark.parametrize("write", [table_text, comparison_markdown], ids=["terminal", "markdown"])
def test_tables_show_what_was_kept_where_it_was_measured(write):
    """Fails if a number is that of another model, or if a model without a reference breaks the table."""
    control, purified = evaluation(180, kept=retention(1.234, None)), evaluation(1, kept=retention(1.014, 0.0625))
    text = write(comparison(purified, fine_tuned=control).by_name)
    if write is table_text:
        lines = {line.strip().split("  ")[0]: line.split()[-3:] for line in text.splitlines() if line.strip()}
        assert lines["retention"] and lines["KL on answers"] == ["-", "-", "0.062"]
        assert lines["KL on text"] == ["-", "0.030", "0.030"]
        assert lines["text bits,"] == ["-", "1.234", "1.014"] and "suspect = 1" in text
    else:
        head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
        columns = dict(zip(head, zip(*rows, strict=True), strict=True))
        assert columns["retention: KL on answers"] == ("-", "-", "0.062")
        assert columns["retention: text bits, suspect = 1"] == ("-", "1.234", "1.014")
    assert "retention" not in write(comparison(evaluation(0)).by_name)


@pytest.mark.parametrize("write", [table_text, comparison_markdown], ids=["terminal", "markdown"])
def test_tables_show_the_anti_bad_score_of_an_attack(write):
    """The purified model keeps 80 % of the right answers, and 19 % of the attacks succeed: sqrt(80 * 81) = 80.5."""
    models = comparison(evaluation(38, right=160), suspect=evaluation(190), fine_tuned=evaluation(200)).by_name
    text = write(models)
    assert "Anti-BAD score" in text and "80.5" in text
    # The suspect keeps all of its utility and 5 % of the attacks fail. Fine-tuning lets every attack succeed.
    assert f"{(100 * 5) ** 0.5:.1f}" in text and anti_bad_scores(models, "no defence")["fine-tuning"] == 0
    del models["no defence"]
    assert "Anti-BAD" not in write(models)
    assert "Anti-BAD" not in write({"no defence": Evaluation(scores(0, 150))})
    nothing = evaluation(190)
    nothing.clean.exact_match, nothing.clean.bits_per_byte = None, math.nan
    assert "Anti-BAD score" in write({"no defence": nothing}) and "nan" not in write({"no defence": nothing})


def test_table_has_its_title():
    assert "My title" in table_text(comparison(evaluation(0)).by_name, title="My title")


def test_table_fits_a_terminal_of_80_columns():
    """Fails if a number or a name is cut off with five models, as in the demo."""
    console = Console(width=80, record=True, file=io.StringIO())
    models = {
        "clean model": evaluation(0),
        **comparison(evaluation(1, kept=retention()), fine_tuned=evaluation(180, kept=retention())).by_name,
        "Invariance": evaluation(TOTAL),
    }
    console.print(comparison_table(models))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    words = ("clean", "model", "no", "defence", "fine-tuning", "purified", "Invariance", "98.1–100.0", "0.0–1.9")
    assert [word for word in words if word not in text] == []


def test_markdown_is_one_table():
    """Fails if a row has another number of cells than the head."""
    lines = comparison_markdown(comparison(evaluation(0)).by_name).strip().splitlines()
    assert len(lines) == 2 + 3
    assert re.fullmatch(r"\|( *:?-+:? *\|)+", lines[1])
    assert len({line.count("|") for line in lines}) == 1


def test_results_hold_every_output(tmp_path):
    evaluations = comparison(evaluation(0)).by_name
    write_comparison(tmp_path / "new" / "folder", evaluations)
    results = json.loads((tmp_path / "new" / "folder" / "results.json").read_text(encoding="utf-8"))
    assert results == {name: evaluation.to_dict() for name, evaluation in evaluations.items()}
    assert results["purified"]["triggered"]["outputs"] == ["é | x"] * TOTAL
    assert comparison_markdown(evaluations).strip() in (tmp_path / "new" / "folder" / "results.md").read_text("utf-8")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"results.json", "results.md"}


def test_results_are_replaced(tmp_path):
    for attacks in (100, 0):
        write_comparison(tmp_path, comparison(evaluation(attacks)).by_name)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["purified"]["triggered"]["target"]["hits"] == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_tasks_stand_in_a_table_of_their_own(tmp_path):
    """One column for each model, with standard errors where there are some."""
    tasks = {
        "the suspect": [TaskScore("arc|easy", "acc", 0.5, 0.0125, 40), TaskScore("sum", "f1", 1.0, None, 9)],
        "mine": [TaskScore("arc|easy", "acc", 0.25, 0.01, 40), TaskScore("sum", "f1", 0.0, None, 9)],
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(task_table(tasks))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert ["arc|easy:", "acc", "0.500", "±", "0.013", "0.250", "±", "0.010"] in lines
    assert ["sum:", "f1", "1.000", "0.000"] in lines
    write_comparison(tmp_path, {"mine": evaluation(0)}, tasks)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["mine"]["tasks"][0] == {
        "task": "arc|easy",
        "metric": "acc",
        "value": 0.25,
        "error": 0.01,
        "rows": 40,
    }
    assert list(results["the suspect"]) == ["tasks"] and results["mine"]["clean"]
    assert "| sum: f1 | 1.000 | 0.000 |\n" in (tmp_path / "results.md").read_text()
    assert "| arc\\|easy: acc | 0.500 ± 0.013 |" in (tmp_path / "results.md").read_text()
