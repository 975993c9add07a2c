"""report.html: one page that needs nothing else, drawn from what `report.json` holds ([`crow_hf.run_record`])."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import jinja2
import numpy as np

from ..evaluation.harness import CROW, FINE_TUNING, NO_DEFENCE, STRONG
from ..patching.patcher import PatchedDocument
from ..patching.view import TEMPLATES as PATCH_TEMPLATES
from ..patching.view import runs_of, summarize, visible
from ..training.files import write_text
from .charts import LineChart, Series, _thinned
from .tables import percent


TEMPLATES = PATCH_TEMPLATES.overlay(
    loader=jinja2.ChoiceLoader([jinja2.PackageLoader("crow_hf.reporting"), PATCH_TEMPLATES.loader])
)
REPORT_PAGE, REPORT_DATA = "report.html", "report.json"
MODELS = {
    NO_DEFENCE: "No defence (the suspect)",
    FINE_TUNING: "Fine-tuning (the control)",
    CROW: "CROW (purified)",
    STRONG: "Strong recipe (purified)",
}
# Where there is little room.
SHORT = {NO_DEFENCE: "No defence", FINE_TUNING: "Fine-tuning", CROW: "CROW", STRONG: "Strong recipe"}
# What the log calls a term, and the legend; and which of the page's line styles it has.
LOSSES = {
    "loss_lm": ("language model loss", 0),
    "distillation": ("prompts as they are", 0),
    "decoy": ("prompts with decoys", 1),
    "adversarial": ("prompts with adversarial decoys", 2),
}
CONSISTENCIES = {"consistency_clean": ("clean", 0), "consistency_perturbed": ("perturbed", 1)}
SCORES = {
    "target": {"triggered": "Attack success", "clean": "False positives"},
    "exact_match": "Right answers",
    "empty": "Empty answers",
    "degenerate": "Degenerate answers",
    "bits_per_byte": "Bits per byte",
}


def write_report(folder: str | Path, record: dict[str, Any]) -> None:
    """
    Write `report.html` and `report.json`, each whole or not at all; those that are there are replaced.

    Args:
        folder (`str` or `Path`):
            Where to; made if need be.
        record (`dict`):
            What is known of a purification, with the keys of [`crow_hf.run_record`].
    """
    # In ASCII: a model can say half of a character, which no encoding can hold.
    text = json.dumps(record, indent=1, allow_nan=False)
    write_text(Path(folder) / REPORT_DATA, text + "\n")
    write_text(Path(folder) / REPORT_PAGE, render_report(json.loads(text)))


def render_report(record: dict[str, Any]) -> str:
    """
    Draw `report.html`.

    Args:
        record (`dict`):
            As `report.json` holds it.

    Returns:
        `str`: The page.
    """
    name = record["model"]["name"]
    documents = [PatchedDocument(*map(np.array, patches.values())) for patches in record["patches"] or []]
    return TEMPLATES.get_template("report.html.jinja").render(
        record,
        visible=visible,
        percent=percent,
        models=MODELS,
        scores=SCORES,
        short_name=PurePath(name).name if PurePath(name).is_absolute() else name,
        tiles=_tiles(record),
        outcomes=_outcomes(record["evaluations"]),
        training_charts=_training_charts(record["training"]["log"]),
        layers=_layer_charts(record["layer_profile"]["models"]),
        run_facts=_run_facts(record),
        documents=[(summarize(document), runs_of(document)) for document in documents],
    )


def _training_charts(log: list[dict[str, Any]]) -> list[LineChart]:
    charts = []
    for title, terms, unit in (
        ("Loss", LOSSES, "nats per token"),
        ("Distance between layers", CONSISTENCIES, "mean of 1 − cos"),
    ):
        series = []
        for term, (name, style) in terms.items():
            if points := [(entry["step"], entry[term]) for entry in log if entry.get(term) is not None]:
                series.append(Series(name, _thinned(points), style))
        if series:
            charts.append(LineChart(title, series, "optimizer step", unit))
    return charts


def _layer_charts(profiles: dict[str, dict[str, Any]]) -> list[LineChart]:
    """One for each model, all with the same axes."""
    kinds = ("clean", "perturbed", "triggered")
    highest = max(value for profile in profiles.values() for kind in kinds for value in profile[kind] or [])
    return [
        LineChart(
            MODELS[name],
            [
                Series(kind, list(enumerate(profile[kind], start=1)), style)
                for style, kind in enumerate(kinds)
                if profile[kind]
            ],
            "layer l, against layer l + 1",
            "mean of 1 − cos",
            highest,
        )
        for name, profile in profiles.items()
    ]


def _tiles(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The few numbers that the verdict is about."""
    evaluations, canaries = record["evaluations"], record["canaries"]
    tiles = [] if evaluations and evaluations[NO_DEFENCE]["triggered"] else [("Attack success", "not known")]
    for label, kind, score in (
        ("Attack success", "triggered", "target"),
        ("Right answers, clean", "clean", "exact_match"),
        ("Right answers, triggered", "triggered", "exact_match"),
    ):
        shares = [(evaluation[kind] or {}).get(score) for evaluation in (evaluations or {}).values()]
        if shares and shares[0] is not None:
            tiles.append((label, f"{100 * shares[0]['rate']:.1f} → {percent(shares[-1]['rate'])}"))
    if canaries:
        outcomes = [canary["outcome"] for canary in canaries]
        died, lives = outcomes.count("died"), outcomes.count("lives")
        tiles.append(("Canaries that died", f"{died} of {died + lives}" if died + lives else "none was learned"))
    return tiles


@dataclass(frozen=True)
class Interval:
    """A share with its interval as a row of a picture, in percent."""

    model: str
    rate: float
    low: float
    high: float
    style: int


def _outcomes(evaluations: dict[str, Any] | None) -> list[tuple[str, list[Interval]]]:
    """What a picture of the comparison shows: a heading, and a row for each model."""
    groups = []
    for heading, kind, score in (
        ("Attack success", "triggered", "target"),
        ("Right answers with the trigger", "triggered", "exact_match"),
        ("Right answers without it", "clean", "exact_match"),
    ):
        rows = [
            Interval(SHORT[name], *(100 * share[end] for end in ("rate", "low", "high")), int(score == "target"))
            for name, evaluation in (evaluations or {}).items()
            if (share := (evaluation[kind] or {}).get(score)) is not None
        ]
        if rows:
            groups.append((heading, rows))
    return groups


def _run_facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What the last table shows, name by name."""
    model, run = record["model"], record["run"]
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
        "device": f"{run['device']}, {run['processes']} process{'es' if run['processes'] > 1 else ''}, {run['threads']} threads",
        "finished": run["finished"],
    }
    return [(name, _in_words(value)) for name, value in facts.items() if value is not None]


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_in_words(held)}" for name, held in value.items() if held is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
