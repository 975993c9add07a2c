"""`crow-hf doctor`: check a model and its rows before a purification."""

from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ...data.load import load_rows
from ...data.visible import printable
from ...recipes.checkup import doctor
from ...recipes.findings import Finding
from ...reporting.sarif import SarifResult, write_sarif
from ..options import DoctorArguments
from ..words import as_options


COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}
LEVELS: dict[str, Any] = {"ok": "none", "warning": "warning", "problem": "error"}
# The file of the model that a check is about, where it is not its config.
FILES = {
    "adapter": "adapter_config.json",
    "chat template": "chat_template.jinja",
    "end tokens": "generation_config.json",
    "entropy predictor": "model.safetensors",
    "files": "model.safetensors",
    "generation": "generation_config.json",
    "tokenizer": "tokenizer_config.json",
    "weights": "model.safetensors",
}


def run(arguments: DoctorArguments) -> None:
    rows = None if arguments.dataset is None else load_rows(arguments.dataset, arguments.split)
    options = {name: getattr(arguments, name) for name in ("recipe", "learning_rate", "max_length")}
    findings = doctor(arguments.model, rows, **options)
    table = Table("", "", Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for finding in findings:
        texts = filter(None, [finding.found, finding.remedy and f"-> {finding.remedy}"])
        lines = [printable(as_options(text, "doctor")) for text in texts]
        table.add_row(Text(finding.level, COLOURS[finding.level]), Text(finding.name), Text("\n".join(lines)))
    Console().print(table)
    if arguments.sarif is not None:
        results = [
            SarifResult(
                each.name, LEVELS[each.level], f"{each.found} {each.remedy}".strip(), _file_of(each, arguments)
            )
            for each in findings
        ]
        write_sarif(arguments.sarif, results, arguments.model)
    if problems := [finding.name for finding in findings if finding.level == "problem"]:
        raise ValueError(f"there is a problem with {', '.join(problems)}: see the remedy above.")


def _file_of(finding: Finding, arguments: DoctorArguments) -> str:
    if finding.name == "rows" and arguments.dataset is not None:
        return PurePath(arguments.dataset).name
    return FILES.get(finding.name, "config.json")
