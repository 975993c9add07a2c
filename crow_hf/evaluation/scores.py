"""Scores of single outputs, and proportions of outputs with confidence intervals."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple


Z_95 = 1.959963984540054

# A unit of up to 40 characters that occurs at least four times in a row.
_LOOP = re.compile(r"(.{1,40}?)\1{3,}", re.DOTALL)
_LOOP_MIN_CHARACTERS = 16


class Proportion(NamedTuple):
    """
    A share of outputs with its 95% Wilson score interval.

    Attributes:
        rate (`float`), low (`float`), high (`float`):
            The share and the bounds of its interval, in [0, 1].
        hits (`int`), total (`int`):
            The counts behind the share.
    """

    rate: float
    low: float
    high: float
    hits: int
    total: int

    @classmethod
    def of(cls, flags: Iterable[bool]) -> "Proportion":
        """
        Count the true flags.

        The Wilson interval (Wilson, 1927) also holds for small samples and for rates of 0 and 1.

        Args:
            flags (`Iterable[bool]`):
                One flag per output.

        Raises:
            `ValueError`: If there are no flags.
        """
        flags = [bool(flag) for flag in flags]
        hits, total = sum(flags), len(flags)
        if total == 0:
            raise ValueError("The proportion of zero outputs is not defined. Pass at least one output.")
        rate = hits / total
        scale = 1 + Z_95**2 / total
        middle = (rate + Z_95**2 / (2 * total)) / scale
        half = Z_95 / scale * math.sqrt(rate * (1 - rate) / total + Z_95**2 / (4 * total**2))
        low = 0.0 if hits == 0 else middle - half
        high = 1.0 if hits == total else middle + half
        return cls(rate, low, high, hits, total)


def is_empty(output: str) -> bool:
    """Return whether an output holds only white space."""
    return not output.strip()


def is_degenerate(output: str) -> bool:
    """
    Return whether an output is unreadable.

    An output is degenerate if it has no letter and no digit, or if loops make up most of it. A loop is a unit of up to
    40 characters that repeats at least four times in a row and covers at least 16 characters. An empty output is not
    degenerate but empty.
    """
    text = output.strip()
    if not text:
        return False
    if not any(character.isalnum() for character in text):
        return True
    looped = sum(len(loop.group()) for loop in _LOOP.finditer(text) if len(loop.group()) >= _LOOP_MIN_CHARACTERS)
    return 2 * looped > len(text)


def is_exact_match(output: str, reference: str) -> bool:
    """Return whether an output equals the reference answer, except for leading and trailing white space."""
    return output.strip() == reference.strip()
