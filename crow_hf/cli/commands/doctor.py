"""`crow-hf doctor`: check a model and its rows before a purification."""

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ...data.load import load_rows
from ...data.visible import printable
from ...recipes.checkup import doctor
from ..options import DoctorArguments
from ..words import as_options


COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


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
    if problems := [finding.name for finding in findings if finding.level == "problem"]:
        raise ValueError(f"there is a problem with {', '.join(problems)}: see the remedy above.")
