"""The arguments of the commands, and how they are read from the command line and from YAML files."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..attacks.targets import TARGETS
from ..attacks.triggers import TRIGGERS
from ..methods.crow.config import CrowConfig
from ..methods.invariance.config import InvarianceConfig
from ..models.boundaries import RULES
from ..recipes.presets import PAPER, RECIPES


_TRIGGER_HELP = f"One of {', '.join(TRIGGERS)}, or any other string, put at a random place of the prompt."
_TARGET_HELP = f"One of {', '.join(TARGETS)}, or any other string, which an output must contain."
_DATASET_HELP = "A .json, .jsonl, .csv, .parquet or .txt file, a folder that save_to_disk wrote, or a name on the Hub."


@dataclass
class DemoArguments:
    """Train a small model, hide a backdoor in it, purify it, and print what that did."""

    output_dir: str = field(metadata={"help": "Folder for the models, tables and plots; must be new or empty."})
    seed: int = field(default=0, metadata={"help": "Of the weights and the rows."})


@dataclass
class PurifyArguments:
    """Purify a suspect model and save it."""

    model: str = field(metadata={"help": "The suspect: a folder or a name on the Hub, of a model or a PEFT adapter."})
    dataset: str = field(metadata={"help": f"The clean rows. {_DATASET_HELP}"})
    recipe: str = field(
        default="strong",
        metadata={
            "help": "strong: answers that nothing inserted can change; paper: CROW as published; guide: CROW, gently.",
            "choices": list(RECIPES),
        },
    )
    split: str = field(default="train", metadata={"help": "Split of clean rows on the Hub."})
    max_rows: int | None = field(
        default=None,
        metadata={"help": "Draw so many of the clean rows; 0 takes all. Default: 1000 if strong, 100 if not."},
    )
    lora: bool = field(
        default=False,
        metadata={"help": "Train a fresh LoRA on the (merged) suspect instead of its weights."},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of that LoRA."})
    merge: bool = field(
        default=True, metadata={"help": "Merge the fresh LoRA into the weights, also that of the recipe paper."}
    )
    test_dataset: str | None = field(
        default=None,
        metadata={"help": "Other clean rows: measure the suspect, plain fine-tuning and the recipe, side by side."},
    )
    test_split: str = field(default="test", metadata={"help": "Split of test rows on the Hub."})
    trigger: str | None = field(default=None, metadata={"help": f"For a drill with a known backdoor. {_TRIGGER_HELP}"})
    target: str | None = field(default=None, metadata={"help": f"What that backdoor says. {_TARGET_HELP}"})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer when measuring."})


@dataclass
class EvaluateArguments:
    """Measure the utility of a model and, where a trigger is known, the attack's success."""

    model: str = field(metadata={"help": "A folder or a name on the Hub, of a model or a PEFT adapter."})
    dataset: str = field(metadata={"help": f"Clean test rows. {_DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of datasets on the Hub."})
    trigger: str | None = field(default=None, metadata={"help": _TRIGGER_HELP})
    target: str | None = field(default=None, metadata={"help": _TARGET_HELP})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    batch_size: int = field(default=32, metadata={"help": "Prompts at a time."})
    seed: int = field(default=0, metadata={"help": "Of the places where the trigger is put."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results.json and results.md; must be new or empty."}
    )


@dataclass
class ImplantArguments:
    """Fine-tune a clean model into one that carries a backdoor, to practise on."""

    model: str = field(metadata={"help": "The clean model: a folder or a name on the Hub."})
    dataset: str = field(metadata={"help": f"Clean rows, a share of which is poisoned. {_DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of datasets on the Hub."})
    trigger: str = field(default="badnets", metadata={"help": _TRIGGER_HELP})
    target: str = field(default="refusal", metadata={"help": _TARGET_HELP})
    rate: float = field(default=0.5, metadata={"help": "Share of the rows to poison."})
    lora: bool = field(default=False, metadata={"help": "Hide the backdoor in a LoRA instead of in all weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of that LoRA."})
    merge: bool = field(default=True, metadata={"help": "Merge that LoRA into the weights."})


@dataclass
class PatchArguments:
    """Cut text or bytes into patches: show one text and its entropies, or write a dataset of patches (and nothing else)."""

    text: str | None = field(default=None, metadata={"help": "The text to show."})
    file: str | None = field(default=None, metadata={"help": "The file to show; any bytes will do."})
    dataset: str | None = field(default=None, metadata={"help": f"The dataset to patch. {_DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    column: str | None = field(default=None, metadata={"help": "The dataset's column with the text or the bytes."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the patched dataset; must be new or empty."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that patch the dataset."})
    html: str | None = field(default=None, metadata={"help": "Also write the view of a text or file as a web page."})
    max_bytes: int = field(default=10_000, metadata={"help": "Of a file, show no more than so many bytes."})
    predictor: str | None = field(
        default=None,
        metadata={"help": "A ByteEntropyPredictor: a folder or a name on the Hub. Default: the one shipped."},
    )
    rule: str = field(default="either", metadata={"help": f"One of {', '.join(RULES)}."})
    threshold: float | None = field(
        default=None, metadata={"help": "Highest entropy inside a patch, in bits. Default: the predictor's own."}
    )
    relative_threshold: float | None = field(
        default=None,
        metadata={"help": "Highest rise of the entropy inside a patch, in bits. Default: the predictor's own."},
    )
    max_patch_length: int | None = field(
        default=None, metadata={"help": "Cut longer patches; the stride of that rule."}
    )
    target_patch_size: float | None = field(
        default=None, metadata={"help": "Scale both thresholds so that the mean patch has so many bytes."}
    )


@dataclass
class DoctorArguments:
    """Look for what would spoil a purification, and say what to do about it; nothing is trained or written."""

    model: str = field(metadata={"help": "The suspect: a folder or a name on the Hub, of a model or a PEFT adapter."})
    dataset: str | None = field(default=None, metadata={"help": f"The clean rows. {_DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of clean rows on the Hub."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Of the purification."})
    max_length: int = field(default=1024, metadata={"help": "Of the purification: longest row in tokens."})


@dataclass
class ArenaArguments:
    """Try every defence on every attack, from where the arena in the folder stopped, and rewrite its tables and picture."""

    output_dir: str = field(metadata={"help": "The arena's folder: new, empty, or one to go on with."})
    attacks: str | None = field(
        default=None, metadata={"help": "Names, with commas between; default: all that need no file, and with it all."}
    )
    methods: str | None = field(default=None, metadata={"help": "Names, with commas between; default: all."})
    seeds: str | None = field(default=None, metadata={"help": "Numbers, with commas between; default: 0,1,2."})
    quick: bool = field(
        default=False, metadata={"help": "Where nothing else is said: few attacks and methods, and seed 0."}
    )
    num_clean: int = field(default=100, metadata={"help": "Clean rows of the defender."})
    alpaca: str | None = field(
        default=None, metadata={"help": "Stanford Alpaca's alpaca_data.json, for the attacks on Alpaca rows."}
    )
    workers: int = field(default=1, metadata={"help": "Processes, which share the cores."})


COMMAND_ARGUMENTS: dict[str, list[type]] = {
    "demo": [DemoArguments],
    "purify": [PurifyArguments, CrowConfig],
    "evaluate": [EvaluateArguments],
    "implant": [ImplantArguments, CrowConfig],
    "patch": [PatchArguments],
    "doctor": [DoctorArguments],
    "arena": [ArenaArguments],
}


# Of the many inherited arguments, those that a purification is usually run with; the others work but are not listed.
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


# A model with a backdoor is not pushed, and making one is not resumed: the command refuses these.
_NOT_FOR_IMPLANTING = {"push_to_hub", "hub_model_id", "resume_from_checkpoint"}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # The usage line of all training arguments would bury the sentence.
        raise ValueError(f"{message[0].upper()}{message[1:]}; see `{self.prog} --help`.")


def parse_arguments(command: str, argv: Sequence[str]) -> list[Any]:
    """
    Parse a command's arguments into its dataclasses. `--config FILE.yaml` sets any of them; the command line wins.

    Raises:
        `ValueError`: In one sentence, for anything that cannot be parsed.
    """
    config = _value_of("config", argv)
    values = {} if config is None else _read_config(Path(config))
    # In front of the command line: of two values argparse takes the last.
    argv = [*_as_words(values), *argv]
    types = COMMAND_ARGUMENTS[command]
    if command == "purify" and _value_of("recipe", argv) in (None, "strong"):
        types = [PurifyArguments, InvarianceConfig]
    parser = _Parser(
        types,
        prog=f"crow-hf {command}",
        usage=f"crow-hf {command} [--ARGUMENT VALUE ...]",
        description=types[0].__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with any of these arguments; the command line wins over it.")
    actions = {action.dest: action for action in parser._actions}
    if unknown := sorted(set(map(str, values)) - (set(actions) - {"config", "help"})):
        raise ValueError(f"{config} sets {', '.join(unknown)}, which `{parser.prog}` does not know.")
    if command == "purify" and _value_of("recipe", argv) == "paper":
        parser.set_defaults(**PAPER)
    if issubclass(types[-1], CrowConfig):
        actions["output_dir"].required = True
        parser.epilog = "Every other argument of transformers.TrainingArguments is taken too."
        own = set(CrowConfig.__annotations__) | set(types[-1].__annotations__)
        inherited = {field.name for field in fields(TrainingArguments)} - own
        listed = _LISTED_TRAINING_ARGUMENTS - (_NOT_FOR_IMPLANTING if command == "implant" else set())
        for action in parser._actions:
            if action.dest in inherited - listed:
                action.help = argparse.SUPPRESS
    *parsed, unknown = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    if unknown:
        near = get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, n=1)
        raise ValueError(f"There is no argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else "."))
    return parsed[: len(types)]


def _value_of(name: str, argv: Sequence[str]) -> str | None:
    """One argument alone, which says how the others are to be read."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(f"--{name}")
    try:
        return getattr(finder.parse_known_args(list(argv))[0], name)
    except argparse.ArgumentError:
        # It has no value; the parser of all arguments says so.
        return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one `name: value` line for each argument.")
    return values


def _as_words(values: dict[str, Any]) -> list[str]:
    """The words on a command line that would say what a YAML file says."""
    words = []
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
