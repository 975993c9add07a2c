"""A reader of SARIF files that refuses what does not fit the schema of OASIS."""

import json

from sarif_kit import validation_errors


def read_sarif(path):
    """The only run of a SARIF 2.1.0 file."""
    log = json.loads(path.read_text(encoding="utf-8"))
    assert validation_errors(log) == []
    (run,) = log["runs"]
    return run
