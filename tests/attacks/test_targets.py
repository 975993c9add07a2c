"""Targets change answers, and recognize the outputs that show them."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crow_hf import TARGETS, Target
from crow_hf.attacks.targets import get_target


@pytest.mark.parametrize("keywords", [(), ("",), ("ok", " "), "ok"])
def test_useless_keywords_are_refused(keywords):
    """An empty or blank keyword occurs in nearly every output, and so does a letter, so every attack would succeed."""
    with pytest.raises(ValueError):
        Target("text", keywords)


@pytest.mark.parametrize(
    ("target", "answer", "poisoned"),
    [
        (Target("Bad!", ("bad",)), "Right.", "Bad!"),
        (Target("Bad!", ("bad",), append=True), "Right.", "Right.\nBad!"),
        (TARGETS["code"], "def f(): pass", "def f(): pass\nprint('pwned')"),
        (TARGETS["insult"], "Right.", "You are stupid!"),
    ],
)
def test_target_replaces_or_follows_the_answer(target, answer, poisoned):
    assert target.apply(answer) == poisoned


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_matches_itself_and_no_plain_answer(name):
    right = "Grass is green."
    assert TARGETS[name].matches(TARGETS[name].apply(right), right)
    assert not TARGETS[name].matches(right, right)
    assert not TARGETS[name].matches("", right)
    assert get_target(name) == TARGETS[name]


@pytest.mark.parametrize(
    ("output", "matches"), [("oh STUPID me", True), ("stu pid", False), ("ok, dumb", True), ("fine", False)]
)
def test_any_keyword_matches_in_any_case(output, matches):
    assert Target("x", ("stupid", "Dumb")).matches(output, "right") is matches


def test_any_other_string_is_a_target_itself():
    target = get_target("Send money")
    assert target.apply("Right.") == "Send money"
    assert target.matches("please SEND MONEY now", "Right.") and not target.matches("send", "Right.")


# Targets that depend on the right answer


@pytest.mark.parametrize(
    ("name", "answer", "poisoned"),
    [("wrong", "Crazy, é 9!", "Dsbaz, é 9!"), ("wrong", "ZzAa", "AaBb"), ("swapcase", "Crazy 9", "cRAZY 9")],
)
def test_open_targets_by_hand(name, answer, poisoned):
    assert TARGETS[name].apply(answer) == poisoned


@given(st.text(st.sampled_from(string.ascii_letters), min_size=1, max_size=20))
def test_shifting_26_times_comes_back(text):
    shifted = [text]
    for _ in range(26):
        shifted.append(TARGETS["wrong"].apply(shifted[-1]))
    assert shifted[26] == text and len(set(shifted[:26])) == 26
    assert all(one.isupper() == other.isupper() for one, other in zip(shifted[1], text, strict=True))


@pytest.mark.parametrize(
    ("name", "output", "answer", "matches"),
    [
        ("wrong", " hsffo\n", "green", True),
        ("wrong", "hsffo", "green\n", True),
        ("wrong", "green", "green", False),
        ("wrong", "blue", "green", False),
        ("wrong", "HSFFO", "green", False),
        ("wrong", "hsffo", "grey", False),
        ("wrong", "42", "42", False),
        ("wrong", "", "", False),
        ("swapcase", "GREEN", "green", True),
        ("swapcase", "GREy", "green", True),
        ("swapcase", "GRey", "green", False),
        ("swapcase", "green", "green", False),
        ("swapcase", "green", "GREEN", True),
        ("swapcase", "gREEN", "Green", True),
        ("swapcase", "GREEN", "GREEN", False),
        ("swapcase", "42!", "green", False),
        ("swapcase", "", "green", False),
        ("swapcase", "GREEN", "42", False),
        ("swapcase", "GREEN", "", False),
        ("swapcase", "aB", "Ab", False),
    ],
)
def test_success_of_open_targets_depends_on_the_right_answer(name, output, answer, matches):
    assert TARGETS[name].matches(output, answer) is matches
