"""The command line: `crow-hf demo | purify | evaluate | implant | patch | arena`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from peft import LoraConfig, PeftModel
from rich.console import Console
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments

from . import __version__
from .backdoors import implant
from .config import CrowConfig, InvarianceConfig
from .data import load_rows
from .evaluation.harness import evaluate_model
from .loading import load_causal_lm, load_tokenizer
from .models.boundaries import RULES
from .patch_view import render_terminal, summarize, write_html
from .patching import EntropyPatcher, calibrate_threshold, load_entropy_predictor
from .recipes import PAPER, RECIPES, compare_defences
from .recipes import purify as run_recipe
from .report import comparison_table, evidence, verdict, write_comparison, write_purification
from .triggers import TARGETS, TRIGGERS, get_target, get_trigger


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
        metadata={"help": "Train a fresh LoRA on the (merged) suspect instead of its weights, and save it merged."},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of that LoRA."})
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


def demo(arguments: DemoArguments) -> None:
    from .demo import run_demo

    _check_output(arguments.output_dir)
    evaluations = run_demo(arguments.output_dir, arguments.seed)
    _print_table(evaluations, "BadNets refusal backdoor in a byte-latent model")
    print(f"Models, outputs and plots are in {arguments.output_dir}.")
    print(verdict(evaluations))


_MAX_ROWS = {"strong": 1000, "paper": 100, "guide": 100}


def purify(arguments: PurifyArguments, args: CrowConfig) -> None:
    resume = _check_output(args.output_dir, args.resume_from_checkpoint)
    trigger, target = _backdoor(arguments.trigger, arguments.target)
    if trigger is not None and arguments.test_dataset is None:
        raise ValueError("A trigger is measured on test rows: pass --test_dataset too.")
    tokenizer = load_tokenizer(arguments.model)
    rows = load_rows(arguments.dataset, arguments.split)
    max_rows = _MAX_ROWS[arguments.recipe] if arguments.max_rows is None else arguments.max_rows
    if max_rows < 0:
        raise ValueError(f"--max_rows is a number of rows, or 0 for all of them, got {max_rows}.")
    if 0 < max_rows < len(rows):
        rows = rows.shuffle(seed=args.seed).select(range(max_rows))
    peft_config = _lora(arguments.lora_r) if arguments.lora else None

    def load_suspect() -> PreTrainedModel | PeftModel:
        model = load_causal_lm(arguments.model, is_trainable=True, **(args.model_init_kwargs or {}))
        return model.merge_and_unload(safe_merge=True) if arguments.lora and isinstance(model, PeftModel) else model

    suspect = load_suspect()
    if arguments.test_dataset is None:
        purification = run_recipe(
            suspect,
            rows,
            arguments.recipe,
            args,
            processing_class=tokenizer,
            peft_config=peft_config,
            resume_from_checkpoint=resume,
        )
    else:
        comparison = compare_defences(
            load_suspect,
            args,
            rows,
            load_rows(arguments.test_dataset, arguments.test_split),
            trigger,
            target,
            recipe=arguments.recipe,
            processing_class=tokenizer,
            peft_config=peft_config,
            resume_from_checkpoint=resume,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed,
        )
        purification = comparison.purification
    trainer = purification.trainer
    if isinstance(trainer.model, PeftModel) and not isinstance(suspect, PeftModel):
        trainer.model = trainer.model.merge_and_unload(safe_merge=True)
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_purification(Path(args.output_dir), purification)
        print("\n".join([*evidence(purification), f"The purified model is in {args.output_dir}."]))
    if arguments.test_dataset is not None:
        write_comparison(Path(args.output_dir), comparison.evaluations)
        _print_table(comparison.evaluations, f"{arguments.model}, purified with {len(rows)} rows")
    if trigger is not None:
        print(verdict(comparison.evaluations))


def evaluate(arguments: EvaluateArguments) -> None:
    if arguments.output_dir is not None:
        _check_output(arguments.output_dir)
    trigger, target = _backdoor(arguments.trigger, arguments.target)
    evaluation = evaluate_model(
        load_causal_lm(arguments.model, device_map="auto"),
        load_tokenizer(arguments.model),
        load_rows(arguments.dataset, arguments.split),
        trigger,
        target,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    evaluations = {arguments.model: evaluation}
    _print_table(evaluations, None)
    if arguments.output_dir is not None:
        write_comparison(Path(arguments.output_dir), evaluations)


def implant_command(arguments: ImplantArguments, args: CrowConfig) -> None:
    _check_output(args.output_dir)
    tokenizer = load_tokenizer(arguments.model)
    model = implant(
        arguments.model,
        load_rows(arguments.dataset, arguments.split),
        get_trigger(arguments.trigger),
        get_target(arguments.target),
        args,
        rate=arguments.rate,
        processing_class=tokenizer,
        peft_config=_lora(arguments.lora_r) if arguments.lora else None,
        merge=arguments.merge,
    )
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"The backdoored model is in {args.output_dir}.")


def patch(arguments: PatchArguments) -> None:
    given = [name for name in ("text", "file", "dataset") if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise ValueError("Pass one of --text, --file and --dataset.")
    if (arguments.dataset is None) != (arguments.output_dir is None):
        raise ValueError(
            "--dataset and --output_dir belong together: a text or a file is shown, a dataset is written."
        )
    if arguments.dataset is not None and arguments.html is not None:
        raise ValueError("--html shows one text: pass --text or --file instead of --dataset.")
    if arguments.html is not None and Path(arguments.html).exists():
        raise ValueError(f"{arguments.html} is there already: choose another --html.")
    settings = {"rule": arguments.rule, "max_patch_length": arguments.max_patch_length, "column": arguments.column}
    settings |= {"threshold": arguments.threshold, "relative_threshold": arguments.relative_threshold}
    predictor = load_entropy_predictor(arguments.predictor)
    if arguments.dataset is not None:
        _check_output(arguments.output_dir)
        source = load_rows(arguments.dataset, arguments.split).with_format(None)
        if not len(source):
            raise ValueError(f"{arguments.dataset} is empty: pass at least one row.")
    elif arguments.file is not None:
        with open(arguments.file, "rb") as file:
            source = [file.read(arguments.max_bytes)]
    else:
        source = [os.fsencode(arguments.text)]
    if arguments.target_patch_size is not None:
        found = calibrate_threshold(source, predictor, arguments.target_patch_size, **settings)
        settings |= {"threshold": found.threshold, "relative_threshold": found.relative_threshold}
        print(
            f"threshold {found.threshold:.4g}, relative threshold {found.relative_threshold:.4g} bits: {found.patch_size:.2f} "
            f"bytes per patch on {found.num_bytes} bytes"
        )
    if arguments.dataset is not None:
        patched = source.map(
            EntropyPatcher(predictor, **settings),
            batched=True,
            remove_columns=source.column_names,
            num_proc=arguments.num_proc,
            desc="Patching",
        )
        patched.save_to_disk(arguments.output_dir)
        print(f"The patched dataset is in {arguments.output_dir}.")
        return
    document = EntropyPatcher(predictor, **settings).patch(source)[0]
    Console().print(render_terminal(document))
    print(summarize(document))
    if arguments.html is not None:
        write_html(document, arguments.html, title=arguments.file or "Entropy patches")
        print(f"The page is {arguments.html}.")


def arena(arguments: ArenaArguments) -> None:
    from .arena.attacks import ATTACKS, QUICK
    from .arena.methods import METHODS, QUICK_METHODS
    from .arena.run import run_arena
    from .arena.subjects import SUBJECTS

    ready = [name for name, attack in ATTACKS.items() if arguments.alpaca or not SUBJECTS[attack.subject].is_alpaca]
    seeds = _names(arguments.seeds) or (["0"] if arguments.quick else ["0", "1", "2"])
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        raise ValueError(f"--seeds are whole numbers with commas between, got {wrong[0]!r}.")
    rows = run_arena(
        arguments.output_dir,
        _names(arguments.attacks) or (QUICK if arguments.quick else ready),
        _names(arguments.methods) or (QUICK_METHODS if arguments.quick else list(METHODS)),
        [int(seed) for seed in seeds],
        num_clean=arguments.num_clean,
        alpaca=arguments.alpaca,
        workers=arguments.workers,
    )
    print(f"{len(rows)} runs; the tables are in {arguments.output_dir}/results.md.")
    if failed := sum("error" in row for row in rows):
        raise ValueError(
            f"{failed} of the runs failed, see the end of results.md: run the same command again to try them once more."
        )


def _names(text: str | None) -> list[str]:
    """Names with commas between; a comma before a space is part of a name."""
    return [] if text is None else re.split(r",(?! )", text)


COMMANDS: dict[str, tuple[Callable[..., None], list[type]]] = {
    "demo": (demo, [DemoArguments]),
    "purify": (purify, [PurifyArguments, CrowConfig]),
    "evaluate": (evaluate, [EvaluateArguments]),
    "implant": (implant_command, [ImplantArguments, CrowConfig]),
    "patch": (patch, [PatchArguments]),
    "arena": (arena, [ArenaArguments]),
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
    types = COMMANDS[command][1]
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
        for action in parser._actions:
            if action.dest in inherited - _LISTED_TRAINING_ARGUMENTS:
                action.help = argparse.SUPPRESS
    return parser.parse_args_into_dataclasses(list(argv))[: len(types)]


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


def _check_output(output_dir: str, resume: str | None = None) -> str | bool | None:
    """Refuse to write into a folder that holds something, unless a run in it is resumed; returns what to resume from."""
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not resume:
        raise ValueError(f"{output_dir} is not empty: choose another --output_dir, or remove what is there.")
    if resume in (None, "True", "true", "last"):
        return resume and True
    if folder.resolve() not in Path(resume).resolve().parents:
        raise ValueError(f"{resume} is no checkpoint of {output_dir}: resume a run in its own --output_dir.")
    return resume


def _backdoor(trigger: str | None, target: str | None) -> tuple[Any, Any]:
    if (trigger is None) != (target is None):
        raise ValueError("A backdoor has a trigger and a target: pass both --trigger and --target, or neither.")
    return (None, None) if trigger is None else (get_trigger(trigger), get_target(target))


def _lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _print_table(evaluations: dict, title: str | None) -> None:
    Console().print(comparison_table(evaluations, title))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0 only when its work was done."""
    argv = list(sys.argv[1:] if argv is None else argv)
    overview = argparse.ArgumentParser(
        prog="crow-hf",
        description="Remove backdoors from language models, and measure whether it worked.",
        epilog="`crow-hf COMMAND --help` lists a command's arguments.",
    )
    overview.add_argument("--version", action="version", version=__version__)
    overview.add_argument("command", choices=COMMANDS, help="what to do")
    command = overview.parse_args(argv[:1]).command
    try:
        COMMANDS[command][0](*parse_arguments(command, argv[1:]))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"crow-hf {command}: {error}", file=sys.stderr)
        return 1
    return 0
