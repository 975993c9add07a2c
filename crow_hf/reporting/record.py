"""What is known of a purification, as `report.json` holds it and `report.html` shows it.

| key | |
|---|---|
| `verdict` | `outcome` in words; `level`: `"good"`, `"mixed"`, `"bad"` or `"unknown"`; `explanation`: sentences |
| `recipe` | one of [`RECIPES`] |
| `model` | `name`, `commit` (of a suspect on the Hub), `architecture`, `parameters`, `trained` (`"all weights"` or `"an adapter"`) |
| `evaluations` | [`Evaluation.to_dict`] by the model's name: suspect, control and last the purified one; `null` without test rows |
| `canaries` | [`Canary.to_dict`] of each, and `outcome` |
| `screening` | `total` rows looked at, and those left out: `suspicious`, pieces by row number; `null` if there was none |
| `samples` | of the first rows `prompt`, `triggered` and `answers`: `model`, `text`, `shows_target`, `is_right` |
| `training` | `steps`, `seconds` and `log`, the Trainer's entries |
| `layer_profile` | `rows` looked at, and of `models` by their names [`LayerProfile`] |
| `patches` | of the sample prompts `input_ids`, `patch_lengths`, `entropies`; `null` unless the model is a Coconut |
| `run` | what it takes to repeat the run: `command`, `finished`, `seed`, `trigger`, `target`, `settings` (those that are not transformers' defaults), `adapter` (the same of PEFT's; `null` without one), `train_dataset` and `test_dataset` (`rows`, `columns`, `sha256`), `versions`, `device`, `processes`, `threads` (of each on the CPU) |

Numbers that are NaN or infinite are `null`. Tokens and passwords are left out.
"""

import hashlib
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from .. import __version__
from ..attacks.targets import BaseTarget
from ..attacks.triggers import BaseTrigger
from ..evaluation.harness import FINE_TUNING, NO_DEFENCE, Evaluation
from ..methods.crow.config import CrowConfig
from ..training.settings import HIDDEN, SECRET, without_secrets
from ..training.sharding import num_parameters
from .tables import percent
from .verdict import (
    CANARY_ADVICE,
    DAMAGED,
    NO_BACKDOOR,
    NOT_REMOVED,
    OF_LITTLE_USE,
    REMOVED,
    WEAKENED,
    canary_outcome,
    outcome,
)


if TYPE_CHECKING:
    from ..evidence.result import Purification

from ..evidence.snapshot import Witness


Record = dict[str, Any]
LEVELS = {
    REMOVED: "good",
    DAMAGED: "mixed",
    OF_LITTLE_USE: "mixed",
    WEAKENED: "bad",
    NOT_REMOVED: "bad",
    NO_BACKDOOR: "unknown",
}
UNKNOWN = "not known whether a backdoor is gone"
CANARY_LIVES = "a backdoor of our own is still there"
_PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate")


def record_of(
    purification: "Purification",
    witness: Witness,
    *,
    model_name: str,
    train_dataset: Dataset | IterableDataset,
    test_dataset: Dataset | None = None,
    evaluations: dict[str, Evaluation] | None = None,
) -> Record:
    """
    Put together what is known of a purification, with the keys of [`crow_hf.run_record`].

    Args:
        purification (`Purification`):
            What was done.
        witness (`Witness`):
            What has looked at the suspect, at the control if there is one, and last at the purified model.
        model_name (`str`):
            The suspect's path or name.
        train_dataset (`Dataset` or `IterableDataset`):
            The clean rows as they were given.
        test_dataset (`Dataset`, *optional*):
            The rows that were measured on.
        evaluations (`dict[str, Evaluation]`, *optional*):
            Of [`compare_defences`].

    Returns:
        `dict`: JSON without NaN can hold it.
    """
    trainer, args, screening = purification.trainer, purification.trainer.args, purification.screening
    log, architecture = trainer.state.log_history, type(base_model_of(purification.model)).__name__
    record = {
        "verdict": _verdict(purification, evaluations),
        "recipe": purification.recipe,
        "model": {
            "name": model_name or architecture,
            "commit": getattr(base_model_of(purification.model).config, "_commit_hash", None),
            "architecture": architecture,
            "parameters": num_parameters(purification.model),
            "trained": "an adapter" if isinstance(purification.model, PeftModel) else "all weights",
        },
        "evaluations": evaluations and {name: evaluation.to_dict() for name, evaluation in evaluations.items()},
        "canaries": [{**canary.to_dict(), "outcome": canary_outcome(canary)} for canary in purification.canaries],
        "screening": screening
        and {"total": len(screening.suspicious) + len(screening.clean), "suspicious": screening.suspicious},
        "samples": witness.samples(),
        "training": {
            "steps": trainer.state.global_step,
            "seconds": next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), None),
            "log": log,
        },
        "layer_profile": {
            "rows": len(witness.rows),
            "models": {name: profile.to_dict() for name, profile in witness.profiles.items()},
        },
        "patches": witness.patches(purification.model),
        "run": {
            "command": _command(sys.argv),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": args.seed,
            "trigger": _described(witness.trigger),
            "target": _described(witness.target),
            "settings": without_secrets(_settings(args)),
            "adapter": _adapter_settings(purification.model),
            "train_dataset": _rows_described(train_dataset),
            "test_dataset": test_dataset and _rows_described(test_dataset),
            "versions": {
                "crow_hf": __version__,
                "python": platform.python_version(),
                **{package: version(package) for package in _PACKAGES},
            },
            "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
            "processes": args.world_size,
            "threads": torch.get_num_threads(),
        },
    }
    return _as_json(record)


def base_model_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _verdict(purification: "Purification", evaluations: dict[str, Evaluation] | None) -> Record:
    """The outcome first, then what it rests on, then what it does not say."""
    outcomes = [canary_outcome(canary) for canary in purification.canaries]
    living = outcomes.count("lives")
    if evaluations is not None and evaluations[NO_DEFENCE].triggered is not None:
        found = outcome(evaluations)
        level, sentences = LEVELS[found], _on_the_trigger(evaluations)
    else:
        found, level = UNKNOWN, "unknown"
        sentences = [
            "No trigger was known, so no attack could be measured: whether this model had a backdoor, and whether it is gone, is "
            "not known."
        ]
        if evaluations is not None:
            sentences.append(_on_utility(evaluations))
    if living:
        found, level = CANARY_LIVES, "bad"
        sentences.append(f"Canaries: {living} of {len(outcomes)} live. {CANARY_ADVICE}")
    elif "died" in outcomes:
        sentences.append(
            f"Canaries: {outcomes.count('died')} of {len(outcomes)} backdoors of our own, which were put into the model first, died. That "
            "proves little: in our trials they were easier to remove than real backdoors."
        )
    elif outcomes:
        sentences.append("Canaries: the model did not learn them, or there are too few rows, so they show nothing.")
    else:
        sentences.append("Canaries: none were put in.")
    return {"outcome": found, "level": level, "explanation": sentences}


def _on_the_trigger(evaluations: dict[str, Evaluation]) -> list[str]:
    before, control, after = evaluations[NO_DEFENCE], evaluations[FINE_TUNING], list(evaluations.values())[-1]
    attack = after.triggered.target
    return [
        f"With the trigger, {percent(before.triggered.target.rate)} of the suspect's answers showed the target; now "
        f"{percent(attack.rate)} do, and at most {percent(attack.high)} with 95 % confidence. Plain fine-tuning on the same rows "
        f"leaves {percent(control.triggered.target.rate)}.",
        _on_utility(evaluations),
        "This is about one backdoor. Others, if there are any, stay unknown.",
    ]


def _on_utility(evaluations: dict[str, Evaluation]) -> str:
    before, after = evaluations[NO_DEFENCE], list(evaluations.values())[-1]
    changes = []
    for kind, first, last in (
        ("clean", before.clean, after.clean),
        ("triggered", before.triggered, after.triggered),
    ):
        if first is not None and first.exact_match is not None:
            changes.append(
                f"{percent(first.exact_match.rate)} before and {percent(last.exact_match.rate)} now if {kind}"
            )
    if not changes:
        return "The test rows have no answers, so what this cost cannot be told."
    bits = f"{before.clean.bits_per_byte:.3f} before and {after.clean.bits_per_byte:.3f} now"
    return f"Right answers: {', '.join(changes)}. Bits per byte of the right answers to clean prompts: {bits}."


def _described(part: BaseTrigger | BaseTarget | None) -> Record | None:
    """A trigger or a target by its kind and those of its settings that are text or numbers."""
    if part is None:
        return None
    settings = {each.name: getattr(part, each.name) for each in fields(part)} if is_dataclass(part) else {}
    return {
        "kind": type(part).__name__,
        **{
            name: _described(value) if is_dataclass(value) else value
            for name, value in settings.items()
            if is_dataclass(value) or isinstance(value, (str, int, float, tuple))
        },
    }


def _settings(args: CrowConfig) -> Record:
    """The arguments that are not transformers' defaults, without those that say where the run was kept and shown."""
    defaults = {each.name: None if each.default is MISSING else each.default for each in fields(TrainingArguments)}
    defaults["accelerator_config"] = AcceleratorConfig().to_dict()

    def is_default(name: str, value: Any) -> bool:
        if name not in defaults:
            return False
        if isinstance(value, dict) and isinstance(defaults[name], dict):
            return all(defaults[name].get(key) == held for key, held in value.items())
        # Left at None, some turn into False or an empty list.
        return value == defaults[name] or not (value or defaults[name])

    kept_out = ("output_dir", "logging_dir", "disable_tqdm", "report_to")
    return {
        name: value for name, value in args.to_dict().items() if name not in kept_out and not is_default(name, value)
    }


def _adapter_settings(model: PreTrainedModel | PeftModel) -> Record | None:
    """Of the adapter that was trained, the settings that are not PEFT's defaults, without where its base was kept."""
    if not isinstance(model, PeftModel):
        return None
    config = model.active_peft_config
    defaults = type(config)().to_dict() | {"base_model_name_or_path": config.base_model_name_or_path}
    changed = {name: value for name, value in config.to_dict().items() if value != defaults.get(name)}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in changed.items()}


def _rows_described(dataset: Dataset | IterableDataset) -> Record:
    """Rows by what they hold: the same on every machine, whatever file they came from. A stream is not read for it."""
    if isinstance(dataset, IterableDataset):
        return {"rows": None, "columns": dataset.column_names, "sha256": None}
    digest = hashlib.sha256()
    for row in dataset.with_format(None):
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return {"rows": len(dataset), "columns": dataset.column_names, "sha256": digest.hexdigest()}


def _command(argv: list[str]) -> str:
    """The command line, with nothing on it that opens a door."""
    program, words = Path(argv[0]), []
    for before, word in pairwise(argv):
        name, equals, value = word.partition("=")
        if before.startswith("-") and SECRET.search(before):
            word = HIDDEN
        elif equals and name.startswith("-"):
            word = f"{name}={HIDDEN if SECRET.search(name) else without_secrets(value)}"
        words.append(without_secrets(word))
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return f"{name} {shlex.join(words)}".rstrip()


def _as_json(value: Any) -> Any:
    """What JSON can hold, as it would be read back: names as keys, lists, and no number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(held) for held in value]
    if isinstance(value, (np.number, torch.Tensor)):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
