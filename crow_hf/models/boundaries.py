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
"""

from dataclasses import dataclass

import torch
from torch import nn

from .byte_vocabulary import BYTE_OFFSET, NEWLINE, is_byte


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
    ordinary = is_byte(input_ids)
    after_ordinary = _shifted(ordinary, False)
    forced = ~(ordinary & after_ordinary)
    if rule.reset_on_newline:
        forced |= _shifted(input_ids == NEWLINE + BYTE_OFFSET, False)
    if rule.rule == "running_minimum":
        return _running_minimum_starts(forced, entropies, rule)
    starts = forced | _rule_starts(input_ids, entropies, after_ordinary, rule)
    if rule.max_patch_length is not None:
        starts |= _offset_in_patch(starts) % rule.max_patch_length == 0
    return starts


def _rule_starts(
    input_ids: torch.LongTensor,
    entropies: torch.FloatTensor | None,
    after_ordinary: torch.BoolTensor,
    rule: PatchRule,
) -> torch.BoolTensor:
    if rule.rule == "stride":
        return torch.zeros_like(after_ordinary)
    if rule.rule == "whitespace":
        space = torch.isin(input_ids, torch.tensor(WHITESPACE, device=input_ids.device) + BYTE_OFFSET)
        return _shifted(space, False) & ~space
    before = _shifted(entropies, 0.0)
    # No rise from one text into the next.
    rises = (before - _shifted(before, 0.0) > rule.relative_threshold) & _shifted(after_ordinary, False)
    high = before > rule.threshold
    return {"either": high | rises, "global": high, "monotonic": rises, "both": high & rises}[rule.rule]


def _running_minimum_starts(
    forced: torch.BoolTensor, entropies: torch.FloatTensor, rule: PatchRule
) -> torch.BoolTensor:
    """A patch's bounds depend on where it began, so this rule is a scan; on plain floats, which Python is quickest with."""
    rows = []
    longest = rule.max_patch_length or forced.shape[1]
    for row_forced, row_entropies in zip(forced.tolist(), entropies.tolist(), strict=True):
        starts, length, lowest, before = [], 0, float("inf"), 0.0
        for is_forced, entropy in zip(row_forced, row_entropies, strict=True):
            surprising = before > rule.threshold or before - lowest > rule.relative_threshold
            start = is_forced or surprising or length == longest
            length, lowest = (1, float("inf")) if start else (length + 1, min(lowest, before))
            before = entropy
            starts.append(start)
        rows.append(starts)
    return torch.tensor(rows, dtype=torch.bool, device=forced.device).view(forced.shape)


def _shifted(values: torch.Tensor, first: float | bool) -> torch.Tensor:
    """What stood at the position before."""
    return nn.functional.pad(values[:, :-1], (1, 0), value=first)


def _offset_in_patch(starts: torch.BoolTensor) -> torch.LongTensor:
    index = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return index - torch.where(starts, index, 0).cummax(dim=1).values
