"""Reading the arguments of the commands from the command line and from YAML files."""

import argparse
import json
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..methods.crow.config import CrowConfig


COMMANDS = ("demo", "purify", "evaluate", "implant", "patch", "doctor", "arena")

# The inherited arguments that a purification is usually run with. The others work too, but `--help` does not list
# them.
_LISTED_TRAINING_ARGUMENTS = {
    "output_dir",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
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


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # A usage line with all training arguments would hide the message.
        raise ValueError(f"{message[0].upper()}{message[1:]}; see `{self.prog} --help`.")


def command_module(command: str) -> ModuleType:
    """
    Import the module of a command.

    It has a function `run`, and either `ARGUMENTS`, the dataclasses of its arguments, or functions `argument_types`
    and
    `argument_defaults` that choose them by the value of another argument. `NOT_LISTED` names arguments that its help
    leaves out.
    """
    return import_module(f"{__package__}.commands.{command}")


def parse_arguments(command: str, argv: Sequence[str]) -> list[Any]:
    """
    Parse the arguments of a command into its dataclasses.

    `--config FILE.yaml` can set any of them. The command line takes precedence.

    Raises:
        `ValueError`: If an argument is unknown, missing or malformed.
    """
    module = command_module(command)
    config = _value_of("config", argv)
    values = {} if config is None else _read_config(Path(config))
    # They stand before the command line, because argparse takes the last of two values.
    argv = [*_as_words(values), *argv]
    option = partial(_value_of, argv=argv)
    types = module.argument_types(option) if hasattr(module, "argument_types") else module.ARGUMENTS
    parser = _Parser(
        types,
        prog=f"crow-hf {command}",
        usage=f"crow-hf {command} [--ARGUMENT VALUE ...]",
        description=types[0].__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file that sets any of these arguments. The command line overrides it.")
    for action in parser._actions:
        for negated in (name for name in action.option_strings if name.startswith("--no_")):
            # HfArgumentParser gives it the help text of the option that it turns off.
            action.help = f"Turn off --{negated.removeprefix('--no_')}."
    actions = {action.dest: action for action in parser._actions}
    if unknown := sorted(set(map(str, values)) - (set(actions) - {"config", "help"})):
        raise ValueError(f"{config} sets {', '.join(unknown)}, which `{parser.prog}` does not know.")
    if hasattr(module, "argument_defaults"):
        parser.set_defaults(**module.argument_defaults(option))
    if issubclass(types[-1], CrowConfig):
        actions["output_dir"].required = True
        parser.epilog = "All other arguments of transformers.TrainingArguments work too."
        _shorten_help(parser, types[-1], getattr(module, "NOT_LISTED", frozenset()))
    *parsed, unknown = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    if unknown:
        near = get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, n=1)
        raise ValueError(f"There is no argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else "."))
    return parsed[: len(types)]


def _shorten_help(parser: argparse.ArgumentParser, config: type, not_listed: frozenset[str]) -> None:
    """Leave most of the inherited training arguments, and those that the command does not list, out of the help."""
    own = set(CrowConfig.__annotations__) | set(config.__annotations__)
    inherited = set(TrainingArguments.__dataclass_fields__) - own
    for action in parser._actions:
        if action.dest in (inherited - _LISTED_TRAINING_ARGUMENTS) | not_listed:
            action.help = argparse.SUPPRESS


def _value_of(name: str, argv: Sequence[str]) -> str | None:
    """Read a single argument, which decides how the others are read."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(f"--{name}")
    try:
        return getattr(finder.parse_known_args(list(argv))[0], name)
    except argparse.ArgumentError:
        # The value is missing. The parser of all arguments reports that.
        return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read ({error.strerror}): check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one line `name: value` per argument.")
    return values


def _as_words(values: dict[str, Any]) -> list[str]:
    """Convert the values of a YAML file to the words of a command line."""
    words = []
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
