"""A CycloneDX 1.6 bill of materials of a purified model, drawn from the content of `report.json`.

The purification is its pedigree: the suspect is the ancestor, and the purification the patch. The evaluations are its
quantitative analysis. The specification is ECMA-424: https://cyclonedx.org/docs/1.6/json/
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from ..files import write_text
from .report_file import Record


BOM = "bom.cdx.json"
_SCORES = {
    "target": "attack success",
    "exact_match": "right answers",
    "empty": "empty answers",
    "degenerate": "degenerate answers",
}
_RETENTION = {
    "answer_kl": "KL(suspect || model) on answers, nats per token",
    "text_kl": "KL(suspect || model) on running text, nats per token",
    "text_bits_ratio": "bits per byte of running text, suspect = 1",
}


def write_bom(folder: str | Path, record: Record) -> None:
    """
    Write the bill of materials of a purified model into its folder, as `bom.cdx.json`.

    Args:
        folder (`str` or `Path`):
            The folder of the purified model.
        record (`dict`):
            The content of its `report.json`.
    """
    write_text(Path(folder) / BOM, json.dumps(bom_of(record), indent=1) + "\n")


def bom_of(record: Record) -> dict[str, Any]:
    """
    Return the bill of materials of a purified model.

    Args:
        record (`dict`):
            The content of its `report.json`.

    Returns:
        `dict`: The content of a CycloneDX file of version 1.6.
    """
    versions = record["run"]["versions"]
    name = PurePath(record["model"]["name"]).name
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": f"{name}, purified",
        "description": f"Verdict of the purification: {record['verdict']['headline']}.",
        "components": _components(record["files"]["purified"]),
        "pedigree": {
            "ancestors": [_suspect(record)],
            "patches": [{"type": "unofficial", "resolves": [_resolved(record)]}],
            "notes": " ".join(record["verdict"]["explanation"]),
        },
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "modelArchitecture": record["model"]["architecture"],
                "datasets": [
                    {"type": "dataset", "name": role, "contents": {"properties": _properties(record["run"][role])}}
                    for role in ("train_dataset", "test_dataset", "held_out")
                    if record["run"][role]
                ],
            },
            "quantitativeAnalysis": {"performanceMetrics": list(_metrics(record))},
            "considerations": {"technicalLimitations": record["verdict"]["explanation"]},
        },
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, record['digest'])}",
        "version": 1,
        "metadata": {
            "timestamp": record["run"]["finished"],
            "tools": {
                "components": [
                    {"type": "library", "name": package, "version": version} for package, version in versions.items()
                ]
            },
            "component": model,
        },
    }


def _suspect(record: Record) -> dict[str, Any]:
    model, files = record["model"], record["files"]
    suspect: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "suspect",
        "name": PurePath(model["name"]).name,
        "components": _components(files["suspect"], "suspect/") + _components(files["base"], "base/"),
    }
    return suspect | ({"version": model["commit"]} if model["commit"] else {})


def _resolved(record: Record) -> dict[str, Any]:
    trigger = record["run"]["trigger"]
    known = "its trigger was not known" if trigger is None else f"trigger: {json.dumps(trigger)}"
    return {
        "type": "security",
        "name": "backdoor",
        "description": f"A possible backdoor ({known}), purified by the recipe {record['recipe']}.",
    }


def _components(checksums: dict[str, str] | None, prefix: str = "") -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "bom-ref": prefix + name,
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
        for name, digest in (checksums or {}).items()
    ]


def _properties(rows: Record) -> list[dict[str, str]]:
    return [{"name": name, "value": str(value)} for name, value in rows.items() if value is not None]


def _metrics(record: Record) -> Iterator[dict[str, Any]]:
    """Yield the scores of every model on every set of prompts, the success of canaries, and the retention."""
    for role, evaluation in (record["evaluations"] or {}).items():
        for kind in ("clean", "triggered"):
            for score, label in _SCORES.items():
                if held := (evaluation[kind] or {}).get(score):
                    yield _metric(label, held, f"{role}, {kind} prompts")
    for number, canary in enumerate(record["canaries"], 1):
        for time in ("before", "after"):
            if canary[time]:
                yield _metric("canary success", canary[time], f"canary {number}, {time} the purification")
    for score, label in _RETENTION.items():
        kept = record["retention"] or {}
        if kept.get(score) is not None:
            high = kept.get(f"{score}_high")
            upper = {} if high is None else {"confidenceInterval": {"upperBound": f"{high:.4g}"}}
            yield {"type": label, "value": f"{kept[score]:.4g}", "slice": "purified", **upper}


def _metric(label: str, share: Record, part: str) -> dict[str, Any]:
    interval = {"lowerBound": f"{share['low']:.4g}", "upperBound": f"{share['high']:.4g}"}
    return {"type": label, "value": f"{share['rate']:.4g}", "slice": part, "confidenceInterval": interval}
