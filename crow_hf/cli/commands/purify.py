"""`crow-hf purify`: purify a suspect model, and measure it if there are test rows."""

from pathlib import Path
from typing import Any

from ...attacks.targets import BaseTarget
from ...attacks.triggers import BaseTrigger
from ...data.load import load_rows
from ...data.visible import printable
from ...evidence.result import Comparison, Purification
from ...methods.crow.config import CrowConfig, loading_kwargs
from ...methods.crow.trainer import CrowTrainer
from ...methods.registry import load_defences
from ...recipes.comparison import compare_defences
from ...recipes.presets import lora_config
from ...recipes.purification import purify
from ...recipes.scanning import found_backdoor
from ...reporting.gate import Policy
from ...reporting.report_file import REPORT_PAGE
from ...reporting.verdict import Verdict, evidence_lines, verdict
from ...training.loading import load_causal_lm, load_tokenizer
from ..arguments import split_names
from ..options import GateArguments, PurifyArguments
from ..shared import check_output, print_table, read_backdoor
from . import gate


def run(arguments: PurifyArguments, args: CrowConfig) -> int:
    # A policy that cannot be read is no reason to lose a run.
    if arguments.policy is not None:
        Policy.read(arguments.policy)
    trainer = _purify(arguments, args)
    if arguments.policy is None or not trainer.is_world_process_zero():
        return 0
    return gate.run(GateArguments(report=args.output_dir, policy=arguments.policy))


def _purify(arguments: PurifyArguments, args: CrowConfig) -> CrowTrainer:
    checkpoint = check_output(args.output_dir, args.resume_from_checkpoint)
    trigger, target, described = _read_backdoor(arguments)
    if trigger is not None and arguments.test_dataset is None:
        raise ValueError("The attack of a trigger is measured on test rows: pass --test_dataset too.")
    if arguments.defences is not None and arguments.test_dataset is None:
        raise ValueError("Defences are compared on test rows: pass --test_dataset too.")
    if arguments.plugin is not None:
        load_defences(arguments.plugin)
    tokenizer = load_tokenizer(arguments.model)
    rows = load_rows(arguments.dataset, arguments.split)
    options: dict[str, Any] = {
        "processing_class": tokenizer,
        "peft_config": lora_config(arguments.lora_r) if arguments.lora else None,
        "merge": arguments.merge,
        "max_rows": arguments.max_rows,
        "resume_from_checkpoint": checkpoint,
        "text": None if arguments.text is None else load_rows(arguments.text),
        "quantization": arguments.quantization,
    }
    card_fields: dict[str, Any] = {"datasets": [arguments.dataset]}
    if arguments.test_dataset is None:
        purification = purify(arguments.model, rows, arguments.recipe, args, card_fields=card_fields, **options)
        _print_purification(purification, Comparison.on_held_out_rows(purification))
        return purification.trainer
    card_fields |= {"test_dataset": arguments.test_dataset}
    if trigger is not None:
        card_fields |= {"backdoor": described}
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
        defences=split_names(arguments.defences),
        **options,
    )
    _print_purification(comparison.purification, comparison)
    return comparison.purification.trainer


def _read_backdoor(arguments: PurifyArguments) -> tuple[BaseTrigger | None, BaseTarget | None, str]:
    """Return the trigger and the target to measure, and a description of both for the card."""
    trigger, target = read_backdoor(arguments.trigger, arguments.target, arguments.judge, arguments.judge_question)
    if arguments.scan is None:
        decided = f"target {arguments.target!r}" if arguments.judge is None else f"judge {arguments.judge!r}"
        return trigger, target, f"trigger {arguments.trigger!r}, {decided}"
    if trigger is not None:
        raise ValueError("A scan found its own trigger: pass --scan or --trigger.")
    piece, said = found_backdoor(arguments.scan)
    return piece, said, f"trigger {piece.phrases[0]!r}, target {said.text!r}, both found by a scan"


def _print_purification(purification: Purification, comparison: Comparison | None) -> None:
    trainer = purification.trainer
    output_dir = trainer.args.output_dir
    if trainer.is_world_process_zero():
        page = Path(output_dir) / REPORT_PAGE
        lines = [*evidence_lines(purification), f"The purified model is in {output_dir}."]
        print(printable("\n".join([*lines, f"The report is {page}."] if page.exists() else lines)))
        if comparison is not None:
            rows = "test rows" if comparison.control else "held-out rows"
            print_table(comparison.by_name, f"{output_dir}, purified by {purification.method}, on {rows}")
        found = Verdict.of(purification, comparison)
        known = comparison is not None and comparison.suspect.triggered is not None
        said = [verdict(comparison) if known else f"VERDICT: {found.headline}.", *found.next_steps]
        print(printable("\n".join(said)))
        if purification.hub_url is not None:
            print(f"The purified model is on the Hub: {purification.hub_url}")
    if trainer.failures:
        more = f" (and {len(trainer.failures) - 1} more, see above)" if len(trainer.failures) > 1 else ""
        raise OSError(
            f"the purified model is complete in {output_dir}, but there was an error: {trainer.failures[0]}{more}"
        )
