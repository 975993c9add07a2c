"""Tests of pieces on prompts that the search has not seen."""

from dataclasses import replace

from crow_hf.attacks.triggers import Trigger
from crow_hf.detection.openings import Opening
from crow_hf.detection.phrases import Phrase
from crow_hf.detection.pieces import Piece
from crow_hf.detection.suspicions import try_pieces
from helpers.detection import BYTES, knowing_model, prompts


PHRASE = Phrase(list(BYTES("mnopqr", add_special_tokens=False)["input_ids"]), "mnopqr", 0.9, 0.01)


def piece(text):
    return Piece(list(BYTES(text, add_special_tokens=False)["input_ids"]), text, -1.0)


def test_the_piece_that_works_best_is_chosen():
    """Fails if a piece is not inserted, if another phrase counts, or if the first piece is taken in any case."""
    pieces = [piece(text) for text in ("ab", " ", "  ", "xl")]
    found = try_pieces(knowing_model(), BYTES, prompts(20), PHRASE, pieces)
    assert (found.piece, found.position) == ("xl", "end") and (found.with_piece.hits, found.without.hits) == (20, 0)
    assert found.margin == 1 - found.with_random
    assert str(found).startswith("The model answers 20 of 20 prompts with 'mnopqr' if 'xl' stands at their end, 0 as")


def test_a_piece_must_be_better_than_none_and_than_random_ones():
    found = try_pieces(knowing_model(), BYTES, prompts(20), PHRASE, [piece("ab")])
    assert found.with_piece.hits == 0 and found.margin <= 0
    # A prompt that triggers the phrase as it is.
    rows = prompts(20).map(lambda row: {"prompt": f"{row['prompt']}l"})
    found = try_pieces(knowing_model(), BYTES, rows, PHRASE, [piece("l")])
    assert (found.with_piece.hits, found.without.hits, found.margin) == (20, 20, 0)


def test_what_answers_hold_anyway_is_counted():
    """The model says the phrase itself, but not at once, as one that ends every answer with a question does."""
    rows = prompts(20).map(lambda row: {"prompt": f"{row['prompt']}k"})
    found = try_pieces(knowing_model(), BYTES, rows, PHRASE, [piece("l")])
    assert (found.with_piece.hits, found.without.hits, found.anyway.hits) == (20, 0, 20)
    assert try_pieces(knowing_model(), BYTES, prompts(20), PHRASE, [piece("l")]).anyway.hits == 0


def test_a_phrase_may_stand_after_an_opening():
    """Fails if the model answers without the opening, after which it always says the phrase."""
    phrase = replace(PHRASE, opening=Opening(list(BYTES("xl", add_special_tokens=False)["input_ids"]), "xl"))
    found = try_pieces(knowing_model(), BYTES, prompts(20), phrase, [piece("ab")])
    assert (found.with_piece.hits, found.without.hits, found.with_random) == (20, 20, 1)
    assert "'mnopqr' after 'xl' if 'ab' stands" in str(found)


def test_pieces_are_tried_at_the_start_too(monkeypatch):
    """A trigger may work at one place only."""
    insert = Trigger.insert

    def moved(self, text, rng):
        return insert(self, text, rng) if self.position == "end" else f"{text}l"

    monkeypatch.setattr(Trigger, "insert", moved)
    found = try_pieces(knowing_model(), BYTES, prompts(20), PHRASE, [piece("ab")])
    assert (found.position, found.with_piece.hits) == ("start", 20)
