"""Reads the arguments of a command from the command line and from a YAML file, before anything heavy is imported."""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml

from ..secrets import SECRET
from .options import COMMANDS, RECIPES
from .sources import PACKAGE, TRANSFORMERS, Option, names_in, options_in, options_of, values_in


_CONFIGURATIONS = {
    "CrowConfig": PACKAGE / "methods" / "crow" / "config.py",
    "InvarianceConfig": PACKAGE / "methods" / "invariance" / "config.py",
}
# The arguments of transformers that a purification is usually run with. The others work too, and `--help_all` lists
# them.
_USUAL = {
    "output_dir",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "bf16",
    "activation_checkpointing",
    "save_strategy",
    "save_steps",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
    "report_to",
    "use_cpu",
    "seed",
}
# A model with a backdoor is not pushed, implanting is not resumed, and it has no consistency loss.
_NOT_LISTED = {
    "implant": {"push_to_hub", "hub_model_id", "resume_from_checkpoint"}
    | {"alpha", "epsilon", "epsilon_mode", "consistency_layers", "perturb"}
}
_TRUE, _FALSE = ("true", "yes", "on", "1", "t", "y"), ("false", "no", "off", "0", "f", "n")


def command_module(command: str) -> ModuleType:
    """Import the module of a command, which has a function `run`. This takes seconds."""
    return import_module(f"{__package__}.commands.{command}")


def parse_arguments(command: str, argv: Sequence[str]) -> list[Any]:
    """
    Read the arguments of a command, and make its dataclasses of them.

    Raises:
        `ValueError`: If an argument is unknown, missing or malformed.
    """
    return make_arguments(command, read_arguments(command, argv))


def read_arguments(command: str, argv: Sequence[str]) -> dict[str, Any]:
    """
    Read the arguments of a command without importing PyTorch.

    `--config FILE.yaml` can set any of them. The command line takes precedence.

    Returns:
        `dict[str, Any]`: The values that are given, by the names of their options.

    Raises:
        `ValueError`: If an argument is unknown, missing or malformed.
    """
    argv = [_with_underscores(word) for word in argv]
    config = _value_of("config", argv)
    from_file = {} if config is None else _read_config(Path(config))
    recipe = _value_of("recipe", argv) or from_file.get("recipe")
    parser = _Parser(command, None if recipe is None else str(recipe), "--help_all" in argv)
    lists = _lists_in(from_file, parser.options)
    others = {name: value for name, value in from_file.items() if name not in lists}
    # They stand before the command line, because argparse takes the last of two values.
    argv = [*_as_words(others, parser.options), *argv]
    if unknown := [name for name in map(str, from_file) if name not in parser.options]:
        raise ValueError(f"{config} has a mistake. {parser.about_unknown(unknown[0])}")
    given, rest = parser.parse_known_args(argv)
    if rest and not rest[0].startswith("--"):
        names = [word.partition("=")[0] for word in argv[: argv.index(rest[0])] if word.startswith("--")]
        place = names[-1] if names and names[-1].removeprefix("--") in parser.options else f"crow-hf {command}"
        raise ValueError(f"A word after {place} belongs to no argument: see `{parser.prog} --help`.")
    if rest:
        raise ValueError(parser.about_unknown(rest[0].partition("=")[0].removeprefix("--")))
    values = lists | {name: value for name, value in vars(given).items() if name != "config"}
    if missing := [f"--{name}" for name in parser.needed if name not in values]:
        raise ValueError(f"{' and '.join(missing)} must be given: see `{parser.prog} --help`.")
    return values


def make_arguments(command: str, values: dict[str, Any]) -> list[Any]:
    """
    Make the dataclasses of a command from the values of [`read_arguments`].

    Raises:
        `ValueError`: If a configuration refuses a value.
    """
    own = {each.name for each in options_of(COMMANDS[command])}
    arguments = [COMMANDS[command](**{name: value for name, value in values.items() if name in own})]
    if configuration := _configuration(command, values.get("recipe")):
        home = ".".join(_CONFIGURATIONS[configuration].relative_to(PACKAGE).with_suffix("").parts)
        kind = getattr(import_module(f"..{home}", __package__), configuration)
        settings = {name: value for name, value in values.items() if name not in own and name != "verbose"}
        arguments.append(kind(**_defaults(values.get("recipe")) | settings))
    return arguments


def _configuration(command: str, recipe: str | None) -> str | None:
    """Name the configuration of a command that trains."""
    if command == "purify" and recipe in (None, "strong"):
        return "InvarianceConfig"
    return "CrowConfig" if command in ("purify", "implant") else None


def _defaults(recipe: str | None) -> dict[str, Any]:
    """Return the defaults of a recipe that differ from those of its configuration."""
    return values_in(PACKAGE / "recipes" / "presets.py", "PAPER") if recipe == "paper" else {}


def options_of_command(command: str, recipe: str | None = None) -> dict[str, Option]:
    """Return all options of a command by name: its own, those of the method, and those of transformers."""
    own = options_of(COMMANDS[command])
    configuration, defaults = _configuration(command, recipe), _defaults(recipe)
    if configuration is None:
        return {each.name: each for each in own}
    inherited = {each.name: each for each in options_in(TRANSFORMERS / "training_args.py", "TrainingArguments")}
    inherited["output_dir"] = dataclasses.replace(inherited["output_dir"], default=dataclasses.MISSING)
    levels = (*names_in(TRANSFORMERS / "utils" / "logging.py", "log_levels"), "passive")
    for name in ("log_level", "log_level_replica"):
        inherited[name] = dataclasses.replace(inherited[name], choices=levels)
    method: dict[str, Option] = {}
    for name in list(_CONFIGURATIONS)[: 1 + list(_CONFIGURATIONS).index(configuration)]:
        for option in options_in(_CONFIGURATIONS[name], name):
            # Some change only the default of an argument of transformers.
            choices = option.choices or getattr(inherited.get(option.name), "choices", ())
            method[option.name] = dataclasses.replace(option, choices=choices)
    every = {each.name: each for each in own} | method | (inherited | method)
    return {name: dataclasses.replace(each, default=defaults.get(name, each.default)) for name, each in every.items()}


class _Parser(argparse.ArgumentParser):
    """Parses the arguments of one command. Those that are not given are missing in the result."""

    def __init__(self, command: str, recipe: str | None, lists_all: bool) -> None:
        super().__init__(
            prog=f"crow-hf {command}",
            usage=f"crow-hf {command} [--ARGUMENT VALUE ...]",
            description=COMMANDS[command].__doc__,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.command, self.options = command, options_of_command(command, recipe)
        self.needed = [name for name, each in self.options.items() if each.default is dataclasses.MISSING]
        needed, usual, method = map(self.add_argument_group, ("needed", "usual", "of the method"))
        trainer = self.add_argument_group("of transformers.TrainingArguments")
        self.listed: list[str] = []
        own = {each.name for each in options_of(COMMANDS[command])}
        inherited = {each.name for each in options_in(TRANSFORMERS / "training_args.py", "TrainingArguments")}
        for name, option in self.options.items():
            if name in self.needed:
                group = needed
            elif name in own or name in _USUAL:
                group = usual
            else:
                group = trainer if name in inherited else method
            if group is not trainer:
                self.listed.append(name)
            hidden = name in _NOT_LISTED.get(command, ()) or (group is trainer and not lists_all)
            _add(group, option, hidden)
        usual.add_argument(
            "--config",
            metavar="FILE",
            help="YAML file that sets any of these arguments. The command line overrides it.",
        )
        usual.add_argument(
            "--verbose", action="store_true", help="Print every log line, and the place of an unforeseen error."
        )
        self.add_argument("--help_all", action="help", help="list the arguments of transformers too, and exit")

    def error(self, message: str) -> NoReturn:
        # A usage line would hide the message. What was typed can be a token at the wrong place, so it is not shown.
        message = re.sub(r":? ('.*'|\".*\")(?= \(choose from|$)", "", message, flags=re.DOTALL)
        raise ValueError(f"{message[0].upper()}{message[1:]}; see `{self.prog} --help`.")

    def about_unknown(self, name: str) -> str:
        """Say that the command does not have an argument, and which one may be meant."""
        if owners := [recipe for recipe in RECIPES if name in options_of_command(self.command, recipe)]:
            return f"--{name} belongs to the recipe {owners[0]}: leave it out, or choose --recipe {owners[0]}."
        # With a token in it, a name is not shown.
        holds_value = any(name.startswith(each) for each in self.options if SECRET.search(each))
        shown = f"--{name}" if is_word(name) and not holds_value else "of that name"
        if meant := near(name, self.listed) or near(name, self.options):
            return f"There is no argument {shown}: did you mean {' or '.join(f'--{each}' for each in meant)}?"
        if others := [command for command in COMMANDS if name in options_of_command(command)]:
            return f"There is no argument {shown} here: `crow-hf {others[0]}` has it."
        return f"There is no argument {shown}: see `{self.prog} --help_all`."


def split_names(text: str | None) -> list[str]:
    """Split names at commas. A comma before a space is part of a name."""
    return [] if text is None else re.split(r",(?! )", text)


def is_word(name: str) -> bool:
    """Return whether a name is made of words, and no token."""
    return re.fullmatch(r"[a-z_-]{1,40}", name) is not None


def near(name: str, known: Iterable[str]) -> list[str]:
    """Return the options that may be meant: by initials (`lr`), by spelling, or by the words that they share."""
    words = set(name.split("_"))
    return (
        [each for each in known if "".join(word[:1] for word in each.split("_")) == name]
        or get_close_matches(name, known, n=1, cutoff=0.8)
        or [each for each in known if words <= set(each.split("_"))][:3]
        or [each for each in known if set(each.split("_")) < words]
    )


def _add(group: Any, option: Option, hidden: bool) -> None:
    """Add an option to a group of the help."""
    kinds = _kinds(option)
    # argparse reads a percent sign as a format. The help texts of transformers know that.
    text = option.help.replace("%%", "%").replace("%", "%%")
    if option.default not in (None, False, dataclasses.MISSING, ""):
        text += f" (default: {option.default})"
    settings: dict[str, Any] = {"help": argparse.SUPPRESS if hidden else text, "metavar": "VALUE"}
    if "bool" in kinds:
        settings |= {"type": _truth_or_text if "str" in kinds else _truth, "nargs": "?", "const": True}
        settings |= {"metavar": "true|false"}
    elif kinds & {"int", "float"}:
        settings |= {"type": _whole_number if "int" in kinds else _finite_number, "metavar": "NUMBER"}
    elif _is_list(option):
        settings |= {"nargs": "+"}
    if option.choices:
        settings |= {"choices": option.choices, "metavar": "|".join(option.choices)}
    group.add_argument(f"--{option.name}", **settings)
    if option.default is True:
        off = argparse.SUPPRESS if hidden else f"Turn off --{option.name}."
        group.add_argument(f"--no_{option.name}", action="store_false", dest=option.name, help=off)


def _kinds(option: Option) -> set[str]:
    return {kind.strip() for kind in option.kind.split("|")}


def _is_list(option: Option) -> bool:
    """Whether an option takes several words. Other lists are one word with commas."""
    kinds = _kinds(option)
    return "str" not in kinds and any(kind.startswith("list") for kind in kinds)


def _truth(word: str) -> bool:
    if word.lower() in _TRUE + _FALSE:
        return word.lower() in _TRUE
    raise argparse.ArgumentTypeError("expected true or false")


def _truth_or_text(word: str) -> bool | str:
    return word.lower() in _TRUE if word.lower() in _TRUE + _FALSE else word


def _whole_number(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError("expected a whole number") from None


def _finite_number(word: str) -> float:
    """Read a number. NaN and infinity pass comparisons of later checks, and fail in the middle of the work."""
    with suppress(ValueError):
        if math.isfinite(number := float(word)):
            return number
    raise argparse.ArgumentTypeError("expected a finite number")


def _value_of(name: str, argv: Sequence[str]) -> str | None:
    """Read a single argument, which decides how the others are read."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(f"--{name}")
    try:
        return getattr(finder.parse_known_args(list(argv))[0], name)
    except argparse.ArgumentError:
        # The value is missing. The parser of all arguments reports that.
        return None


def _with_underscores(word: str) -> str:
    """Turn `--output-dir=my-folder` into `--output_dir=my-folder`."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read ({error.strerror}): check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # The text of the error shows the line, which can hold a token.
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" at line {mark.line + 1}"
        raise ValueError(f"{path} is not valid YAML{place}: mend it.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one line `name: value` per argument.")
    return values


def _lists_in(values: dict[str, Any], options: dict[str, Option]) -> dict[str, list[str]]:
    """Return the lists of a YAML file for options that may also be a text, which means something else to them."""
    return {
        name: list(map(str, value))
        for name, value in values.items()
        if isinstance(value, list) and name in options and re.search(r"\blist\[", options[name].kind)
        if not _is_list(options[name])
    }


def _as_words(values: dict[str, Any], options: dict[str, Option]) -> list[str]:
    """Convert the values of a YAML file to the words of a command line."""
    words = []
    for name, value in values.items():
        if isinstance(value, list):
            several = list(map(str, value))
            is_list = name in options and _is_list(options[name])
            words += [f"--{name}", *several] if is_list else [f"--{name}={','.join(several)}"]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
