"""Tests of the patch rules, against a slow reference and against results by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crow_hf.models.boundaries import RULES, PatchRule, PatchState, continue_patches, patch_starts
from crow_hf.models.byte_vocabulary import BYTE_OFFSET, EOS_TOKEN_ID, PAD_TOKEN_ID


NEWLINE_ID = ord("\n") + BYTE_OFFSET
IDS = st.sampled_from([0, 1, 2, 260, PAD_TOKEN_ID, NEWLINE_ID, 32 + BYTE_OFFSET, 97 + BYTE_OFFSET, BYTE_OFFSET, 259])
ENTROPIES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1.5])
SEQUENCES = st.lists(st.tuples(IDS, ENTROPIES), min_size=1, max_size=25)


@st.composite
def rules(draw):
    rule = draw(st.sampled_from(RULES))
    longest = draw(st.integers(1, 5) if rule == "stride" else st.none() | st.integers(1, 5))
    return PatchRule(rule, 0.8 / 8, 0.3 / 8, draw(st.booleans()), longest)


def is_byte(token):
    return BYTE_OFFSET <= token < BYTE_OFFSET + 256


def slow_starts(ids, entropies, rule):
    """Apply the table of rules one byte at a time."""
    starts, begin = [], 0
    for t in range(len(ids)):
        start = t == 0 or not (is_byte(ids[t]) or ids[t] in (EOS_TOKEN_ID, PAD_TOKEN_ID)) or not is_byte(ids[t - 1])
        start = start or (rule.reset_on_newline and ids[t - 1] == NEWLINE_ID)
        if not start:
            entropy = entropies[t - 1]
            rise = entropy - entropies[t - 2] if t >= 2 and is_byte(ids[t - 2]) else float("-inf")
            lowest = min(entropies[begin : t - 1], default=float("inf"))
            high, rises = entropy > 8 * rule.threshold, rise > 8 * rule.relative_threshold
            start = {
                "either": high or rises,
                "global": high,
                "monotonic": rises,
                "both": high and rises,
                "running_minimum": high or entropy - lowest > 8 * rule.relative_threshold,
                "stride": False,
                "whitespace": chr(ids[t - 1] - 4) in " \t\n\r\v\f" and ids[t] - 4 not in list(b" \t\n\r\v\f"),
            }[rule.rule] or t - begin == rule.max_patch_length
        begin = t if start else begin
        starts.append(start)
    return starts


@settings(max_examples=400, deadline=None)
@given(SEQUENCES, rules())
def test_rules_equal_the_slow_reference(sequence, rule):
    ids, entropies = zip(*sequence, strict=True)
    starts = patch_starts(torch.tensor([ids]), torch.tensor([entropies]), rule)
    assert starts[0].tolist() == slow_starts(ids, entropies, rule)


@settings(max_examples=100, deadline=None)
@given(st.lists(SEQUENCES, min_size=2, max_size=4), rules(), st.data())
def test_starts_do_not_depend_on_other_rows_or_later_bytes(rows, rule, data):
    """A row gives the same starts alone and in a batch, and a prefix gives a prefix of the starts."""
    length = max(map(len, rows))
    ids = torch.tensor([[token for token, _ in row] + [PAD_TOKEN_ID] * (length - len(row)) for row in rows])
    entropies = torch.tensor([[entropy for _, entropy in row] + [0.0] * (length - len(row)) for row in rows])
    together = patch_starts(ids, entropies, rule)
    for number, row in enumerate(rows):
        end = data.draw(st.integers(1, len(row)))
        alone = patch_starts(ids[number : number + 1, :end], entropies[number : number + 1, :end], rule)
        assert torch.equal(alone[0], together[number, :end])


@pytest.mark.parametrize(
    ("rule", "lengths"),
    [
        (PatchRule("global", 1 / 8), [3, 2, 1]),
        (PatchRule("monotonic", 1 / 8, 0.5 / 8), [3, 3]),
        (PatchRule("both", 1 / 8, 0.5 / 8), [3, 3]),
        (PatchRule("either", 1 / 8, 0.25 / 8), [2, 1, 2, 1]),
        (PatchRule("running_minimum", 1.0, 0.75 / 8), [3, 3]),
        (PatchRule("stride", max_patch_length=4), [4, 2]),
        (PatchRule("global", 1.0, max_patch_length=4), [4, 2]),
    ],
)
def test_by_hand(rule, lengths):
    """
    Each entropy is about the next byte: the third byte has 0.5 bits, the fourth 1.25, and so on. Thresholds are shares
    of 8 bits.
    """
    ids = torch.arange(100, 106)[None]
    entropies = torch.tensor([[0.1, 0.5, 1.25, 0.9, 1.1, 7.0]])
    starts = patch_starts(ids, entropies, rule)[0].nonzero().flatten()
    assert torch.diff(starts, append=torch.tensor([6])).tolist() == lengths


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"rule": "best"}, "best"),
        ({"max_patch_length": 0}, "at least 1"),
        ({"rule": "stride"}, "max_patch_length"),
        ({"threshold": 1.335}, "between 0 and 1"),
    ],
)
def test_bad_rules_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        PatchRule(**kwargs)


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, rules(), st.data())
def test_pieces_of_a_row_give_the_same_starts(sequence, rule, data):
    """Later boundaries depend on the earlier bytes only through the state, wherever the row is cut."""
    ids, entropies = (torch.tensor([column]) for column in zip(*sequence, strict=True))
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, len(sequence))))), len(sequence)]
    state, pieces = PatchState.initial(1), []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        if begin < end:
            starts, _, state = continue_patches(ids[:, begin:end], entropies[:, begin:end], rule, state)
            pieces.append(starts)
    assert torch.equal(torch.cat(pieces, dim=1), patch_starts(ids, entropies, rule))


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, rules())
def test_expected_starts_do_not_depend_on_the_next_byte(sequence, rule):
    """The second mask says whether any byte at this position would start a patch."""
    if rule.rule == "whitespace":
        return
    ids, entropies = (torch.tensor([column]) for column in zip(*sequence, strict=True))
    _, expected, _ = continue_patches(ids, entropies, rule, PatchState.initial(1))
    for t in range(1, len(sequence)):
        ids_with_byte = torch.cat([ids[:, :t], torch.tensor([[97 + BYTE_OFFSET]])], dim=1)
        assert expected[0, t] == patch_starts(ids_with_byte, entropies[:, : t + 1], rule)[0, t]


def test_the_end_token_does_not_start_a_patch_of_its_own():
    """Fails if the boundaries reveal the end of a text, which the model has to predict."""
    ids = torch.tensor([[1, 101, 102, EOS_TOKEN_ID, 103]])
    calm, surprised = torch.zeros(1, 5), torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])
    rule = PatchRule("global", 0.1)
    assert patch_starts(ids, calm, rule)[0].tolist() == [True, True, False, False, True]
    assert patch_starts(ids, surprised, rule)[0].tolist() == [True, True, False, True, True]
