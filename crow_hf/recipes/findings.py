"""What a check of `doctor()` reports."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """
    The result of one check of [`doctor`].

    Attributes:
        name (`str`):
            The name of the check.
        level (`str`):
            `"ok"`; `"warning"` if a purification works, but worse than it could; `"problem"` if it fails or its result
            is wrong.
        found (`str`):
            What the check found, in sentences.
        remedy (`str`):
            What to do about it. Empty if nothing has to be done.
    """

    name: str
    level: Level
    found: str
    remedy: str = ""


def has_problem(findings: Iterable[Finding]) -> bool:
    """Return whether one of the findings is a problem."""
    return any(finding.level == "problem" for finding in findings)
