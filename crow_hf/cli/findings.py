"""Prints the findings of a check, and writes them as SARIF."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..data.visible import printable
from ..recipes.findings import Finding
from ..reporting.sarif import SarifResult, write_sarif
from .words import as_options


COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}
LEVELS: dict[str, Any] = {"ok": "none", "warning": "warning", "problem": "error"}
# The file of the model that a check is about, where it is not its config.
FILES = {
    "adapter": "adapter_config.json",
    "chat template": "chat_template.jinja",
    "divergence": "model.safetensors",
    "end tokens": "generation_config.json",
    "entropy predictor": "model.safetensors",
    "files": "model.safetensors",
    "generation": "generation_config.json",
    "new text": "model.safetensors",
    "phrase": "model.safetensors",
    "phrases": "model.safetensors",
    "tokenizer": "tokenizer_config.json",
    "trigger": "model.safetensors",
    "weights": "model.safetensors",
}


def print_findings(findings: Iterable[Finding], command: str) -> None:
    """Print a table with one row per finding. The names of arguments become those of the command's options."""
    table = Table("", "", Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for finding in findings:
        texts = filter(None, [finding.found, finding.remedy and f"-> {finding.remedy}"])
        lines = [printable(as_options(text, command)) for text in texts]
        table.add_row(Text(finding.level, COLOURS[finding.level]), Text(finding.name), Text("\n".join(lines)))
    Console().print(table)


def write_findings(path: str, findings: Iterable[Finding], model: str, files: Mapping[str, str] | None = None) -> None:
    """Write the findings as SARIF. `files` names the files of checks that are not about a file of the model."""
    places = FILES | dict(files or {})
    results = [
        SarifResult(
            each.name,
            LEVELS[each.level],
            f"{each.found} {each.remedy}".strip(),
            places.get(each.name, "config.json"),
        )
        for each in findings
    ]
    write_sarif(path, results, model)
