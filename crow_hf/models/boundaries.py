"""The patch rules: pure functions of bytes and entropies that decide where patches begin.

`entropies[i]` is the uncertainty about byte `i + 1`. It decides whether a patch starts at `i + 1`, so a surprising
byte is the first byte of its patch (BLT, section 2.3). In the table, `H` is `entropies[t - 1]`, the entropy of the
prediction of byte `t`, and `rise` is `entropies[t - 1] - entropies[t - 2]`. Both are compared with thresholds that are
shares of the largest possible entropy of a byte, 8 bits: a threshold of 0.8 is 6.4 bits.

| rule | a patch starts at byte `t` if |
|---|---|
| `"either"` | `H > threshold` or `rise > relative_threshold` (the rule of the project's guide) |
| `"global"` | `H > threshold` (BLT's global constraint) |
| `"monotonic"` | `rise > relative_threshold` (BLT's approximate monotonic constraint) |
| `"both"` | `H > threshold` and `rise > relative_threshold` |
| `"running_minimum"` | `H > threshold` or `H` is `relative_threshold` above the lowest entropy since the patch began |
| `"stride"` | `max_patch_length` bytes have passed (entropies are not used) |
| `"whitespace"` | byte `t - 1` is ASCII whitespace and byte `t` is not (entropies are not used) |

Under every rule, a special token is a patch of its own, the first byte of a text starts a patch, and no patch is
longer than `max_patch_length`. With `reset_on_newline`, the byte after a newline starts a patch too.

The end of a text is an exception: the end-of-sequence token, or padding, starts a patch only where a byte would start
one. The model knows whether a patch has ended when it predicts the next byte. The end of the text is one of the things
it has to predict, so the boundary must not reveal it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .byte_vocabulary import BYTE_OFFSET, EOS_TOKEN_ID, NEWLINE, PAD_TOKEN_ID, is_byte


RULES = ("either", "global", "monotonic", "both", "running_minimum", "stride", "whitespace")
RULES_WITHOUT_ENTROPY = ("stride", "whitespace")
WHITESPACE = tuple(b" \t\n\r\v\f")

# The entropy of a byte about which nothing is known.
MOST_BITS = 8.0
# The largest possible entropy of a byte in each unit of thresholds.
UNITS = {"share": 1.0, "bits": MOST_BITS, "nats": MOST_BITS * math.log(2)}

# Mean patch sizes outside of this range, in bytes, deserve a warning, if they are measured on enough bytes.
USUAL_PATCH_SIZES = (1.5, 16.0)
ENOUGH_BYTES = 200


@dataclass(frozen=True)
class PatchRule:
    """
    A patch rule and its parameters.

    Args:
        rule (`str`, *optional*, defaults to `"either"`):
            One of [`RULES`].
        threshold (`float`, *optional*, defaults to 0.8):
            Highest entropy inside a patch, as a share of 8 bits.
        relative_threshold (`float`, *optional*, defaults to 0.1):
            Highest rise of the entropy inside a patch, as a share of 8 bits.
        reset_on_newline (`bool`, *optional*, defaults to `True`):
            Whether the byte after a newline starts a patch.
        max_patch_length (`int`, *optional*):
            Maximum length of a patch in bytes. Longer patches are cut into pieces of this length and a remainder.

    Raises:
        `ValueError`: If the rule is unknown, a threshold is not between 0 and 1, `max_patch_length` is not positive,
        or the rule `"stride"` has none.
    """

    rule: str = "either"
    threshold: float = 0.8
    relative_threshold: float = 0.1
    reset_on_newline: bool = True
    max_patch_length: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"Unknown patch rule {self.rule!r}. Choose one of {', '.join(RULES)}.")
        for name in ("threshold", "relative_threshold"):
            # Also refuses NaN.
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(
                    f"`{name}` is a share of the largest possible entropy, between 0 and 1, got {share:.4g}. Divide a "
                    "number of bits by 8, or pass `unit='bits'` where there is such an argument."
                )
        if self.max_patch_length is not None and self.max_patch_length < 1:
            raise ValueError(f"`max_patch_length` must be at least 1, got {self.max_patch_length}.")
        if self.rule == "stride" and self.max_patch_length is None:
            raise ValueError("The rule 'stride' needs `max_patch_length`, the length of each patch.")

    @property
    def needs_entropies(self) -> bool:
        """Whether the rule uses entropies."""
        return self.rule not in RULES_WITHOUT_ENTROPY

    @property
    def bits(self) -> tuple[float, float]:
        """Both thresholds in bits."""
        return MOST_BITS * self.threshold, MOST_BITS * self.relative_threshold


class PatchState(NamedTuple):
    """
    The part of a row's past that its next patch boundaries depend on.

    Attributes:
        previous_ids (`torch.LongTensor` of shape `(batch_size, 2)`):
            The last two ids.
        entropies (`torch.FloatTensor` of shape `(batch_size, 2)`):
            The entropies at these two ids.
        length (`torch.LongTensor` of shape `(batch_size,)`):
            Current length of the open patch, the last one of the row.
        lowest (`torch.FloatTensor` of shape `(batch_size,)`):
            The lowest entropy with which a byte of the open patch was predicted. The first byte does not count. Only
            the rule `"running_minimum"` uses it.
    """

    previous_ids: torch.Tensor
    entropies: torch.Tensor
    length: torch.Tensor
    lowest: torch.Tensor

    @classmethod
    def initial(cls, batch_size: int, device: torch.device | str | None = None) -> "PatchState":
        """The state before the first byte."""
        return cls(
            torch.full((batch_size, 2), PAD_TOKEN_ID, device=device),
            torch.zeros(batch_size, 2, device=device),
            torch.zeros(batch_size, dtype=torch.long, device=device),
            torch.full((batch_size,), torch.inf, device=device),
        )


def share_of(value: float, unit: str) -> float:
    """
    Convert a threshold to a share of the largest possible entropy of a byte.

    Args:
        value (`float`):
            The threshold.
        unit (`str`):
            Its unit, one of [`UNITS`].

    Returns:
        `float`: 1 is the entropy of a byte about which nothing is known: 8 bits, or 5.55 nats.

    Raises:
        `ValueError`: If there is no such unit.
    """
    if unit not in UNITS:
        raise ValueError(f"Unknown unit {unit!r}. Choose one of {', '.join(UNITS)}.")
    return value / UNITS[unit]


def patch_starts(input_ids: torch.Tensor, entropies: torch.Tensor | None, rule: PatchRule) -> torch.Tensor:
    """
    Find where patches start.

    The result for a byte depends only on the bytes before it.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids of the byte vocabulary. Special tokens (including padding) separate texts.
        entropies (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Entropy of the prediction of the next byte, in bits. Values at special tokens are ignored.
        rule (`PatchRule`):
            The patch rule.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, sequence_length)`: `True` where a patch starts.
    """
    return continue_patches(
        input_ids, entropies, rule, PatchState.initial(input_ids.shape[0], device=input_ids.device)
    )[0]


def continue_patches(
    input_ids: torch.Tensor, entropies: torch.Tensor | None, rule: PatchRule, state: PatchState
) -> tuple[torch.Tensor, torch.Tensor, PatchState]:
    """
    Find where patches start in the next bytes of rows, given the state after their earlier bytes.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The next ids of each row.
        entropies (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Entropy of the prediction of the next byte, in bits.
        rule (`PatchRule`):
            The patch rule.
        state (`PatchState`):
            The state after the earlier bytes.

    Returns:
        `tuple`: Three values. A mask of shape `(batch_size, sequence_length)` of the positions where patches start. A
        mask of the same shape of the positions where a byte would start a patch, which is known before that byte. The
        state after these bytes.
    """
    ids = torch.cat([state.previous_ids, input_ids], dim=1)
    if entropies is None:
        entropies = torch.zeros_like(input_ids, dtype=torch.float)
    scores = torch.cat([state.entropies, entropies.float()], dim=1)
    ordinary = is_byte(ids)
    alone = ~(ordinary | (ids == EOS_TOKEN_ID) | (ids == PAD_TOKEN_ID))[:, 2:]
    forced = ~ordinary[:, 1:-1]
    if rule.reset_on_newline:
        forced = forced | (ids[:, 1:-1] == NEWLINE + BYTE_OFFSET)
    if rule.rule == "running_minimum":
        expected, length, lowest = _scan_running_minimum(forced, alone, scores[:, 1:-1], rule, state)
    else:
        expected = forced | _rule_starts(ids, scores, ordinary, rule)
        index = torch.arange(input_ids.shape[1], device=ids.device)
        if rule.max_patch_length is not None:
            begins = _last_start(expected | alone, index, state)
            begins = torch.cat([-state.length[:, None], begins[:, :-1]], dim=1)
            expected = expected | ((index - begins) % rule.max_patch_length == 0)
        length, lowest = len(index) - _last_start(expected | alone, index, state)[:, -1], state.lowest
    return expected | alone, expected, PatchState(ids[:, -2:], scores[:, -2:], length, lowest)


def _rule_starts(ids: torch.Tensor, scores: torch.Tensor, ordinary: torch.Tensor, rule: PatchRule) -> torch.Tensor:
    """Starts by the rule alone, without forced ones. The arguments begin two positions before the result."""
    if rule.rule == "stride":
        return torch.zeros_like(ordinary[:, 2:])
    if rule.rule == "whitespace":
        space = torch.isin(ids, torch.tensor(WHITESPACE, device=ids.device) + BYTE_OFFSET)
        return space[:, 1:-1] & ~space[:, 2:]
    before = scores[:, 1:-1]
    # The entropy does not rise across the border of two texts.
    threshold, relative_threshold = rule.bits
    rises = (before - scores[:, :-2] > relative_threshold) & ordinary[:, :-2]
    high = before > threshold
    return {"either": high | rises, "global": high, "monotonic": rises, "both": high & rises}[rule.rule]


def _last_start(starts: torch.Tensor, index: torch.Tensor, state: PatchState) -> torch.Tensor:
    """Position where the patch of each byte began. Negative if it began before the first of these bytes."""
    return torch.where(starts, index, -state.length[:, None]).cummax(dim=1).values


def _scan_running_minimum(
    forced: torch.Tensor,
    alone: torch.Tensor,
    before: torch.Tensor,
    rule: PatchRule,
    state: PatchState,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scan byte by byte, since a patch's end depends on its begin. Plain floats are the fastest way in Python."""
    rows, lengths, minima = [], [], []
    longest = rule.max_patch_length or float("inf")
    threshold, relative_threshold = rule.bits
    columns = (forced, alone, before, state.length, state.lowest)
    for row_forced, row_alone, row_before, length, lowest in zip(*(c.tolist() for c in columns), strict=True):
        expected = []
        for is_forced, is_alone, entropy in zip(row_forced, row_alone, row_before, strict=True):
            surprising = entropy > threshold or entropy - lowest > relative_threshold
            expected.append(is_forced or surprising or length == longest)
            starts = expected[-1] or is_alone
            length, lowest = (1, float("inf")) if starts else (length + 1, min(lowest, entropy))
        rows.append(expected)
        lengths.append(length)
        minima.append(lowest)
    return (
        torch.tensor(rows, dtype=torch.bool, device=forced.device).view(forced.shape),
        torch.tensor(lengths, device=forced.device),
        torch.tensor(minima, device=forced.device),
    )
