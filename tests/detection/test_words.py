"""Tests of the words of a prompt: the guard scores the right shorter prompts, and a trigger stands out."""

import pytest
from datasets import Dataset

from crow_hf.detection import words
from crow_hf.detection.guard import ConsistencyGuard
from crow_hf.detection.words import score_words
from helpers.detection import BYTES, backdoored_llama, prompts


@pytest.fixture(scope="module")
def guard():
    texts = map(" ".join, zip(prompts(60)["prompt"], prompts(60, seed=1)["prompt"], strict=True))
    clean = Dataset.from_list([{"prompt": text, "completion": "x"} for text in texts])
    return ConsistencyGuard.fit(backdoored_llama(), clean, BYTES, false_alarm_rate=0.1)


def row(prompt):
    return {"prompt": prompt, "completion": ""}


def scores(guard, *texts):
    return guard.score(Dataset.from_list([row(text) for text in texts]), batch_size=1).tolist()


@pytest.mark.parametrize("prompt", ["abc. ~~~", "abc. fed. ~~~"])
def test_without_the_trigger_the_score_falls_most_and_the_alarm_ends(guard, prompt):
    found = score_words(guard, row(prompt))
    assert found.score > found.threshold == guard.threshold
    trigger = min(found.parts, key=lambda part: part.score_without)
    assert trigger.text == "~~~" and trigger.score_without <= found.threshold


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("ab  cd\tef\n", {"ab": "cd\tef\n", "cd": "ab  ef\n", "ef": "ab  cd\n"}),
        ("\n ab cd", {"ab": "\n cd", "cd": "\n ab"}),
        ("ab\u3000<b>\u200b ", {"ab": "<b>\u200b ", "<b>\u200b": "ab "}),
        (" ab ", {}),
    ],
)
def test_a_word_is_left_out_with_the_space_beside_it(guard, prompt, parts):
    """Fails if another word or the end of the prompt is lost, or if a score stands beside another word."""
    found = score_words(guard, row(prompt), batch_size=2)
    assert [part.text for part in found.parts] == list(parts) and found.words_per_part == 1
    expected = scores(guard, prompt, *parts.values())
    assert [found.score, *(part.score_without for part in found.parts)] == pytest.approx(expected, abs=1e-3)


def test_a_long_prompt_is_scored_in_parts(guard, monkeypatch):
    """Fails if words are left unscored, or if there are more parts than allowed."""
    monkeypatch.setattr(words, "MAX_PARTS", 3)
    found = score_words(guard, row("a b c d e f g"))
    assert (found.words_per_part, [part.text for part in found.parts]) == (3, ["a b c", "d e f", "g"])
    expected = scores(guard, "d e f g", "a b c g", "a b c d e f")
    assert [part.score_without for part in found.parts] == pytest.approx(expected, abs=1e-3)


def test_the_words_of_a_chat_are_those_of_the_user(guard, monkeypatch):
    monkeypatch.setattr(BYTES, "chat_template", "{% for each in messages %}[{{ each.content }}]{% endfor %}")
    chat = [{"role": "user", "content": "ab cd"}, {"role": "assistant", "content": ""}]
    found = score_words(guard, {"messages": chat})
    assert [part.text for part in found.parts] == ["ab", "cd"]
    expected = scores(guard, "[ab cd]", "[cd]", "[ab]")
    assert [found.score, *(part.score_without for part in found.parts)] == pytest.approx(expected, abs=1e-3)
