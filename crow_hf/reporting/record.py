"""The content of `report.json`: everything that is known of a purification.

| key | content |
|---|---|
| `format` | the version of these keys, see [`FORMAT`] |
| `digest` | a hash of all other content, see [`digest_of`]: a report that was edited has another one |
| `verdict` | `outcome` and `headline`, phrases; `level`; `explanation` and `next_steps`, sentences; see [`Verdict`] |
| `recipe` | one of [`RECIPES`] |
| `method` | the method that the recipe runs: `"CROW"` or `"Invariance"` |
| `model` | `name`, `commit` (on the Hub), `architecture`, `parameters`, `dtype`, `trained` (all or an adapter) |
| `evaluations` | [`Evaluation.to_dict`] of `suspect`, `control`, further models by name, and `purified`, see below |
| `quantized` | the name of the evaluation of the saved model with quantized weights; `null` without one |
| `anti_bad` | the Anti-BAD scores of `suspect`, `control`, ..., `purified`; `null` if no attack was measured |
| `retention` | what the purified model has kept of the suspect, see below; `null` if it was not measured |
| `kept` | share of the suspect's weights that was mixed in at the end |
| `phrases` | what the suspect knows by heart, in quotes; the adversary led to it |
| `dropped_settings` | settings of the suspect that can choose words or run code, which the purified model lacks |
| `chat_template` | sentences on what the chat template could do to prompts, whatever the weights are |
| `last_look` | the saved model: numbers of `prompts` and of `tokens`, `different` answers, `trouble`; may be `null` |
| `canaries` | a list of [`Canary.to_dict`], each with its `outcome` |
| `screening` | `total` rows, `unscreened` row numbers, `suspicious` pieces by row number, `remarks`; or `null` |
| `samples` | `prompt`, `system_length`, `triggered`, and `answers` with `model`, `text`, `shows_target`, `is_right` |
| `rows` | numbers of clean rows: `used`, `screened_out`, `dropped` (no answer fits), `held_out`; `null` for a stream |
| `cost` | `seconds` by phase; `peak_memory` in bytes, of the GPU or of the process |
| `size` | bytes of the weights on disk: `suspect` and `purified`; `null` if they are not known |
| `training` | `steps`, `seconds`, and `log`, the entries of the Trainer |
| `layer_profile` | `rows`, the number of rows; `models`, the [`LayerProfile`] of `suspect`, `control` and `purified` |
| `patches` | `input_ids`, `patch_lengths` and `entropies` of sample prompts; `null` unless the model is a Coconut |
| `files` | SHA-256 hashes by name: of `suspect`, its `base` if it is an adapter, `judge` and `purified`; or `null` |
| `run` | what a repetition needs, see below |
| `failures` | sentences about what could not be written |

Without test rows, `evaluations` are those of `suspect` and `purified` on held-out clean rows, and `null` if there are
none. The `system_length` of a sample is the number of characters that stand before the first words of the user.

`retention` holds `answer_kl` (`null` without answers) and `text_kl` (`null` without running text) in nats per token,
`text_bits_per_byte`, `reference_text_bits_per_byte` (of the suspect), `num_answer_tokens`, `num_text_tokens`,
`text_source` (`"passed"` or `"written by the reference"`, which is the suspect), `text_bits_ratio`, and the upper ends
of 95 % intervals `answer_kl_high`, `text_kl_high` and `text_bits_ratio_high`, see [`Retention`].

`run` holds `command`, `finished`, `seed`, `trigger`, `target`, `settings` (see [`recorded_settings`]), `adapter` (the
PEFT settings that are not defaults; `null` without an adapter), `train_dataset`, `test_dataset` and `held_out` (each
`rows`, `columns`, `sha256`), `versions`, `device`, `processes` and `threads` (CPU threads per process).

Numbers that are NaN or infinite are `null`. Tokens and passwords are left out. `report.schema.json`, beside this
module, is the JSON schema of a report.
"""

import hashlib
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from .. import __version__
from ..attacks.targets import BaseTarget
from ..data.encoding import encode_prompt
from ..data.rows import is_chat, messages_of, prompt_of
from ..evaluation.scores import is_exact_match
from ..evidence.result import Comparison, Purification
from ..evidence.snapshot import SnapshotRows
from ..methods.crow.config import loading_kwargs
from ..models.byte_vocabulary import BYTE_OFFSET
from ..models.modeling_coconut import CoconutForCausalLM
from ..patching.patcher import EntropyPatcher
from ..progress import seconds_by_phase
from ..secrets import HIDDEN, SECRET, without_secrets
from ..training.recorder import base_model_of
from ..training.saves import hub_options
from ..training.settings import recorded_settings
from ..training.sharding import num_parameters
from .cost import peak_memory, size_of_weights
from .provenance import checksums_of_judge, checksums_of_model
from .report_file import FORMAT, Record
from .tables import anti_bad_scores
from .verdict import Verdict, canary_outcome


# Settings of an adapter that PEFT fills in. The name of the base can be a local path.
_FILLED_IN = ("base_model_name_or_path", "peft_type", "peft_version")
_PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate")


def record_of(
    purification: Purification,
    rows: SnapshotRows,
    *,
    model_name: str,
    train_dataset: Dataset | IterableDataset,
    test_dataset: Dataset | None = None,
    held_out: Dataset | None = None,
    comparison: Comparison | None = None,
) -> Record:
    """
    Collect everything that is known of a purification.

    Args:
        purification (`Purification`):
            The purification, with its snapshots.
        rows (`SnapshotRows`):
            The rows of these snapshots.
        model_name (`str`):
            Path or name of the suspect.
        train_dataset (`Dataset` or `IterableDataset`):
            The clean rows as they were passed, without those that were held out.
        test_dataset (`Dataset`, *optional*):
            The rows that the models were evaluated on.
        held_out (`Dataset`, *optional*):
            The held-out clean rows.
        comparison (`Comparison`, *optional*):
            The evaluations, on the test rows or on the held-out rows.

    Returns:
        `dict`: A record with the keys of [`crow_hf.reporting.record`], as JSON can hold it.
    """
    evaluations = {} if comparison is None else comparison.by_role
    options = hub_options(model_name, purification.model, loading_kwargs(purification.trainer.args))
    record = {
        "format": FORMAT,
        # It is known when all else is.
        "digest": None,
        "verdict": Verdict.of(purification, comparison).to_dict(),
        "recipe": purification.recipe,
        "method": purification.method,
        "model": _model(purification, model_name),
        "evaluations": {role: each.to_dict() for role, each in evaluations.items()} or None,
        "quantized": purification.quantized,
        "anti_bad": anti_bad_scores(evaluations, "suspect") or None,
        "retention": purification.retention and purification.retention.to_dict(),
        "kept": purification.kept,
        "phrases": purification.phrases,
        "dropped_settings": purification.dropped_settings,
        "chat_template": purification.chat_template,
        "last_look": purification.last_look and purification.last_look.to_dict(),
        "canaries": [{**canary.to_dict(), "outcome": canary_outcome(canary)} for canary in purification.canaries],
        "screening": _screening(purification),
        "samples": _samples(purification, rows),
        "rows": _rows(purification, train_dataset, held_out),
        "cost": {"seconds": seconds_by_phase(), "peak_memory": peak_memory(purification.trainer.args.device)},
        "size": {"suspect": size_of_weights(model_name, **options), "purified": None},
        "training": _training(purification),
        "layer_profile": {
            "rows": len(rows.rows),
            "models": {role: shot.profile.to_dict() for role, shot in purification.snapshots.items()},
        },
        "patches": _patches(purification.model, rows),
        "files": _files(model_name, purification.model, loading_kwargs(purification.trainer.args), rows.target),
        "run": _run(purification, rows, train_dataset, test_dataset, held_out),
        "failures": [],
    }
    return as_json(record)


def as_json(value: Any) -> Any:
    """
    Convert a value to what JSON can hold, as it would be read back.

    Keys become strings, tuples become lists, numbers that are NaN or infinite become `None`, and other objects become
    text.
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(held) for held in value]
    if isinstance(value, (np.number, torch.Tensor)):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _model(purification: Purification, name: str) -> Record:
    model = purification.model
    base = base_model_of(model)
    architecture = type(base).__name__
    return {
        "name": name or architecture,
        "commit": getattr(base.config, "_commit_hash", None),
        "architecture": architecture,
        "parameters": num_parameters(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "trained": "all weights" if purification.adapter is None else "an adapter",
    }


def _files(
    name: str, model: PreTrainedModel | PeftModel, kwargs: Mapping[str, Any], target: BaseTarget | None
) -> Record:
    """Return the hashes of what the suspect was loaded from. An adapter has a base, with a revision of its own."""
    base = base_model_of(model).name_or_path
    of_base = {each: kwargs[each] for each in ("cache_dir",) if each in kwargs}
    return {
        "suspect": checksums_of_model(name, **hub_options(name, model, kwargs)),
        "base": None if base in ("", name) else checksums_of_model(base, **hub_options(base, model, of_base)),
        "judge": checksums_of_judge(target),
        # It is written later.
        "purified": None,
    }


def _screening(purification: Purification) -> Record | None:
    screening = purification.screening
    if screening is None:
        return None
    return {
        "total": len(screening.suspicious) + len(screening.clean),
        "unscreened": screening.unscreened,
        "suspicious": screening.suspicious,
        "remarks": screening.remarks,
    }


def _rows(purification: Purification, used: Dataset | IterableDataset, held_out: Dataset | None) -> Record | None:
    if isinstance(used, IterableDataset):
        return None
    screened_out = 0 if purification.screening is None else len(purification.screening.suspicious)
    dropped = purification.trainer.num_dropped_rows
    return {
        "used": len(used) - screened_out - dropped,
        "screened_out": screened_out,
        "dropped": dropped,
        "held_out": 0 if held_out is None else len(held_out),
    }


def _training(purification: Purification) -> Record:
    state = purification.trainer.state
    seconds = (entry["train_runtime"] for entry in reversed(state.log_history) if "train_runtime" in entry)
    return {"steps": state.global_step, "seconds": next(seconds, None), "log": state.log_history}


def _samples(purification: Purification, rows: SnapshotRows) -> list[Record]:
    """Return the prompts with the answers of every model. There are none if a prompt fills the context."""
    said = {role: shot.answers for role, shot in purification.snapshots.items() if shot.answers is not None}
    if not said:
        return []
    rights = [prompt.answer for _, prompt in rows.prompts]
    shown = {
        role: None if rows.target is None else rows.target.matches_all(list(zip(answers, rights, strict=True)))
        for role, answers in said.items()
    }
    return [
        {
            "prompt": prompt.prompt,
            "system_length": _system_length(rows, number),
            "triggered": triggered,
            "answers": [
                {
                    "model": role,
                    "text": answers[number],
                    "shows_target": shown[role] and shown[role][number],
                    "is_right": is_exact_match(answers[number], prompt.answer) if prompt.answer else None,
                }
                for role, answers in said.items()
            ],
        }
        for number, (triggered, prompt) in enumerate(rows.prompts)
    ]


def _system_length(rows: SnapshotRows, number: int) -> int:
    """Count the characters of a prompt that a chat template puts before the first words of the user."""
    # The triggered prompts follow the clean ones. A trigger changes nothing before the words of the user.
    clean = [prompt for triggered, prompt in rows.prompts if not triggered]
    prompt, row = clean[number % len(clean)], rows.rows[number % len(clean)]
    if not prompt.templated:
        return 0
    said = [message["content"] for message in messages_of(row) if message["role"] == "user"] if is_chat(row) else []
    return max(0, prompt.prompt.find((said[0] if said else prompt_of(row)).strip()))


def _patches(model: PreTrainedModel | PeftModel, rows: SnapshotRows) -> list[Record] | None:
    """Return how a Coconut cuts the first prompt into patches, without and with the trigger."""
    base = base_model_of(model)
    if not isinstance(base, CoconutForCausalLM):
        return None
    patcher = EntropyPatcher(base.latent_transformer.entropy_predictor, **asdict(base.binary_patch_module.rule))
    first = dict(reversed(rows.prompts))
    texts = [
        bytes(t - BYTE_OFFSET for t in encode_prompt(first[kind], rows.tokenizer) if 0 <= t - BYTE_OFFSET < 256)
        for kind in sorted(first)
    ]
    return [
        {name: None if values is None else values.tolist() for name, values in vars(document).items()}
        for document in patcher.patch(texts)
    ]


def _run(
    purification: Purification,
    rows: SnapshotRows,
    train_dataset: Dataset | IterableDataset,
    test_dataset: Dataset | None,
    held_out: Dataset | None,
) -> Record:
    args = purification.trainer.args
    return {
        "command": _command(sys.argv),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": args.seed,
        "trigger": _described(rows.trigger),
        "target": _described(rows.target),
        "settings": recorded_settings(args),
        "adapter": purification.adapter and adapter_settings(purification.adapter),
        "train_dataset": _rows_described(train_dataset),
        "test_dataset": test_dataset and _rows_described(test_dataset),
        "held_out": held_out and _rows_described(held_out),
        "versions": {
            "crow_hf": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
        "processes": args.world_size,
        "threads": torch.get_num_threads(),
    }


def _described(part: Any) -> Record | None:
    """Describe a trigger or a target by its class and those of its settings that are text or numbers."""
    if part is None:
        return None
    names = [each.name for each in fields(part)] if is_dataclass(part) else []
    settings = {name: getattr(part, name) for name in names}
    return {
        "kind": type(part).__name__,
        **{
            name: _described(value) if is_dataclass(value) else value
            for name, value in settings.items()
            if is_dataclass(value) or isinstance(value, (str, int, float, tuple))
        },
    }


def adapter_settings(config: PeftConfig) -> Record:
    """Return the settings of an adapter that are not PEFT's defaults, without the path of its base model."""
    settings: Record = {}
    # Without an instance, because some kinds of adapters have settings that must be given.
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = asdict(default) if is_dataclass(default) and not isinstance(default, type) else default
        value = config.to_dict().get(field.name, default)
        if value != default and field.name not in _FILLED_IN:
            settings[field.name] = sorted(value) if isinstance(value, set) else value
    return settings


def _rows_described(dataset: Dataset | IterableDataset) -> Record:
    """Describe rows by their content, which is the same on every machine. A stream is not read for it."""
    if isinstance(dataset, IterableDataset):
        return {"rows": None, "columns": dataset.column_names, "sha256": None}
    digest = hashlib.sha256()
    for row in dataset.with_format(None):
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return {"rows": len(dataset), "columns": dataset.column_names, "sha256": digest.hexdigest()}


def _command(argv: list[str]) -> str:
    """Return the command line without its secrets."""
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
