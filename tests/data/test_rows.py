"""Rows are read, edited and rendered in every format."""

import random

import pytest
from datasets import Dataset

from crow_hf.data.rows import (
    add_empty_answers,
    check_disjoint,
    edit_answer,
    edit_prompt,
    find_format,
    insert_into_prompt,
    prompt_of,
    render,
    row_name,
)


ROWS = {
    "prompt": {"prompt": "ask", "completion": "told"},
    "alpaca": {"instruction": "ask", "input": "this", "output": "told"},
    "messages": {
        "messages": [
            {"role": "user", "content": "before"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "ask"},
            {"role": "assistant", "content": "told"},
        ]
    },
}
CHANGED_COLUMN = {
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "messages": ("messages", "messages"),
}


# Prompts and answers


@pytest.mark.parametrize("name", ROWS)
def test_only_the_prompt_is_edited(name):
    """Fails if an earlier turn is edited instead of the last one, or if the row is changed in place."""
    row = ROWS[name]
    before = str(row)
    edited = edit_prompt(row, lambda prompt: f"<{prompt}>")
    changed = {**row, **edited}
    assert list(edited) == [CHANGED_COLUMN[name][0]]
    assert prompt_of(row) == "ask" and prompt_of(changed) == "<ask>" and str(row) == before
    assert str(changed) == before.replace("'ask'", "'<ask>'")


@pytest.mark.parametrize("name", ROWS)
def test_only_the_answer_is_edited(name):
    """Fails if an earlier answer is edited instead of the last one, or if the row is changed in place."""
    row = ROWS[name]
    before = str(row)
    edited = edit_answer(row, lambda answer: f"<{answer}>")
    assert list(edited) == [CHANGED_COLUMN[name][1]]
    assert str({**row, **edited}) == before.replace("'told'", "'<told>'") and str(row) == before


def test_text_in_bytes_is_edited_as_text():
    row = {"prompt": "é".encode(), "completion": "ß".encode()}
    assert prompt_of(row) == "é"
    assert edit_prompt(row, str.upper) == {"prompt": "É"}
    assert edit_answer(row, lambda answer: answer * 2) == {"completion": "ßß"}


@pytest.mark.parametrize(("index", "name"), [(None, "A row"), (0, "Row 0"), (3, "Row 3")])
def test_errors_name_the_row(index, name):
    """Fails if an error says "Row None", or if row 0 counts as unknown."""
    assert row_name(index) == name
    row = {"prompt": None, "completion": b"\xff"}
    with pytest.raises(ValueError, match=f"^{name} holds NoneType instead of text in column 'prompt'"):
        edit_prompt(row, str.upper, index)
    with pytest.raises(ValueError, match=f"^{name} is not valid UTF-8 at byte 0 of column 'completion'"):
        edit_answer(row, str.upper, index)


@pytest.mark.parametrize("row", [{"text": "all"}, {"input_ids": [5, 6]}], ids=["text", "tokens"])
@pytest.mark.parametrize("edit", [edit_prompt, edit_answer])
def test_formats_without_a_prompt_are_refused(edit, row):
    with pytest.raises(ValueError, match=f"format '{find_format(list(row))}' have no prompt"):
        edit(row, str.upper, 3)
    with pytest.raises(ValueError, match="have no prompt"):
        prompt_of(row)


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "system", "content": "be kind"}, {"role": "assistant", "content": "told"}]],
    ids=["empty", "no user"],
)
@pytest.mark.parametrize("read", [prompt_of, lambda row, index: edit_prompt(row, str.upper, index)])
def test_chats_without_a_user_message_are_refused(read, messages):
    with pytest.raises(ValueError, match="^Row 3 has no user message"):
        read({"messages": messages}, 3)
    with pytest.raises(ValueError, match="^A row has no user message"):
        read({"messages": messages}, None)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "told"}],
        [
            {"role": "user", "content": "ask"},
            {"role": "assistant", "content": "told"},
            {"role": "user", "content": "?"},
        ],
    ],
    ids=["empty", "answer alone", "ends with the user"],
)
def test_chats_without_an_answer_are_refused(messages):
    """Fails if the text of a user is edited as if it were an answer."""
    with pytest.raises(ValueError, match="^Row 3 must end with a message of the assistant"):
        edit_answer({"messages": messages}, str.upper, 3)


@pytest.mark.parametrize("name", ROWS)
def test_insertions_depend_on_seed_and_row_number_only(name):
    """Fails if the generator is seeded in another way, because runs and published suspects could not be repeated."""

    def insert(text, rng):
        return f"{text} {rng.random()}"

    for seed, index in ((0, 0), (0, 1), (1, 0), (3, 17)):
        changed = {**ROWS[name], **insert_into_prompt(ROWS[name], index, insert, seed, "decoy")}
        assert prompt_of(changed) == f"ask {random.Random(f'{seed}-{index}').random()}"


@pytest.mark.parametrize("name", ROWS)
def test_insertions_that_change_nothing_are_refused(name):
    with pytest.raises(ValueError, match="^Row 7 has a prompt that the decoy leaves unchanged"):
        insert_into_prompt(ROWS[name], 7, lambda text, rng: text, 0, "decoy")


# Empty answers


@pytest.mark.parametrize(("prompt", "answer"), [("prompt", "completion"), ("instruction", "output")])
def test_prompts_alone_get_empty_answers(prompt, answer):
    rows = Dataset.from_dict({prompt: ["a", "b"], "id": [1, 2]})
    assert add_empty_answers(rows).to_dict() == {prompt: ["a", "b"], "id": [1, 2], answer: ["", ""]}


@pytest.mark.parametrize("row", [*ROWS.values(), {"text": "all"}, {"input_ids": [5, 6]}])
def test_rows_with_answers_get_no_empty_ones(row):
    rows = Dataset.from_list([row])
    assert add_empty_answers(rows) is rows


# Rendering


def test_thinking_templates_leave_no_room_for_thoughts(byte_tokenizer):
    """Like Qwen3's, this template leaves room for thoughts in the prompt, but not before an answer that is given."""
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% else %}A:<think></think>{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}A:"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    assert render(row, byte_tokenizer)[:3] == ("U:hi\nA:<think></think>", "ho", "ho")


def test_shared_prompts_are_refused(byte_tokenizer):
    """An unreadable row is named too."""
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["x", "y"]})
    other = Dataset.from_dict({"prompt": ["c", "b"], "completion": ["x", "z"]})
    check_disjoint({"train": rows, "test": other.select([0])}, byte_tokenizer)
    with pytest.raises(ValueError, match="The train and the test rows share the prompt 'b'"):
        check_disjoint({"train": rows, "test": other}, byte_tokenizer)
    with pytest.raises(ValueError, match="^Row 1 holds NoneType"):
        check_disjoint({"train": Dataset.from_dict({"text": ["a", None]})}, byte_tokenizer)
