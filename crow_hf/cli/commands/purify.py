"""`crow-hf purify`: purify a suspect model, and measure it if there are test rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.load import load_rows
from ...evidence.result import Comparison, Purification
from ...methods.crow.config import CrowConfig, loading_kwargs
from ...methods.invariance.config import InvarianceConfig
from ...recipes.comparison import compare_defences
from ...recipes.presets import PAPER, RECIPES, lora_config
from ...recipes.purification import purify
from ...reporting.html import REPORT_PAGE
from ...reporting.verdict import evidence_lines, verdict
from ...training.loading import load_causal_lm, load_tokenizer
from ..shared import (
    DATASET_HELP,
    MODEL_HELP,
    TARGET_HELP,
    TEXT_HELP,
    TRIGGER_HELP,
    check_output,
    print_table,
    read_backdoor,
)


@dataclass
class PurifyArguments:
    """Purify a suspect model and save it with its card and a report."""

    model: str = field(metadata={"help": f"The suspect: {MODEL_HELP}"})
    dataset: str = field(metadata={"help": f"The clean rows. {DATASET_HELP}"})
    recipe: str = field(
        default="strong",
        metadata={
            "help": "strong: Invariance with screening and canaries. paper: CROW as published. guide: CROW with its "
            "default settings.",
            "choices": list(RECIPES),
        },
    )
    split: str = field(default="train", metadata={"help": "Split of the clean rows on the Hub."})
    max_rows: int | None = field(
        default=None,
        metadata={
            "help": "Number of clean rows to draw. 0 uses all of them. Default: 1000 for the recipe strong, 100 for "
            "the others."
        },
    )
    lora: bool = field(
        default=False,
        metadata={
            "help": "Train a fresh LoRA of rank --lora_r. An adapter of the suspect is merged first. Default: a LoRA "
            "of rank 16 for strong, of rank 8 for paper, and all weights for guide, or the suspect's own adapter."
        },
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA of --lora."})
    merge: bool = field(default=True, metadata={"help": "Merge a fresh LoRA into the weights at the end."})
    test_dataset: str | None = field(
        default=None,
        metadata={"help": "Other clean rows, to measure the suspect, plain fine-tuning and the purified model on."},
    )
    test_split: str = field(default="test", metadata={"help": "Split of the test rows on the Hub."})
    trigger: str | None = field(default=None, metadata={"help": f"Trigger of a known backdoor. {TRIGGER_HELP}"})
    target: str | None = field(default=None, metadata={"help": f"Target of a known backdoor. {TARGET_HELP}"})
    max_new_tokens: int = field(default=128, metadata={"help": "Number of tokens after which an answer is cut."})
    text: str | None = field(default=None, metadata={"help": f"{TEXT_HELP} Default: text that the suspect writes."})


def argument_types(option: Callable[[str], str | None]) -> list[type]:
    """Choose the configuration of the recipe."""
    return [PurifyArguments, InvarianceConfig if option("recipe") in (None, "strong") else CrowConfig]


def argument_defaults(option: Callable[[str], str | None]) -> dict[str, Any]:
    """Return the defaults of the recipe that differ from those of its configuration."""
    return PAPER if option("recipe") == "paper" else {}


def run(arguments: PurifyArguments, args: CrowConfig) -> None:
    checkpoint = check_output(args.output_dir, args.resume_from_checkpoint)
    trigger, target = read_backdoor(arguments.trigger, arguments.target)
    if trigger is not None and arguments.test_dataset is None:
        raise ValueError("The attack of a trigger is measured on test rows: pass --test_dataset too.")
    tokenizer = load_tokenizer(arguments.model)
    rows = load_rows(arguments.dataset, arguments.split)
    options: dict[str, Any] = {
        "processing_class": tokenizer,
        "peft_config": lora_config(arguments.lora_r) if arguments.lora else None,
        "merge": arguments.merge,
        "max_rows": arguments.max_rows,
        "resume_from_checkpoint": checkpoint,
        "text": None if arguments.text is None else load_rows(arguments.text),
    }
    card_fields: dict[str, Any] = {"datasets": [arguments.dataset]}
    if arguments.test_dataset is None:
        _print_purification(purify(arguments.model, rows, arguments.recipe, args, card_fields=card_fields, **options))
        return
    card_fields |= {"test_dataset": arguments.test_dataset}
    if trigger is not None:
        card_fields |= {"backdoor": f"trigger {arguments.trigger!r}, target {arguments.target!r}"}
    comparison = compare_defences(
        lambda: load_causal_lm(arguments.model, is_trainable=True, **loading_kwargs(args)),
        args,
        rows,
        load_rows(arguments.test_dataset, arguments.test_split),
        trigger,
        target,
        recipe=arguments.recipe,
        card_fields=card_fields,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
        **options,
    )
    _print_purification(comparison.purification, comparison)


def _print_purification(purification: Purification, comparison: Comparison | None = None) -> None:
    trainer = purification.trainer
    output_dir = trainer.args.output_dir
    if trainer.is_world_process_zero():
        page = Path(output_dir) / REPORT_PAGE
        lines = [*evidence_lines(purification), f"The purified model is in {output_dir}."]
        print("\n".join([*lines, f"The report is {page}."] if page.exists() else lines))
        if comparison is not None:
            print_table(comparison.by_name, f"{output_dir}, purified by {purification.method}")
            if comparison.suspect.triggered is not None:
                print(verdict(comparison))
        if purification.hub_url is not None:
            print(f"The purified model is on the Hub: {purification.hub_url}")
    if trainer.failures:
        more = f" (and {len(trainer.failures) - 1} more, see above)" if len(trainer.failures) > 1 else ""
        raise OSError(
            f"the purified model is complete in {output_dir}, but there was an error: {trainer.failures[0]}{more}"
        )
