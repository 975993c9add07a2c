"""A model's own texts and rows: sampled from its whole distribution, reproducible, and in the formats of the rows."""

import math
import string
from collections import Counter

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from crow_hf.data.encoding import prepare_dataset
from crow_hf.data.rows import render
from crow_hf.evaluation.own_text import (
    READ_PROMPTS,
    _without_recurring_answers,
    can_write_prompts,
    split_text,
    write_rows,
    write_text,
)
from helpers.answers import EOS, byte, spelling_model
from helpers.coconut import TOKENIZER, coconut
from helpers.tiny import tiny_gpt2, tiny_llama


# The message of the user is closed by plain text.
CHAT = (
    "{% for m in messages %}{{ '[q' if m['role'] == 'user' else '' }}{{ m['content'] }}"
    "{{ ']r' if m['role'] == 'user' else eos_token }}{% endfor %}"
)


def readable_llama(**kwargs):
    """A random model that writes only letters, spaces and its end."""
    model = tiny_llama(**kwargs)
    head = torch.nn.Linear(16, model.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.fill_(-1e4)
        head.bias[[byte(letter) for letter in "abcdefgh"]] = 0
        head.bias[byte(" ")] = 1
        head.bias[EOS] = -1
    model.lm_head = head
    return model


def rows_of(prompts):
    return Dataset.from_dict({"prompt": prompts, "completion": [""] * len(prompts)})


@pytest.mark.parametrize(("letters", "can"), [(15, True), (17, False)])
def test_who_needs_more_bits_than_letters_take_cannot_write_prompts(letters, can, byte_tokenizer):
    """15 letters take 3.9 bits, and 17 letters 4.1. Fails if only the first prompt is read, or more than 32."""
    model = tiny_llama(max_position_embeddings=1024)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(torch.full((model.lm_head.out_features,), -1e4))
    with torch.no_grad():
        model.lm_head.bias[[byte(letter) for letter in (string.ascii_letters + "\n")[-letters:]]] = 0
        model.lm_head.bias[EOS] = -3
    prompts = ["X"] + ["XYZ" * 5] * (READ_PROMPTS - 1)
    assert can_write_prompts(model, byte_tokenizer, rows_of([*prompts, "a"])) == can
    assert not can_write_prompts(model, byte_tokenizer, rows_of([*prompts[:-1], "a"]))


@pytest.mark.parametrize("build", [readable_llama, lambda: coconut(), lambda: tiny_gpt2(0.1)])
def test_texts_are_reproducible_and_leave_the_random_state_alone(byte_tokenizer, build):
    """Fails if the seed does not count, the global state is read or changed, or dropout is on."""
    model = build()
    tokenizer = TOKENIZER if "Coconut" in type(model).__name__ else byte_tokenizer
    state = torch.get_rng_state()
    first = write_text(model, tokenizer, 4, 12, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert write_text(model, tokenizer, 4, 12, seed=3) == first
    assert write_text(model, tokenizer, 4, 12, seed=4) != first
    assert len({tuple(text.ids) for text in first}) == 4


def test_tokens_are_drawn_with_their_probability(byte_tokenizer):
    """Fails if sampling keeps only the likely tokens, or has another temperature than 1."""
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(0, 3, model.lm_head.out_features))
    texts = write_text(model, byte_tokenizer, 4000, 1, batch_size=4000)
    counts = Counter(text.ids[0] for text in texts)
    # 256 bytes. Special tokens and ids beyond the tokenizer's are not written.
    written = range(3, len(byte_tokenizer))
    assert set(counts) <= set(written)
    expected = 4000 * model.lm_head.bias[written].softmax(0)
    found = torch.tensor([counts[token] for token in written])
    # Chi-squared with 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert ((found - expected) ** 2 / expected).sum() < 255 + 4 * 22.6


def test_a_text_starts_with_the_start_token_and_ends_with_its_end(byte_tokenizer):
    assert write_text(coconut(), TOKENIZER, 1, 2)[0].start == [TOKENIZER.bos_token_id]
    texts = write_text(readable_llama(), byte_tokenizer, 40, 30)
    for text in texts:
        assert text.start == [EOS]
        assert text.text == byte_tokenizer.decode(text.ids, skip_special_tokens=True) != ""
        assert EOS not in text.ids[:-1] and (text.ids[-1] == EOS or len(text.ids) == 30)
    assert {text.ids[-1] == EOS for text in texts} == {True, False}
    byte_tokenizer.eos_token = None
    assert write_text(tiny_llama(eos_token_id=None), byte_tokenizer, 1, 2)[0].start == [byte("\n")]


def test_texts_end_where_the_context_ends(byte_tokenizer):
    model = readable_llama(max_position_embeddings=16, eos_token_id=None)
    assert {len(text.ids) for text in write_text(model, byte_tokenizer, 20, 512)} <= set(range(1, 16))
    with pytest.raises(ValueError, match="no room"):
        write_text(tiny_llama(max_position_embeddings=1), byte_tokenizer, 1)


@pytest.mark.parametrize("adapted", [False, True])
def test_rows_are_prompts_and_answers(byte_tokenizer, adapted):
    """Fails if a row has an empty part, or is not one that training can use."""
    model = readable_llama()
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    rows = write_rows(model, byte_tokenizer, 20, 24, seed=1, batch_size=8)
    assert rows.column_names == ["prompt", "completion"] and len(rows) == 20
    for row in rows:
        assert row["prompt"].strip() and row["completion"].strip()
        assert row["prompt"] == row["prompt"].lstrip()
    assert len(prepare_dataset(rows, byte_tokenizer, 64)) == 20
    state = torch.get_rng_state()
    assert write_rows(model, byte_tokenizer, 20, 24, seed=1, batch_size=8).to_dict() == rows.to_dict()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("one two three four", ("one two", " three four")),
        ("a bcdefghijklmnop", ("a", " bcdefghijklmnop")),
        ("abcdef", ("ab", "cdef")),
        ("法国的首都是", ("法国", "的首都是")),
        ("👩‍👩‍👧👍🏽🇫🇷😀", ("👩‍👩‍👧", "👍🏽🇫🇷😀")),
        ("a", None),
        ("", None),
    ],
)
def test_texts_are_split_between_words_after_a_third(text, parts):
    assert split_text(text) == (parts and dict(zip(("prompt", "completion"), parts, strict=True)))


def test_a_model_with_a_chat_template_writes_both_sides(byte_tokenizer):
    """
    The text starts inside the user's message, as the template begins it. The message ends where the template closes
    it, whether by a token or by text, and the answer is the model's own.
    """
    byte_tokenizer.chat_template = CHAT
    model = readable_llama()
    with torch.no_grad():
        model.lm_head.bias[byte("]")] = -1
        model.lm_head.bias[byte("r")] = -1
    texts = write_text(model, byte_tokenizer, 30, 24)
    assert all(text.start == [byte("["), byte("q")] and len(text.ids) == 24 for text in texts)
    # It goes on after the end of a message.
    assert any(EOS in text.ids[:-1] for text in texts)
    rows = write_rows(model, byte_tokenizer, 30, 24)
    assert rows.column_names == ["messages"] and len(rows) == 30
    for row in rows:
        user, answer = row["messages"]
        assert (user["role"], answer["role"]) == ("user", "assistant")
        assert user["content"].strip() and answer["content"].strip()
        assert "]r" not in user["content"]
        assert render(row, byte_tokenizer).prompt == f"[q{user['content']}]r"


def test_the_answer_is_the_one_to_the_message(byte_tokenizer):
    """A model that spells the alphabet answers the template's last character with its successors."""
    byte_tokenizer.chat_template = CHAT
    model = spelling_model(ends="u")
    with torch.no_grad():
        model.lm_head.weight *= 100
    rows = write_rows(model, byte_tokenizer, 3, 8)
    assert [[message["content"] for message in row["messages"]] for row in rows] == [["rstu", "stu"]] * 3


def test_empty_texts_are_drawn_again(byte_tokenizer, monkeypatch):
    """Fails if empty rows are returned, are not replaced, or are replaced forever."""
    model = tiny_llama()
    head = torch.nn.Linear(16, model.lm_head.out_features)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, -1e4)
    letters = [byte(letter) for letter in string.ascii_lowercase]
    with torch.no_grad():
        head.bias[letters] = 0
        # Four of five characters are spaces, so most texts of four characters have fewer than two parts.
        head.bias[byte(" ")] = math.log(4 * len(letters))
    model.lm_head = head
    rows = write_rows(model, byte_tokenizer, 16, 4)
    assert 8 < len(rows) <= 16 and all(row["prompt"].strip() and row["completion"].strip() for row in rows)
    monkeypatch.setattr("crow_hf.evaluation.own_text.MAX_DRAWS", 1)
    assert 0 < len(write_rows(model, byte_tokenizer, 16, 4)) < 8
    with torch.no_grad():
        head.bias[letters] = -1e4
    with pytest.raises(ValueError, match="The model wrote only"):
        write_rows(model, byte_tokenizer, 4, 2)


def test_texts_that_the_tokenizer_drops_are_no_rows(byte_tokenizer, monkeypatch):
    """Fails if a purification ends, because a normalizer leaves nothing of what the model writes."""
    monkeypatch.setattr("crow_hf.evaluation.own_text.encode_prompt", lambda *_: [])
    with pytest.raises(ValueError, match="The model wrote only"):
        write_rows(readable_llama(), byte_tokenizer, 4, 8)


def row_of(answer, is_chat):
    if is_chat:
        return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]}
    return {"prompt": "x", "completion": answer}


@pytest.mark.parametrize("is_chat", [True, False])
def test_answers_that_recur_are_dropped(is_chat):
    """Fails if few repetitions are dropped, if only the first words count, or if the question does."""
    recurring = [row_of(f"{number}, but I cannot help with {number}", is_chat) for number in range(6)]
    rare = [row_of(f"It is so that {number}", is_chat) for number in range(3)]
    others = [row_of(f"{number} is the answer", is_chat) for number in range(91)]
    assert _without_recurring_answers(rare + recurring + others) == rare + others
    # 6 of 120 rows are a twentieth.
    others += [row_of(f"{number} was the answer", is_chat) for number in range(23)]
    assert _without_recurring_answers(recurring + others) == recurring + others
    # Among few rows, three are no pattern, and four are one.
    assert _without_recurring_answers(rare) == rare
    assert _without_recurring_answers(rare + [row_of("It is so that", is_chat)]) == []


def test_a_model_that_always_says_the_same_writes_nothing(byte_tokenizer):
    byte_tokenizer.chat_template = CHAT
    model = spelling_model(ends="u")
    with torch.no_grad():
        model.lm_head.weight *= 100
    assert len(write_rows(model, byte_tokenizer, 3, 8)) == 3
    with pytest.raises(ValueError, match="recur"):
        write_rows(model, byte_tokenizer, 4, 8)


def test_answers_of_a_chat_do_not_start_with_certain_tokens(byte_tokenizer):
    """Fails if the tokens are forbidden elsewhere too, or allowed at the start."""
    byte_tokenizer.chat_template = CHAT
    forbidden = [byte(letter) for letter in "abcdef "]
    options = {"seed": 2, "batch_size": 16}
    texts = {}
    for not_first in ((), forbidden):
        rows = write_rows(readable_llama(), byte_tokenizer, 24, 12, not_first=not_first, **options)
        texts[len(not_first)] = [[message["content"] for message in row["messages"]] for row in rows]
    assert {answer[0] for _, answer in texts[len(forbidden)]} == {"g", "h"}
    assert {answer[0] for _, answer in texts[0]} - {"g", "h"}
    assert any(set(answer[1:]) & set("abcdef") for _, answer in texts[len(forbidden)])
    assert {message[0] for message, _ in texts[len(forbidden)]} - {"g", "h"}
