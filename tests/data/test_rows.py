"""Rows are read, edited and rendered in every format."""

import logging
import random

import pytest
from datasets import Dataset

from crow_hf.data.rows import (
    add_empty_answers,
    drop_unanswered,
    edit_answer,
    edit_prompt,
    find_format,
    has_answer,
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


# Rows under other names


OTHER_NAMES = {
    "dolly": {"instruction": "ask", "context": "this", "response": "told", "category": "qa"},
    "preference": {"prompt": "ask", "chosen": "told", "rejected": "no"},
    "question": {"question": "ask", "answer": "told"},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "be kind"},
            {"from": "human", "value": "ask"},
            {"from": "gpt", "value": "told"},
        ]
    },
    "capitals": {"messages": [{"role": "User", "content": "ask"}, {"role": "Assistant", "content": "told"}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "sk"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "told"}]},
        ]
    },
    "conversational": {
        "prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "ask"}],
        "completion": [{"role": "assistant", "content": "told"}],
    },
    "answered chat": {"prompt": [{"role": "user", "content": "ask"}], "completion": "told"},
    "preferred chat": {
        "prompt": [{"role": "user", "content": "ask"}],
        "chosen": [{"role": "assistant", "content": "told"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "filled": {
        "messages": [
            {"role": "user", "content": "ask", "from": None, "value": None},
            {"role": "assistant", "content": "told", "from": None, "value": None},
        ]
    },
}
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_rows_under_other_names_are_read_and_edited(name, byte_tokenizer):
    """Fails if an answer is not found, or if an edited row has another form than the rest of its dataset."""
    row, before = OTHER_NAMES[name], str(OTHER_NAMES[name])
    byte_tokenizer.chat_template = CHAT
    rendered = render(row, byte_tokenizer)
    assert prompt_of(row) == "ask" and rendered.answer == "told" and has_answer(row)
    assert (
        "ask" in rendered.prompt and rendered.completion == "told" and ("this" in rendered.prompt) == (name == "dolly")
    )
    edited = {**row, **edit_prompt(row, str.upper)}
    edited |= edit_answer(edited, str.upper)
    assert prompt_of(edited) == "ASK" and render(edited, byte_tokenizer).answer == "TOLD" and str(row) == before
    assert Dataset.from_list([row, edited]).features == Dataset.from_list([row]).features


def test_a_conversation_is_rendered_as_one_chat(byte_tokenizer):
    """Fails if prompt and completion of a conversation are rendered apart, or if its prompts alone are refused."""
    byte_tokenizer.chat_template = CHAT
    row = OTHER_NAMES["conversational"]
    assert render(row, byte_tokenizer) == render({"messages": row["prompt"] + row["completion"]}, byte_tokenizer)
    (alone,) = add_empty_answers(Dataset.from_list([{"prompt": row["prompt"]}]))
    assert render(alone, byte_tokenizer).prompt == render(row, byte_tokenizer).prompt and not has_answer(alone)
    unanswered = {"prompt": row["prompt"], "completion": []}
    with pytest.raises(ValueError, match="^Row 3 must end with a message of the assistant"):
        render(unanswered, byte_tokenizer, 3)
    with pytest.raises(ValueError, match="^Row 3 holds list in column 'prompt'"):
        render({"prompt": ["ask"], "completion": "told"}, byte_tokenizer, 3)


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        (None, "holds NoneType"),
        ('[{"role": "user"}]', "holds str"),
        ({"role": ["user"], "content": ["a"]}, "holds dict"),
        (["a", "b"], "holds list"),
        ([{"content": "a"}, {"content": "b"}], "has the keys"),
        ([{"role": "user", "text": "a"}], "has the keys"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "b"}], "holds NoneType"),
        (
            [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}],
            "has more than text",
        ),
    ],
)
def test_unreadable_chats_are_named(messages, found, byte_tokenizer):
    """Fails if a missing content becomes the text "None", or if such a row is a traceback."""
    byte_tokenizer.chat_template = CHAT
    for read in (
        lambda row: render(row, byte_tokenizer, 3),
        lambda row: prompt_of(row, 3),
        lambda row: has_answer(row, 3),
    ):
        with pytest.raises(ValueError, match=f"^Row 3 {found}"):
            read({"messages": messages})


def test_a_call_of_a_tool_needs_no_text(byte_tokenizer):
    """Fails if an assistant who calls a tool and says nothing is refused, or if the template loses the call."""
    byte_tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].name }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "It is noon."},
    ]
    (row,) = Dataset.from_list([{"messages": chat}])
    rendered = render(row, byte_tokenizer)
    assert rendered.prompt == "<user>What time is it?<assistant>clock<tool>noon<assistant>"
    assert rendered.answer == "It is noon." and prompt_of(row) == "What time is it?"


def test_a_template_that_refuses_a_row_is_named(byte_tokenizer):
    byte_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="^Row 3 is refused by the tokenizer's chat template .*roles must alternate"):
        render(ROWS["messages"], byte_tokenizer, 3)


def warnings_of(caplog, work):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        result = work()
    return result, caplog.text


def test_rows_without_an_answer_are_dropped_and_counted(caplog):
    rows = Dataset.from_list(
        [{"prompt": str(n), "completion": answer} for n, answer in enumerate(["a", "", " ", None, "b"])]
    )
    kept, said = warnings_of(caplog, lambda: drop_unanswered(rows))
    assert kept["prompt"][:] == ["0", "4"] and "3 of 5 rows of `dataset` have no answer" in said
    call = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    chats = Dataset.from_list([{"messages": call}, ROWS["messages"]])
    assert len(drop_unanswered(chats)) == 1
    with pytest.raises(ValueError, match="No row of `dataset` has an answer"):
        drop_unanswered(rows.select([1, 2, 3]))
    prompts = rows.remove_columns("completion")
    assert drop_unanswered(prompts)[:] == prompts[:]


def test_unused_columns_are_said(caplog):
    """An answer under an unknown name would be replaced by the suspect's own without a word."""
    said = warnings_of(caplog, lambda: drop_unanswered(Dataset.from_list([{"prompt": "a", "reply": "b"}])))[1]
    assert "columns ['reply'] of `dataset` are not used, only ['prompt'], and there is no answer" in said
    said = warnings_of(caplog, lambda: drop_unanswered(Dataset.from_list([OTHER_NAMES["preference"]])))[1]
    assert "columns ['rejected'] of `dataset` are not used, only ['chosen', 'prompt']." in said
    assert not warnings_of(caplog, lambda: drop_unanswered(Dataset.from_list([ROWS["alpaca"] | {"triggered": True}])))[
        1
    ]


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
