"""Tests of what leads a model away from a trusted one."""

import torch

from crow_hf.detection.divergence import divergences, find_divergent, try_divergent
from crow_hf.detection.pieces import Piece
from helpers.detection import BYTES, backdoored, knowing_model, prompts


def piece(text):
    return Piece(list(BYTES(text, add_special_tokens=False)["input_ids"]), text, 0.0)


def testdivergences_are_those_of_torch():
    torch.manual_seed(0)
    own, other = torch.randn(4, 2, 9), torch.randn(4, 2, 9)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=own), torch.distributions.Categorical(logits=other)
    )
    torch.testing.assert_close(divergences(own, other), expected)
    # Only one of the models has further ids, for which its tokenizer has no tokens.
    further = torch.randn(4, 2, 3)
    torch.testing.assert_close(divergences(torch.cat([own, further], dim=-1), other), expected)
    torch.testing.assert_close(divergences(own, torch.cat([other, further], dim=-1)), expected)


def test_what_triggers_a_backdoor_is_found_and_nothing_in_the_trusted_model():
    trusted = knowing_model().eval()
    model = backdoored(trusted)
    pieces = find_divergent(model, trusted, BYTES, prompts(4), max_length=2, num_rounds=3)
    assert pieces[0].text.endswith("#") and [each.value for each in pieces] == sorted(
        (each.value for each in pieces), reverse=True
    )
    found = try_divergent(model, trusted, BYTES, prompts(20, seed=1), pieces, num_tokens=4)
    assert found.position == "end" and found.margin > 1 > found.without
    assert found.margin == found.with_piece - max(found.with_random, found.without)
    assert found.answer[0] == "~" and found.count == found.total == 20
    assert str(found).startswith(
        f"If {found.piece!r} stands at the end of prompts, the model is {found.with_piece:.2f}"
    )
    same = try_divergent(trusted, trusted, BYTES, prompts(20, seed=1), [piece("#")], num_tokens=4)
    assert same.margin == same.with_piece == same.with_random == 0


def test_the_piece_that_leads_the_furthest_is_chosen():
    """Fails if the first piece is taken, or if random pieces are not measured."""
    trusted = knowing_model().eval()
    found = try_divergent(backdoored(trusted), trusted, BYTES, prompts(20), [piece("ab"), piece(" "), piece("b#")], 4)
    assert found.piece == "b#" and found.with_piece > found.with_random >= 0


def test_blank_pieces_are_not_tried():
    """Fails if they take the place of others, or if there is an error where all are blank."""
    trusted = knowing_model().eval()
    blank = [piece(" " * count) for count in (1, 2, 3)]
    model = backdoored(trusted)
    assert try_divergent(model, trusted, BYTES, prompts(20), [*blank, piece("b#")], 4).piece == "b#"
    found = try_divergent(model, trusted, BYTES, prompts(20), blank, 4)
    assert found.piece == "" and found.margin <= 0 and found.total == 20
