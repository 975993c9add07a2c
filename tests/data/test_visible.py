"""Tests of what is written for characters that do not show."""

import sys
import unicodedata

import pytest

from crow_hf.data.visible import glyph, is_blank, printable, visible


# Default-ignorable characters and fillers of all kinds, whatever their category.
BLANKS = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u180b\u180e\u200b\u200d\u2060\u2800\u3164\ufe00\ufe0f\ufeff\uffa0\U000e0101"
)
READABLE = "naïve Ωμέγα кот 漢字 مرحبا 👍🏽 नमस्ते ´¨ ½ €"


def test_text_that_shows_is_not_changed():
    assert visible(READABLE) == printable(READABLE) == READABLE and not is_blank(READABLE)
    assert visible("") == printable("") == ""


def test_every_character_that_does_not_show_is_written_out():
    """What remains is neither a control, a separator, a format character nor half of one, in the planes in use."""
    hidden = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    for code in [*range(0x20000), *range(0xE0000, 0xE1000), sys.maxunicode]:
        letter = chr(code)
        if unicodedata.category(letter) in hidden or (letter.isspace() and letter != " "):
            assert glyph(letter) != letter and glyph(letter).isprintable(), hex(code)


@pytest.mark.parametrize("letter", BLANKS)
def test_blanks_are_written_out_and_are_nothing(letter):
    assert visible(f"a{letter}b") == printable(f"a{letter}b") == f"a<U+{ord(letter):04X}>b"
    assert is_blank(letter) and is_blank(f" {letter}\n\t") and not is_blank(f"{letter}.")


def test_signs_stand_for_controls_and_bytes():
    text = "\x1b]0;owned\x07 \u202e \x9b2J \udcff\r\x7f\n\tx"
    shown = "␛]0;owned␇ <U+202E> <U+009B>2J \\xff␍␡"
    assert visible(text) == f"{shown}⏎\n⇥x" and printable(text) == f"{shown}\n\tx"
    # Half of a letter is no answer that is empty.
    assert visible("\ud800") == "<U+D800>" and not is_blank("\ud800")
