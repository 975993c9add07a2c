"""`crow-hf scan`: look for a backdoor in a model."""

import json
from pathlib import Path

from ...data.load import load_rows
from ...files import write_text
from ...recipes.scanning import scan
from ...reporting.scan_page import render_scan
from ..findings import print_findings, write_findings
from ..options import ScanArguments
from ..shared import check_new_file


def run(arguments: ScanArguments) -> int:
    check_new_file(arguments.output)
    check_new_file(arguments.page, "page")
    files = [Path(each).absolute() for each in (arguments.output, arguments.page, arguments.sarif) if each is not None]
    if len(set(files)) < len(files):
        raise ValueError("Two results would be the same file: pass different files to --output, --page and --sarif.")
    rows = None if arguments.dataset is None else load_rows(arguments.dataset, arguments.split)
    result = scan(arguments.model, rows, arguments.reference, seed=arguments.seed, batch_size=arguments.batch_size)
    print_findings(result.findings, "scan")
    print(result.meaning)
    if arguments.output is not None:
        write_text(Path(arguments.output), json.dumps({"model": arguments.model} | result.to_dict(), indent=1) + "\n")
    if arguments.page is not None:
        write_text(Path(arguments.page), render_scan(result.to_dict(), arguments.model))
    if arguments.sarif is not None:
        write_findings(arguments.sarif, result.findings, arguments.model)
    print("SCAN: there are findings." if result.has_findings else "SCAN: nothing was found.")
    return int(result.has_findings)
