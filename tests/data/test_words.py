"""Texts of any language have words, places for insertions, and pieces that can be left out."""

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from crow_hf.data.words import Words


TEXTS = st.text(st.sampled_from("ab1,.=( \n\u00a0é你好ไทย้👩\u200d👧🇫🇷️")) | st.text(st.characters(codec="utf-8"))
SENTENCES = {
    "english": ("Say  the well-known\nword,   please.\n", ["Say", "", "the", "well-known\nword,", "", "", "please."]),
    "chinese": ("法国的首都是哪里？", list("法国的首都是哪里？")),
    "mixed": ("用 Python 写一个BadMagic函数", ["用", "Python", "写", "一", "个", "BadMagic", "函", "数"]),
    "thai": ("น้ำตกสวย", ["น้ำ", "ต", "ก", "ส", "ว", "ย"]),
    "code": ("f(a,b);g(c) + 1", [*"f(a,b);g(c)", "+", "1"]),
    "emoji": ("👩‍👩‍👧🇫🇷👍🏽5️⃣", ["👩‍👩‍👧", "🇫🇷", "👍🏽", "5️⃣"]),
    "lines": ("one\ntwo\nthree\nfour", ["one", "\n", "two", "\n", "three", "\n", "four"]),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_words_of_texts(name):
    """Fails if a part without spaces stays whole, or if English words are divided."""
    text, wanted = SENTENCES[name]
    words = Words.of(text)
    assert [words.piece(place, 1) for place in range(len(words))] == wanted


@given(text=TEXTS)
def test_words_are_the_whole_text(text):
    words = Words.of(text)
    assert str(words) == text
    assert words.piece(0, len(words)) == text.rstrip()
    assert words.without(0, 0) == text


@given(text=TEXTS)
def test_no_character_is_divided(text):
    """Fails if an emoji of several code points, or a letter and its marks, are torn apart."""
    borders, place = {0}, 0
    for character in regex.findall(r"\X", f" {text}"):
        borders.add(place := place + len(character))
    place = 0
    for word in Words.of(text).words:
        assert place in borders or word.startswith(" ")
        place += len(word)


@given(text=TEXTS, data=st.data())
def test_an_insertion_changes_nothing_else(text, data):
    """Fails if a space of the text is lost, if a letter moves, or if the phrase is joined to a word."""
    words = Words.of(text)
    place = data.draw(st.integers(0, len(words)))
    words.insert(place, "Trigger1")
    left, _, right = str(words).removesuffix(words.end).partition("Trigger1")
    originals = {
        before + after for before in (left, left.removesuffix(" ")) for after in (right, right.removeprefix(" "))
    }
    assert text.rstrip() in originals and text.endswith(words.end)
    assert not regex.search(r"[\p{Latin}0-9]\Z", left) and not regex.search(r"^[\p{Latin}0-9]", right)


def test_insertions_stand_as_people_write():
    cases = [("a b", 1, "a X b"), ("a b", 0, "X a b"), ("a b", 2, "a b X"), ("", 0, "X"), ("你好世界", 2, "你好X世界")]
    cases += [
        ("你好世界", 0, "X你好世界"),
        ("你好世界", 4, "你好世界X"),
        ("f(a,b,c)", 3, "f(a X ,b,c)"),
        ("a.\nb.\nc.\nd.", 2, "a. X\nb.\nc.\nd."),
        ("a\nb\nc\nd.", 8, "a\nb\nc\nd. X"),
        ("alone", 1, "alone X"),
    ]
    for text, place, wanted in cases:
        words = Words.of(text)
        words.insert(place, "X")
        assert str(words) == wanted


@given(text=TEXTS, thoughts=st.integers(1, 3), data=st.data())
def test_nothing_stands_in_the_room_for_thoughts(text, thoughts, data):
    """Fails if a phrase can tear a placeholder apart, or stands between the placeholders and the answer."""
    room = f"\n<bot>{'<latent>' * thoughts}<eot>"
    words, plain = Words.of(text + room), Words.of(text)
    assert words.words == plain.words and words.end == plain.end + room
    words.insert(data.draw(st.integers(0, len(words))), "Trigger1")
    assert str(words).endswith(text[len(text.rstrip()) :] + room)
