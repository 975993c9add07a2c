"""Findings as SARIF 2.1.0, the format that code scanning services and editors read.

The specification is that of OASIS: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from .. import __version__
from ..files import write_text


class SarifResult(NamedTuple):
    """
    One finding.

    Attributes:
        rule (`str`):
            The name of the check or rule.
        level (`str`):
            `"none"` if everything is in order, or else `"note"`, `"warning"` or `"error"`.
        text (`str`):
            What was found, in sentences.
        file (`str`):
            The file in the folder of the model that the finding is about. Services show no finding without a file.
    """

    rule: str
    level: Literal["none", "note", "warning", "error"]
    text: str
    file: str


def write_sarif(path: str | Path, results: Iterable[SarifResult], folder: str | Path) -> None:
    """
    Write findings as a SARIF file. An existing file is replaced.

    Args:
        path (`str` or `Path`):
            The file.
        results (`Iterable[SarifResult]`):
            The findings. Those of the level `"none"` are written as checks that passed.
        folder (`str` or `Path`):
            The folder of the model, or its name on the Hub.
    """
    results = list(results)
    rules = list(dict.fromkeys(result.rule for result in results))
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "crow_hf",
                        "version": __version__,
                        "informationUri": "https://github.com/crow-hf/crow-hf",
                        "rules": [{"id": _id(rule), "shortDescription": {"text": rule}} for rule in rules],
                    }
                },
                "originalUriBaseIds": {"MODEL": {"description": {"text": f"The folder of {folder}"}}},
                "results": [_result(result, rules.index(result.rule)) for result in results],
            }
        ],
    }
    write_text(Path(path), json.dumps(log, indent=1) + "\n")


def _result(result: SarifResult, rule: int) -> dict[str, Any]:
    place = {"artifactLocation": {"uri": quote(result.file, errors="replace"), "uriBaseId": "MODEL"}}
    return {
        "ruleId": _id(result.rule),
        "ruleIndex": rule,
        "kind": "pass" if result.level == "none" else "fail",
        "level": result.level,
        # A model can write half of a character, which readers refuse.
        "message": {"text": result.text.encode(errors="replace").decode()},
        "locations": [{"physicalLocation": place}],
    }


def _id(rule: str) -> str:
    """Return the name of a rule as one word."""
    return re.sub(r"\W+", "-", rule).lower()
