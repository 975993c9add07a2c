"""`crow-hf doctor`: check a model and its rows before a purification."""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ...data.load import load_rows
from ...recipes.checkup import doctor
from ..shared import DATASET_HELP, MODEL_HELP


COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass
class DoctorArguments:
    """Look for problems that would spoil a purification, and suggest remedies. Nothing is trained or written."""

    model: str = field(metadata={"help": f"The suspect: {MODEL_HELP}"})
    dataset: str | None = field(default=None, metadata={"help": f"The clean rows. {DATASET_HELP}"})
    split: str = field(default="train", metadata={"help": "Split of the clean rows on the Hub."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of the purification."})
    max_length: int = field(default=1024, metadata={"help": "Longest row of the purification, in tokens."})


ARGUMENTS = [DoctorArguments]


def run(arguments: DoctorArguments) -> None:
    rows = None if arguments.dataset is None else load_rows(arguments.dataset, arguments.split)
    findings = doctor(arguments.model, rows, learning_rate=arguments.learning_rate, max_length=arguments.max_length)
    table = Table("", "", Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for finding in findings:
        lines = filter(None, [finding.found, finding.remedy and f"-> {finding.remedy}"])
        table.add_row(Text(finding.level, COLOURS[finding.level]), Text(finding.name), Text("\n".join(lines)))
    Console().print(table)
    if problems := [finding.name for finding in findings if finding.level == "problem"]:
        raise ValueError(f"there is a problem with {', '.join(problems)}: see the remedy above.")
