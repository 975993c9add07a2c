"""`crow-hf gate`: hold the report of a purification against a policy."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ...data.visible import printable
from ...reporting.checksums import compare_checksums
from ...reporting.gate import Check, Policy, check_policy, decide
from ...reporting.report_file import REPORT_DATA, read_report
from ...reporting.sarif import SarifResult, write_sarif
from ..arguments import split_names
from ..options import GateArguments


COLOURS = {"passed": "green", "failed": "bold red", "no evidence": "yellow"}
EXIT_CODES = {"passed": 0, "failed": 1, "no evidence": 2}


def run(arguments: GateArguments) -> int:
    rules = {each.name: getattr(arguments, each.name) for each in fields(Policy)}
    rules["require"] = split_names(arguments.require) or None
    policy = Policy.read(arguments.policy, **rules)
    record = read_report(arguments.report)
    changes = compare_checksums(arguments.report) if Path(arguments.report).is_dir() else None
    checks = check_policy(record, policy, changes)
    table = Table("", "", Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for check in checks:
        table.add_row(Text(check.outcome, COLOURS[check.outcome]), Text(_name(check)), Text(printable(check.found)))
    Console().print(table)
    if arguments.sarif is not None:
        levels: dict[str, Any] = {"passed": "none", "failed": "error", "no evidence": "warning"}
        results = [SarifResult(check.rule, levels[check.outcome], check.found, REPORT_DATA) for check in checks]
        write_sarif(arguments.sarif, results, record["model"]["name"])
    decision = decide(checks)
    print(f"GATE: {decision}.")
    return EXIT_CODES[decision]


def _name(check: Check) -> str:
    return check.rule if check.limit is None else f"{check.rule} {check.limit}"
