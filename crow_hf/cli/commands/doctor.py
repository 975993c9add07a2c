"""`crow-hf doctor`: check a model and its rows before a purification."""

from pathlib import PurePath

from ...data.load import load_rows
from ...recipes.checkup import doctor
from ..findings import print_findings, write_findings
from ..options import DoctorArguments


def run(arguments: DoctorArguments) -> None:
    rows = None if arguments.dataset is None else load_rows(arguments.dataset, arguments.split)
    options = {name: getattr(arguments, name) for name in ("recipe", "learning_rate", "max_length")}
    findings = doctor(arguments.model, rows, **options)
    print_findings(findings, "doctor")
    if arguments.sarif is not None:
        files = {} if arguments.dataset is None else {"rows": PurePath(arguments.dataset).name}
        write_findings(arguments.sarif, findings, arguments.model, files)
    if problems := [finding.name for finding in findings if finding.level == "problem"]:
        raise ValueError(f"there is a problem with {', '.join(problems)}: see the remedy above.")
