"""Where patches begin: the rules, as pure functions of bytes and entropies.

`entropies[i]` is the uncertainty about byte `i + 1`, so it decides whether a patch starts at `i + 1`: a surprising byte is
the first of its patch (BLT, section 2.3). Below, `H` is the entropy that byte `t` was predicted with, `entropies[t - 1]`,
and `rise` is `entropies[t - 1] - entropies[t - 2]`.

| rule | a patch starts at byte `t` if |
|---|---|
| `"either"` | `H > threshold` or `rise > relative_threshold`: the rule of the project's guide |
| `"global"` | `H > threshold`: BLT's global constraint |
| `"monotonic"` | `rise > relative_threshold`: BLT's approximate monotonic constraint |
| `"both"` | `H > threshold` and `rise > relative_threshold` |
| `"running_minimum"` | `H > threshold` or `H` exceeds the lowest entropy since the patch began by `relative_threshold` |
| `"stride"` | `max_patch_length` bytes have passed: the entropies are not looked at |
| `"whitespace"` | byte `t - 1` is ASCII whitespace and byte `t` is not: the entropies are not looked at |

Whatever the rule, special tokens are patches of their own, the first byte of a text starts a patch, so does the byte after a
newline if `reset_on_newline`, and no patch is longer than `max_patch_length`.

The end of a text is the exception: its token, or padding, starts a patch only where a byte would have. Whether a patch has ended is what a
model knows when it predicts the next byte, and a text's end is one of the things it has to predict.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .byte_vocabulary import BYTE_OFFSET, EOS_TOKEN_ID, NEWLINE, PAD_TOKEN_ID, is_byte


RULES = ("either", "global", "monotonic", "both", "running_minimum", "stride", "whitespace")
RULES_WITHOUT_ENTROPY = ("stride", "whitespace")
WHITESPACE = tuple(b" \t\n\r\v\f")


@dataclass(frozen=True)
class PatchRule:
    """
    A rule and its parameters.

    Args:
        rule (`str`, *optional*, defaults to `"either"`):
            One of [`RULES`].
        threshold (`float`, *optional*, defaults to 0.8):
            Highest entropy inside a patch, in bits.
        relative_threshold (`float`, *optional*, defaults to 0.1):
            Highest rise of the entropy inside a patch, in bits.
        reset_on_newline (`bool`, *optional*, defaults to `True`):
            Whether the byte after a newline starts a patch.
        max_patch_length (`int`, *optional*):
            Longer patches are cut into pieces of this length and a rest.

    Raises:
        `ValueError`: If the rule is unknown or `max_patch_length` is missing or not positive.
    """

    rule: str = "either"
    threshold: float = 0.8
    relative_threshold: float = 0.1
    reset_on_newline: bool = True
    max_patch_length: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"There is no patch rule {self.rule!r}: take one of {', '.join(RULES)}.")
        if self.max_patch_length is not None and self.max_patch_length < 1:
            raise ValueError(f"`max_patch_length` must be at least 1, got {self.max_patch_length}.")
        if self.rule == "stride" and self.max_patch_length is None:
            raise ValueError("The rule 'stride' needs `max_patch_length`, the length of its patches.")

    @property
    def needs_entropies(self) -> bool:
        """Whether the rule looks at the entropies at all."""
        return self.rule not in RULES_WITHOUT_ENTROPY


class PatchState(NamedTuple):
    """
    What the boundaries ahead of a row depend on.

    Attributes:
        previous_ids (`torch.LongTensor` of shape `(batch_size, 2)`):
            The last two ids.
        entropies (`torch.FloatTensor` of shape `(batch_size, 2)`):
            Theirs.
        length (`torch.LongTensor` of shape `(batch_size,)`):
            How long the patch at the end is so far.
        lowest (`torch.FloatTensor` of shape `(batch_size,)`):
            The lowest entropy that a byte of it, but the first, was predicted with; for the rule `"running_minimum"`.
    """

    previous_ids: torch.LongTensor
    entropies: torch.FloatTensor
    length: torch.LongTensor
    lowest: torch.FloatTensor

    @classmethod
    def initial(cls, batch_size: int, device: torch.device | str | None = None) -> "PatchState":
        """Before the first byte."""
        return cls(
            torch.full((batch_size, 2), PAD_TOKEN_ID, device=device),
            torch.zeros(batch_size, 2, device=device),
            torch.zeros(batch_size, dtype=torch.long, device=device),
            torch.full((batch_size,), torch.inf, device=device),
        )


def patch_starts(
    input_ids: torch.LongTensor, entropies: torch.FloatTensor | None, rule: PatchRule
) -> torch.BoolTensor:
    """
    Tell where patches start.

    The answer for a byte depends on what comes before it only.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids of the byte vocabulary. Special tokens, padding among them, separate texts.
        entropies (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
            In bits, about the next byte each. What stands at special tokens is not looked at.
        rule (`PatchRule`):
            The rule.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, sequence_length)`: True where a patch starts.
    """
    return continue_patches(
        input_ids, entropies, rule, PatchState.initial(input_ids.shape[0], device=input_ids.device)
    )[0]


def continue_patches(
    input_ids: torch.LongTensor, entropies: torch.FloatTensor | None, rule: PatchRule, state: PatchState
) -> tuple[torch.BoolTensor, torch.BoolTensor, PatchState]:
    """
    [`patch_starts`] for the next bytes of rows whose beginning is known by its state only.

    Returns:
        `tuple`: Where patches start; where they would if a byte stood there, which is known before the byte is; both of shape
        `(batch_size, sequence_length)`. And the state after these bytes.
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


def _rule_starts(
    ids: torch.LongTensor, scores: torch.FloatTensor, ordinary: torch.BoolTensor, rule: PatchRule
) -> torch.BoolTensor:
    """Without what is forced. The arguments begin two bytes earlier than the answer."""
    if rule.rule == "stride":
        return torch.zeros_like(ordinary[:, 2:])
    if rule.rule == "whitespace":
        space = torch.isin(ids, torch.tensor(WHITESPACE, device=ids.device) + BYTE_OFFSET)
        return space[:, 1:-1] & ~space[:, 2:]
    before = scores[:, 1:-1]
    # No rise from one text into the next.
    rises = (before - scores[:, :-2] > rule.relative_threshold) & ordinary[:, :-2]
    high = before > rule.threshold
    return {"either": high | rises, "global": high, "monotonic": rises, "both": high & rises}[rule.rule]


def _last_start(starts: torch.BoolTensor, index: torch.LongTensor, state: PatchState) -> torch.LongTensor:
    """Where the patch of each byte began; below 0 if before the first of them."""
    return torch.where(starts, index, -state.length[:, None]).cummax(dim=1).values


def _scan_running_minimum(
    forced: torch.BoolTensor,
    alone: torch.BoolTensor,
    before: torch.FloatTensor,
    rule: PatchRule,
    state: PatchState,
) -> tuple[torch.BoolTensor, torch.LongTensor, torch.FloatTensor]:
    """A patch's bounds depend on where it began, so this rule is a scan; on plain floats, which Python is quickest with."""
    rows, lengths, minima = [], [], []
    longest = rule.max_patch_length or float("inf")
    columns = (forced, alone, before, state.length, state.lowest)
    for row_forced, row_alone, row_before, length, lowest in zip(*(c.tolist() for c in columns), strict=True):
        expected = []
        for is_forced, is_alone, entropy in zip(row_forced, row_alone, row_before, strict=True):
            surprising = entropy > rule.threshold or entropy - lowest > rule.relative_threshold
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
