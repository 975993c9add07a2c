"""The command line: `crow-hf demo | purify | evaluate | implant | patch | doctor | arena`."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedModel

from .. import __version__
from ..attacks.implanting import implant
from ..attacks.targets import get_target
from ..attacks.triggers import get_trigger
from ..data.load import load_rows
from ..evaluation.harness import evaluate_model
from ..methods.crow.config import CrowConfig
from ..patching.calibration import calibrate_threshold
from ..patching.patcher import EntropyPatcher, load_entropy_predictor
from ..patching.view import render_terminal, summarize, write_html
from ..recipes.checkup import doctor as examine
from ..recipes.comparison import compare_defences
from ..recipes.purification import purify as run_recipe
from ..reporting.html import REPORT_PAGE
from ..reporting.tables import comparison_table, write_comparison
from ..reporting.verdict import evidence, verdict
from ..training.checkpoints import check_room, checkpoint_to_resume, writing
from ..training.hub import create_repository, push_folder
from ..training.loading import is_quantized, load_causal_lm, load_tokenizer
from ..training.sharding import in_shards
from .arguments import (
    ArenaArguments,
    DemoArguments,
    DoctorArguments,
    EvaluateArguments,
    ImplantArguments,
    PatchArguments,
    PurifyArguments,
    parse_arguments,
)


def demo(arguments: DemoArguments) -> None:
    from ..demo import run_demo

    _check_output(arguments.output_dir)
    evaluations = run_demo(arguments.output_dir, arguments.seed)
    _print_table(evaluations, "BadNets refusal backdoor in a byte-latent model")
    print(
        f"Models and plots are in {arguments.output_dir}; the report is {arguments.output_dir}/purified/report.html."
    )
    print(verdict(evaluations))


_MAX_ROWS = {"strong": 1000, "paper": 100, "guide": 100}


def purify(arguments: PurifyArguments, args: CrowConfig) -> None:
    resume = _check_output(args.output_dir, args.resume_from_checkpoint)
    trigger, target = _backdoor(arguments.trigger, arguments.target)
    if trigger is not None and arguments.test_dataset is None:
        raise ValueError("A trigger is measured on test rows: pass --test_dataset too.")
    if in_shards(args) and (arguments.lora or arguments.recipe == "paper"):
        raise ValueError(
            "An adapter cannot be merged into weights that are in shards (FSDP, ZeRO-3): train all weights by --recipe strong or guide, "
            "or the adapter in a script with `CrowTrainer`, and save it as it is."
        )
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
        if not (arguments.lora and isinstance(model, PeftModel)):
            return model
        if is_quantized(model):
            raise ValueError("An adapter is not merged into quantized weights: leave out --lora to train it further.")
        return model.merge_and_unload(safe_merge=True)

    suspect = load_suspect()
    check_room(args.output_dir, suspect)
    if args.push_to_hub and args.process_index == 0:
        args.hub_model_id = create_repository(args)
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
    # Merged into weights of 4 or 8 bits, most of what was learned would be rounded away: there the adapter is the result.
    is_fresh = isinstance(trainer.model, PeftModel) and not isinstance(suspect, PeftModel)
    if arguments.merge and is_fresh and not is_quantized(suspect):
        trainer.model = trainer.model.merge_and_unload(safe_merge=True)
    # Pushed below: what was measured is to be told and kept before that.
    trainer.save_model(_internal_call=True)
    evaluations = None if arguments.test_dataset is None else comparison.evaluations
    with writing("README.md", args.output_dir, "the purified model is whole; make room before it is pushed"):
        trainer.create_model_card(
            purification=purification,
            evaluations=evaluations,
            backdoor=trigger and f"trigger {arguments.trigger!r}, target {arguments.target!r}",
            settings={name: getattr(arguments, name) for name in ("max_rows", "lora", "lora_r", "merge")},
            finetuned_from=arguments.model,
            datasets=[arguments.dataset],
            test_dataset=arguments.test_dataset,
        )
    if trainer.is_world_process_zero():
        page = Path(args.output_dir) / REPORT_PAGE
        shown = [f"{page} shows what is known of it."] if page.exists() else []
        print("\n".join([*evidence(purification), f"The purified model is in {args.output_dir}.", *shown]))
    if arguments.test_dataset is not None:
        _print_table(comparison.evaluations, f"{arguments.model}, purified with {len(rows)} rows")
    if trigger is not None:
        print(verdict(comparison.evaluations))
    if args.push_to_hub and trainer.is_world_process_zero():
        settings = {"token": args.hub_token, "private": args.hub_private_repo, "revision": args.hub_revision}
        commit = push_folder(args.output_dir, args.hub_model_id, **settings)
        print(f"The purified model is on the Hub: {commit.repo_url}")
    if trainer.failures:
        more = f" (and {len(trainer.failures) - 1} more, see above)" if len(trainer.failures) > 1 else ""
        raise OSError(
            f"the purified model is whole in {args.output_dir}, but not all went well: {trainer.failures[0]}{more}"
        )


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
    if args.resume_from_checkpoint:
        raise ValueError("An implantation is not resumed: leave out --resume_from_checkpoint.")
    if args.push_to_hub:
        raise ValueError(
            "A model with a backdoor is not pushed: leave out --push_to_hub, and if others are to practise on it too, say "
            "so in its card and use `hf upload`."
        )
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
    with writing("The model", args.output_dir, "make room, and start again in another --output_dir"):
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


def doctor(arguments: DoctorArguments) -> None:
    rows = None if arguments.dataset is None else load_rows(arguments.dataset, arguments.split)
    findings = examine(arguments.model, rows, learning_rate=arguments.learning_rate, max_length=arguments.max_length)
    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table("", "", Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for finding in findings:
        lines = filter(None, [finding.found, finding.remedy and f"-> {finding.remedy}"])
        table.add_row(Text(finding.level, colours[finding.level]), Text(finding.name), Text("\n".join(lines)))
    Console().print(table)
    if problems := [finding.name for finding in findings if finding.level == "problem"]:
        raise ValueError(f"there is a problem with {', '.join(problems)}: see above for the remedy.")


def arena(arguments: ArenaArguments) -> None:
    from ..arena.attacks import ATTACKS, QUICK
    from ..arena.defences import METHODS, QUICK_METHODS
    from ..arena.run import run_arena
    from ..arena.subjects import SUBJECTS

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


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "purify": purify,
    "evaluate": evaluate,
    "implant": implant_command,
    "patch": patch,
    "doctor": doctor,
    "arena": arena,
}


def _check_output(output_dir: str, resume: str | None = None) -> str | None:
    """Refuse a folder that holds something, unless a run in it is resumed; returns the checkpoint to resume from."""
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not resume:
        raise ValueError(f"{output_dir} is not empty: choose another --output_dir, or remove what is there.")
    check_room(output_dir)
    if resume in (None, "True", "true", "last"):
        return checkpoint_to_resume(folder, resume and True)
    if folder.resolve() not in Path(resume).resolve().parents:
        raise ValueError(f"{resume} is no checkpoint of {output_dir}: resume a run in its own --output_dir.")
    return checkpoint_to_resume(folder, resume)


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
        COMMANDS[command](*parse_arguments(command, argv[1:]))
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"crow-hf {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"crow-hf {command}: {str(stop) or 'Stopped by Ctrl-C; nothing more was written.'}", file=sys.stderr)
        # As a shell says it of a program that ended at Ctrl-C.
        return 130
    return 0
