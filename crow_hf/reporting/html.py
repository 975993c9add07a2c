"""`report.html`: one page without external resources, drawn from the content of `report.json`."""

import json
from pathlib import Path, PurePath
from typing import Any

import jinja2
import numpy as np

from ..files import write_text
from ..patching.documents import PatchedDocument
from ..patching.view import TEMPLATES as PATCH_TEMPLATES
from ..patching.view import runs_of, summarize
from ..progress import duration
from ..secrets import hide_known_secrets
from .charts import layer_charts, outcome_intervals, training_charts
from .cost import in_bytes
from .report_file import REPORT_DATA, REPORT_PAGE, Record, digest_of
from .verdict import more_bits
from .words import DIED, LIVES, percent


TEMPLATES = PATCH_TEMPLATES.overlay(
    loader=jinja2.ChoiceLoader([jinja2.PackageLoader("crow_hf.reporting"), PATCH_TEMPLATES.loader])
)
SCORES = {
    "target": {"triggered": "Attack success", "clean": "False positives"},
    "exact_match": "Right answers",
    "empty": "Empty answers",
    "degenerate": "Degenerate answers",
    "bits_per_byte": "Bits per byte",
}

KEPT = {
    "answer_kl": "KL on answers, nats per token",
    "text_kl": "KL on text, nats per token",
    "reference_text_bits_per_byte": "Bits per byte of text, suspect",
    "text_bits_per_byte": "Bits per byte of text, this model",
    "text_bits_ratio": "Bits of text, suspect = 1",
}


def write_report(folder: str | Path, record: Record) -> Record:
    """
    Write `report.html` and `report.json`. Existing files are replaced, each in one step.

    Args:
        folder (`str` or `Path`):
            The folder of the report. It is created if it does not exist.
        record (`dict`):
            The content, with the keys of [`crow_hf.reporting.record`].

    Returns:
        `dict`: The content as it was written, without secrets and with its digest.
    """
    # JSON in ASCII, because a model can generate half of a character, which UTF-8 cannot encode.
    record = json.loads(hide_known_secrets(json.dumps(record, allow_nan=False)))
    record["digest"] = digest_of(record)
    write_text(Path(folder) / REPORT_DATA, json.dumps(record, indent=1) + "\n")
    write_text(Path(folder) / REPORT_PAGE, render_report(record))
    return record


def render_report(record: Record) -> str:
    """
    Draw `report.html`.

    Args:
        record (`dict`):
            The content of `report.json`.

    Returns:
        `str`: The page.
    """
    name = record["model"]["name"]
    documents = [PatchedDocument(*map(np.array, patches.values())) for patches in record["patches"] or []]
    others = {name: name for name in record["evaluations"] or {}}
    # The picture has room for so many letters.
    short_titles = {name: name if len(name) <= 14 else f"{name[:13]}…" for name in others}
    short_titles |= {"suspect": "No defence", "control": "Fine-tuning", "purified": record["method"]}
    titles = others | {
        "suspect": "No defence (the suspect)",
        "control": "Fine-tuning (the control)",
        "purified": f"{record['method']} (purified)",
    }
    return TEMPLATES.get_template("report.html.jinja").render(
        record,
        percent=percent,
        models=titles,
        scores=SCORES,
        short_name=short_name(name),
        tiles=_tiles(record),
        example=_example(record["samples"]),
        cost_facts=_cost_facts(record),
        retentions=_retentions(record),
        kept=KEPT,
        outcomes=outcome_intervals(record["evaluations"], short_titles),
        training_charts=training_charts(record["training"]["log"]),
        layers=layer_charts(record["layer_profile"]["models"], titles),
        run_facts=_run_facts(record),
        documents=[(summarize(document), runs_of(document)) for document in documents],
    )


def short_name(name: str) -> str:
    """Return the name of a model in a title: the last part of a path that is absolute, or the name as it is."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def _tiles(record: Record) -> list[tuple[str, str]]:
    """Return the few numbers that the verdict rests on."""
    evaluations, canaries = record["evaluations"], record["canaries"]
    tiles = [] if evaluations and evaluations["suspect"]["triggered"] else [("Attack success", "not known")]
    for label, kind, score in (
        ("Attack success", "triggered", "target"),
        ("Right answers, clean", "clean", "exact_match"),
        ("Right answers, triggered", "triggered", "exact_match"),
    ):
        before, after = (
            ((evaluations or {}).get(role, {}).get(kind) or {}).get(score) for role in ("suspect", "purified")
        )
        if before is not None:
            tiles.append((label, f"{100 * before['rate']:.1f} → {percent(after['rate'])}"))
    before, after = (evaluations[role]["clean"] if evaluations else {} for role in ("suspect", "purified"))
    if before and before["exact_match"] is None and before["bits_per_byte"] is not None:
        tiles.append(("Bits per byte of answers", f"{before['bits_per_byte']:.3f} → {after['bits_per_byte']:.3f}"))
    kept = record["retention"]
    if kept and kept["text_bits_ratio"] is not None:
        change = more_bits(kept["reference_text_bits_per_byte"], kept["text_bits_per_byte"])
        tiles.append(("Bits of running text", f"{100 * change:+.1f} %"))
    if canaries:
        outcomes = [canary["outcome"] for canary in canaries]
        died, lives = outcomes.count(DIED), outcomes.count(LIVES)
        tiles.append(("Canaries that died", f"{died} of {died + lives}" if died + lives else "none was learned"))
    return tiles


def _example(samples: list[Record]) -> Record | None:
    """Return the prompt that stands beside the verdict: one with the trigger, or one whose answer has changed."""

    def rank(sample: Record) -> tuple[bool, bool]:
        answers = {answer["model"]: answer["text"] for answer in sample["answers"]}
        return (sample["triggered"], answers["suspect"] != answers["purified"])

    # `max` returns the first of several equal ones.
    return max(samples, key=rank, default=None)


def _cost_facts(record: Record) -> list[tuple[str, str]]:
    """Return what the run took, each as name and value."""
    rows, cost, size = record["rows"], record["cost"], record["size"]
    facts = []
    if rows is not None:
        facts.append(("clean rows", "; ".join(f"{count} {name.replace('_', ' ')}" for name, count in rows.items())))
    total = sum(cost["seconds"].values())
    phases = [(name.lower(), duration(seconds)) for name, seconds in cost["seconds"].items()]
    facts += [("time", duration(total)), *phases] if phases else []
    if cost["peak_memory"] is not None:
        facts.append(("most memory at once", in_bytes(cost["peak_memory"])))
    sizes = ["not known" if size[role] is None else in_bytes(size[role]) for role in ("suspect", "purified")]
    return [*facts, ("weights on disk", " → ".join(sizes))]


def _retentions(record: Record) -> dict[str, Record]:
    """Return the retention of each model that has one. Without test rows, that is the purified model."""
    if record["evaluations"] is None:
        return {"purified": record["retention"]} if record["retention"] else {}
    measured = {role: evaluation["retention"] for role, evaluation in record["evaluations"].items()}
    return {role: retention for role, retention in measured.items() if retention}


def _run_facts(record: Record) -> list[tuple[str, str]]:
    """Return the rows of the last table, each as name and value."""
    model, run = record["model"], record["run"]
    processes = f"{run['processes']} process{'es' if run['processes'] > 1 else ''}"
    facts = {
        "model": model["name"],
        "architecture": f"{model['architecture']}, {model['parameters']:,} parameters, trained: {model['trained']}",
        "recipe": record["recipe"],
        "clean rows": run["train_dataset"],
        "test rows": run["test_dataset"],
        "trigger": run["trigger"],
        "target": run["target"],
        "seed": run["seed"],
        **run["settings"],
        "adapter": run["adapter"],
        "versions": run["versions"],
        "device": f"{run['device']}, {processes}, {run['threads']} threads",
        "finished": run["finished"],
    }
    return [(name, _in_words(value)) for name, value in facts.items() if value is not None]


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_in_words(held)}" for name, held in value.items() if held is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
