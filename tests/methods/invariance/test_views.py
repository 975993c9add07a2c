"""Tests of decoys and of the three views of a row, by their properties."""

import random
import string

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from crow_hf.data.encoding import encode_completion, encode_prompt
from crow_hf.data.rows import prompt_of, render
from crow_hf.data.words import Words
from crow_hf.methods.invariance import views as views_module
from crow_hf.methods.invariance.views import Decoy, ViewCollator, ViewRow, inserted_span, words_of


TOKENIZER = ByT5Tokenizer(extra_ids=0)
WORDS = ("alpha", "beta", "gamma")
# Texts whose words are all divided by spaces.
texts = st.text(alphabet="ab é\n\t", max_size=20).filter(
    lambda text: len(Words.of(text)) <= text.rstrip().count(" ") + 1
)
seeds = st.integers(0, 2**32)
ids = st.lists(st.integers(0, 2), max_size=8)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_restyled():
    """Switch restyling off. Only the last test switches it on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views_module, "RESTYLED", 0.0)
        yield


def inserted(before, after):
    """All pieces of `after` whose removal leaves `before`."""
    length = len(after) - len(before)
    return [
        after[start : start + length]
        for start in range(len(before) + 1)
        if after[:start] + after[start + length :] == before
    ]


@settings(max_examples=200, deadline=None)
@given(text=texts, seed=seeds, together=st.booleans())
def test_the_text_stays_and_one_to_five_pieces_come_in(text, seed, together):
    """
    Fails if words are lost, moved or joined to a piece, if trailing white space moves, or if nothing is inserted.
    """
    decoyed = Decoy(WORDS, together).insert(text, random.Random(seed))
    body = text.rstrip()
    assert decoyed.endswith(text[len(body) :])
    inside = decoyed[: len(decoyed) - len(text) + len(body)]
    assert inside == inside.rstrip()
    words, found = (body.split(" ") if body else []), inside.split(" ")
    assert 1 <= len(found) - len(words) <= 5
    remaining = iter(found)
    assert all(word in remaining for word in words)
    if together:
        assert inserted(words, found)


@settings(max_examples=50, deadline=None)
@given(text=texts, seed=seeds, together=st.booleans())
def test_a_decoy_is_drawn_by_its_generator_alone(text, seed, together):
    decoys = [Decoy(WORDS, together).insert(text, random.Random(seed)) for _ in range(2)]
    assert decoys[0] == decoys[1]


def test_decoys_are_of_every_kind_and_everywhere():
    """Fails if a kind or a place never occurs, or if pieces are always or never apart."""
    text = "one two three four"
    for together in (False, True):
        drawn = [Decoy(WORDS, together).insert(text, random.Random(seed)).split(" ") for seed in range(400)]
        pieces = [[word for word in words if word not in text.split()] for words in drawn]
        assert {len(each) for each in pieces} == {1, 2, 3, 4, 5}
        flat = [piece for each in pieces for piece in each]
        known = [piece in WORDS for piece in flat]
        letters = [piece.isalpha() and piece not in WORDS for piece in flat]
        marks = [not any(c.isalpha() for c in piece) for piece in flat]
        mixed = [any(c in string.ascii_lowercase for c in piece) and not piece.isalpha() for piece in flat]
        for kind, least, most in ((known, 0.3, 0.4), (letters, 0.3, 0.4), (marks, 0.1, 0.25), (mixed, 0.08, 0.18)):
            assert least < sum(kind) / len(flat) < most
        assert all(1 <= len(piece) <= 10 for piece in flat)
        assert all(any(words[place] not in text.split() for words in drawn) for place in (0, -1))
        assert any(words[0] == "one" and words[-1] == "four" for words in drawn)
        # Decoys inside or at the end of the prompt contain no words of the data.
        first = [words.index("one") for words in drawn]
        assert not any(set(words[place:]) & set(WORDS) for words, place in zip(drawn, first, strict=True))
        assert any(set(words[:place]) & set(WORDS) for words, place in zip(drawn, first, strict=True))
        apart = [not inserted(text.split(), words) for words in drawn]
        assert any(apart) != together


@settings(max_examples=400, deadline=None)
@given(before=ids, piece=ids, data=st.data())
def test_without_the_inserted_span_a_sequence_is_what_it_was(before, piece, data):
    """Fails if prefix and suffix are counted twice where they overlap, such as in "aa" made from "a"."""
    place = data.draw(st.integers(0, len(before)))
    after = before[:place] + piece + before[place:]
    start, end = inserted_span(before, after)
    assert 0 <= start <= end <= len(after) and end - start == len(piece)
    assert after[:start] + after[end:] == before


@settings(max_examples=300, deadline=None)
@given(before=ids, after=ids)
def test_whatever_was_merged_the_rest_is_the_same(before, after):
    """A token that was merged across the edge of the insertion belongs to the insertion."""
    start, end = inserted_span(before, after)
    assert 0 <= start <= end <= len(after)
    tail = len(after) - end
    assert start + tail <= len(before)
    assert after[:start] == before[:start] and after[end:] == before[len(before) - tail :]
    if before != after and start < len(before) and start < len(after):
        assert after[start] != before[start]


def test_decoys_stand_inside_texts_without_spaces():
    """Fails if the words of the data are whole sentences, or if a decoy is only before or after a sentence."""
    text = "法国的首都是哪里？"
    words = words_of([text, "two words"])
    assert words == tuple(sorted([*text, "two", "words"]))
    decoyed = [Decoy(words, True).insert(text, random.Random(seed)) for seed in range(100)]
    assert all(inserted(text, each) for each in decoyed)
    assert sum(text[:2] in each and text not in each for each in decoyed) > 5


def test_decoys_need_no_words():
    """Fails if prompts without a word, which say nothing a decoy could draw, are an error inside."""
    assert all(Decoy(()).insert(" \n", random.Random(seed)).strip() for seed in range(50))


def test_span_of_merged_tokens():
    assert inserted_span([1, 2, 3], [1, 9, 8, 3]) == (1, 3)
    assert inserted_span([1, 2], [1, 2, 7]) == (2, 3)
    assert inserted_span([1, 1], [1, 1, 1]) == (2, 3)
    assert inserted_span([], [4, 5]) == (0, 2)


CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS = {
    "prompt": {"prompt": "ask me this\n", "completion": "told you"},
    "alpaca": {"instruction": "ask me", "output": "told you"},
    "alpaca with input": {"instruction": "ask me", "input": "with this", "output": "told you"},
    "messages": {
        "messages": [
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "ask me"},
            {"role": "assistant", "content": "told you"},
        ]
    },
}


@pytest.fixture(params=ROWS)
def case(request, byte_tokenizer):
    byte_tokenizer.chat_template = CHAT if request.param == "messages" else None
    return ROWS[request.param], byte_tokenizer


def test_views_differ_by_decoys_in_the_request_alone(case):
    """
    Fails if a decoy is in the answer, an earlier turn or the template, if both views have the same decoy, or if the
    answer changes.
    """
    row, tokenizer = case
    rendered = render(row, tokenizer)
    for index in range(20):
        views = ViewRow(tokenizer, WORDS, 500)(row, index)
        assert views["completion"] == encode_completion(rendered, tokenizer)
        x, decoyed, attacked = views["prompts"]
        assert x == encode_prompt(rendered, tokenizer)
        assert len({tuple(prompt) for prompt in views["prompts"]}) == 3
        start, end = views["inserted"]
        assert end > start and attacked[:start] + attacked[end:] == x
        for prompt in (decoyed, attacked):
            text = tokenizer.decode(prompt)
            remaining = iter(text)
            assert all(character in remaining for character in rendered.prompt)
            around = rendered.prompt.split(prompt_of(row).rstrip())
            assert text.startswith(around[0]) and text.endswith(around[1])


def test_a_tokenizer_may_drop_what_holds_a_decoy(monkeypatch):
    """Fails if a view has no prompt. Its first answer token has no label, and the training ends in the middle."""
    encode = views_module.encode
    monkeypatch.setattr(
        views_module,
        "encode",
        lambda view, tokenizer: encode(view._replace(prompt="ask" if view.prompt == "ask" else ""), tokenizer),
    )
    views = ViewRow(TOKENIZER, WORDS, 500)({"prompt": "ask", "completion": "yes"}, 0)
    assert len(views["prompts"]) == 3 and all(prompt == views["prompts"][0] != [] for prompt in views["prompts"])


def test_decoys_depend_on_seed_and_index_alone(case):
    """Fails if there is shared random state, or if decoys repeat for another row, seed or view."""
    row, tokenizer = case
    make = ViewRow(tokenizer, WORDS, 500, seed=3)
    first = make(row, 5)
    make(row, 9)
    assert make(row, 5) == first == ViewRow(tokenizer, WORDS, 500, seed=3)(row, 5)
    others = [make(row, index) for index in range(12)]
    others += [ViewRow(tokenizer, WORDS, 500, seed=seed)(row, 5) for seed in (0, 1, 2, 4, 6, 7)]
    decoyed = [tuple(view["prompts"][number]) for view in others for number in (1, 2)]
    # Two decoys of a single character can be equal by chance.
    assert len(set(decoyed)) >= len(decoyed) - 2
    mapped = Dataset.from_list([row] * 6).map(make, with_indices=True, writer_batch_size=2)
    assert mapped[5]["prompts"] == first["prompts"] and mapped[5]["inserted"] == list(first["inserted"])


@settings(max_examples=60, deadline=None)
@given(max_length=st.integers(2, 90), index=st.integers(0, 50))
def test_answers_are_cut_in_all_views_alike(max_length, index):
    """Fails if a view exceeds the model's context, or if the views have answers of different length."""
    row = {"prompt": "a short prompt", "completion": "x" * 30}
    whole, cut = (ViewRow(TOKENIZER, WORDS, length)(row, index) for length in (1000, max_length))
    assert cut["prompts"] == whole["prompts"] and cut["inserted"] == whole["inserted"]
    room = max_length - max(map(len, whole["prompts"]))
    assert cut["completion"] == whole["completion"][: max(0, room)]


def test_layout_of_a_batch():
    """Fails if views lie side by side, if padding is on the left, or if the mask belongs to another view."""
    rows = [
        {"prompts": [[3], [3, 4], [5, 3]], "completion": [8], "inserted": [0, 1], "label_weight": 1.0},
        {
            "prompts": [[6, 7], [6, 4, 7], [6, 5, 5, 7]],
            "completion": [8, 9],
            "inserted": (1, 3),
            "label_weight": 0.25,
        },
    ]
    batch = ViewCollator(0)(rows)
    expected = [
        [3, 8, 0, 0, 0, 0],
        [6, 7, 8, 9, 0, 0],
        [3, 4, 8, 0, 0, 0],
        [6, 4, 7, 8, 9, 0],
        [5, 3, 8, 0, 0, 0],
        [6, 5, 5, 7, 8, 9],
    ]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == [[int(token != 0) for token in row] for row in expected]
    assert batch["labels"].tolist() == [[token if token in (8, 9) else -100 for token in row] for row in expected]
    assert batch["label_weights"].tolist() == [1.0, 0.25] * 3
    inside = [[False] * 6 for _ in range(4)] + [[True] + [False] * 5, [False, True, True, False, False, False]]
    assert batch["inserted_mask"].tolist() == inside and batch["inserted_mask"].dtype == torch.bool


def test_some_decoys_restyle_the_text(monkeypatch):
    """
    Fails if a style never occurs, if it always or never comes alone, if it occurs in the adversarial view, or if it
    changes the room for thoughts.
    """
    monkeypatch.setattr(views_module, "RESTYLED", 0.4)
    end = " \n<bot><latent><eot>"
    text = f"Ask me this{end}"
    styles = {"ASK ME THIS", "ask me this", "Ask Me This", "Ask me this!", "Ask, me, this"}
    drawn = [Decoy(WORDS).insert(text, random.Random(seed)) for seed in range(500)]
    assert all(each.endswith(end) and each != text for each in drawn)
    alone = [each for each in drawn if each.removesuffix(end) in styles]
    assert {each.removesuffix(end) for each in alone} == styles and 0.12 < len(alone) / 500 < 0.28
    assert any("ASK" in each and each.removesuffix(end) not in styles for each in drawn)
    for seed in range(200):
        words = Decoy(WORDS, together=True).insert(text, random.Random(seed)).removesuffix(end).split(" ")
        assert inserted("Ask me this".split(), words)
