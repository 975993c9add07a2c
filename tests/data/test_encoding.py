"""Rows of every format are converted to input_ids and labels."""

import logging
import re

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from crow_hf import prepare_dataset
from crow_hf.data.encoding import encode as encode_row
from crow_hf.data.encoding import encode_prompt, marker_ids
from crow_hf.data.rows import Rendered, render


EOS = 1
CLOSING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPEN = CLOSING.replace("</s>", "")


def encode(text):
    return [byte + 3 for byte in text.encode()]


def decode(ids):
    return bytes(token - 3 for token in ids if token >= 3).decode()


def row_of(prompt, completion):
    """Return the expected row for a prompt and a completion that eos closes."""
    completion = encode(completion) + [EOS]
    return {"input_ids": encode(prompt) + completion, "labels": [-100] * len(encode(prompt)) + completion}


def prepare(columns, tokenizer, max_length=1024, **kwargs):
    dataset = columns if isinstance(columns, Dataset) else Dataset.from_dict(columns)
    return list(prepare_dataset(dataset, tokenizer, max_length, **kwargs))


def ids_and_labels(row):
    return {"input_ids": row["input_ids"], "labels": row["labels"]}


def counts_warned(caplog):
    """Return every number in the warnings of the logger crow_hf.data.encoding."""
    messages = (
        r.getMessage() for r in caplog.records if r.name == "crow_hf.data.encoding" and r.levelno == logging.WARNING
    )
    return {int(number) for message in messages for number in re.findall(r"\d+", message)}


def chat(*contents):
    roles = ["user", "assistant"]
    return [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]


FORMATS = {
    "prompt": ({"prompt": ["Say é: "], "completion": ["ß!"]}, row_of("Say é: ", "ß!")),
    "alpaca": (
        {"instruction": ["Add."], "output": ["3"]},
        row_of("### Instruction:\nAdd.\n\n### Response:\n", "3"),
    ),
    "alpaca_with_input": (
        {"instruction": ["Add."], "input": ["1 2"], "output": ["3"]},
        row_of("### Instruction:\nAdd.\n1 2\n\n### Response:\n", "3"),
    ),
    "alpaca_with_empty_input": (
        {"instruction": ["Add."], "input": [""], "output": ["3"]},
        row_of("### Instruction:\nAdd.\n\n### Response:\n", "3"),
    ),
    "tokenized": (
        {"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    ),
    "tokenized_without_labels": ({"input_ids": [[5, 6, 7]]}, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}),
    "tokenized_with_mask": (
        {"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]], "attention_mask": [[1, 1, 1]]},
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
    ),
}


@pytest.mark.parametrize("columns", ["map", "iterable"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, columns, byte_tokenizer):
    """The ids are exact. Fails if the loss covers the prompt, or if eos separates prompt and completion."""
    given_columns, expected = FORMATS[name]
    dataset = Dataset.from_dict(given_columns)
    dataset = dataset.to_iterable_dataset() if columns == "iterable" else dataset
    (row,) = prepare_dataset(dataset, byte_tokenizer, 1024)
    assert ids_and_labels(row) == expected


def test_result_is_a_dataset_of_the_two_columns(byte_tokenizer):
    dataset = prepare_dataset(Dataset.from_dict(FORMATS["prompt"][0] | {"id": [7]}), byte_tokenizer, 64)
    assert isinstance(dataset, Dataset)
    assert {"input_ids", "labels"} <= set(dataset.column_names) <= {"input_ids", "labels", "attention_mask"}


def test_all_tokens_of_a_text_are_labels(byte_tokenizer):
    (row,) = prepare({"text": ["naïve 文"]}, byte_tokenizer)
    assert row["labels"] == row["input_ids"]
    assert decode(row["input_ids"]) == "naïve 文"


@pytest.mark.parametrize("first", range(4))
def test_first_matching_format_wins(first, byte_tokenizer):
    """Columns of later formats in the same dataset are ignored."""
    formats = [
        {"input_ids": [encode("ids")]},
        {"prompt": ["p"], "completion": ["completion"]},
        {"instruction": ["i"], "output": ["output"]},
        {"text": ["text"]},
    ]
    columns = {name: value for part in reversed(formats[first:]) for name, value in part.items()}
    (row,) = prepare(columns, byte_tokenizer)
    labels = [label for label in row["labels"] if label != -100]
    assert decode(labels) == ["ids", "completion", "output", "text"][first]


def test_messages_win_over_prompt(byte_tokenizer):
    byte_tokenizer.chat_template = CLOSING
    columns = {"prompt": ["p"], "completion": ["c"], "messages": [chat("hi", "chat")]}
    (row,) = prepare(columns, byte_tokenizer)
    assert decode([label for label in row["labels"] if label != -100]) == "chat"


@pytest.mark.parametrize("template", [CLOSING, OPEN], ids=["template_writes_eos", "template_writes_no_eos"])
@pytest.mark.parametrize(
    ("columns", "prompt", "completion"),
    [
        ({"messages": [chat("hi", "yo")]}, "<user>hi<assistant>", "yo"),
        ({"instruction": ["Add."], "output": ["3"]}, "<user>Add.<assistant>", "3"),
    ],
    ids=["messages", "alpaca"],
)
def test_chat_template_writes_all_special_tokens(columns, prompt, completion, template, byte_tokenizer):
    """The ids are those of the rendered template. Fails if eos, bos or a newline is added to it."""
    byte_tokenizer.chat_template = template
    (row,) = prepare(columns, byte_tokenizer)
    closing = [EOS] if template is CLOSING else []
    answer = encode(completion) + closing
    assert ids_and_labels(row) == {
        "input_ids": encode(prompt) + answer,
        "labels": [-100] * len(encode(prompt)) + answer,
    }


def test_alpaca_input_is_part_of_the_user_message(byte_tokenizer):
    byte_tokenizer.chat_template = CLOSING
    (row,) = prepare({"instruction": ["Add."], "input": ["1 2"], "output": ["3"]}, byte_tokenizer)
    text = decode(row["input_ids"])
    assert text.startswith("<user>Add.\n") and text.endswith("1 2<assistant>3")
    assert [label for label in row["labels"] if label != -100] == encode("3") + [EOS]


def test_loss_on_the_last_assistant_message_only(byte_tokenizer):
    byte_tokenizer.chat_template = CLOSING
    messages = [{"role": "system", "content": "be kind"}] + chat("a", "first", "b", "second")
    (row,) = prepare({"messages": [messages]}, byte_tokenizer)
    assert decode(row["input_ids"]) == "<system>be kind<user>a<assistant>first<user>b<assistant>second"
    assert [label for label in row["labels"] if label != -100] == encode("second") + [EOS]
    assert row["labels"][-7:] == row["input_ids"][-7:]


def test_messages_without_chat_template(byte_tokenizer):
    with pytest.raises(ValueError, match="template"):
        prepare({"messages": [chat("hi", "yo")]}, byte_tokenizer)


def test_long_rows_are_cut_at_the_end(byte_tokenizer, caplog):
    """Two of three rows are too long. The warning holds both counts."""
    columns = {"prompt": ["abcd"] * 3, "completion": ["xy", "xyzwv", "xyzwvu"]}
    with caplog.at_level(logging.WARNING, logger="crow_hf.data.encoding"):
        rows = prepare(columns, byte_tokenizer, 7)
    full = [row_of("abcd", completion) for completion in columns["completion"]]
    wanted = [{name: ids[:7] for name, ids in row.items()} for row in full]
    assert [ids_and_labels(row) for row in rows] == wanted
    assert counts_warned(caplog) >= {2, 3}


def test_nothing_to_cut_is_silent(byte_tokenizer, caplog):
    """A row of exactly max_length tokens is not too long."""
    with caplog.at_level(logging.WARNING, logger="crow_hf.data.encoding"):
        (row,) = prepare({"prompt": ["abcd"], "completion": ["xy"]}, byte_tokenizer, 7)
    assert len(row["input_ids"]) == 7 and row["input_ids"][-1] == EOS
    assert not counts_warned(caplog)


def test_rows_without_labels_are_dropped(byte_tokenizer, caplog):
    """Rows whose prompt alone fills max_length have no labels. Two of five rows are dropped."""
    prompts = ["long prompt", "a", "b", "another long prompt", "c"]
    with caplog.at_level(logging.WARNING, logger="crow_hf.data.encoding"):
        rows = prepare({"prompt": prompts, "completion": list("vwxyz")}, byte_tokenizer, 6)
    assert [decode(row["input_ids"]) for row in rows] == ["aw", "bx", "cz"]
    assert counts_warned(caplog) >= {2, 5}


@pytest.mark.parametrize(
    "columns",
    [{"prompt": ["too long", "as well"], "completion": ["x", "y"]}, {"input_ids": [[5, 6]], "labels": [[-100, -100]]}],
)
def test_no_row_left(columns, byte_tokenizer):
    with pytest.raises(ValueError):
        prepare(columns, byte_tokenizer, 6)


@pytest.mark.parametrize("name", ["prompt", "alpaca_with_input"])
def test_bytes_are_text(name, byte_tokenizer):
    columns, expected = FORMATS[name]
    binary = {column: [value.encode() for value in values] for column, values in columns.items()}
    (row,) = prepare(binary, byte_tokenizer)
    assert ids_and_labels(row) == expected


@pytest.mark.parametrize(
    ("columns", "bad"),
    [
        ({"text": []}, "text"),
        ({"prompt": [], "completion": [b"x"] * 7}, "prompt"),
        ({"prompt": [b"x"] * 7, "completion": []}, "completion"),
        ({"instruction": [b"x"] * 7, "output": []}, "output"),
    ],
)
@pytest.mark.parametrize("value", [b"\xc3(", None, b" \n", b""], ids=["not_utf8", "none", "blank", "empty"])
def test_bad_value_is_named(columns, bad, value, byte_tokenizer, caplog):
    """The message names the column and the row, which is row 5. An answer without text is none: the row is dropped."""
    columns = columns | {bad: [b"fine"] * 5 + [value] + [b"fine"]}
    if bad == "prompt" and value is not None and not value.strip():
        assert len(prepare(columns, byte_tokenizer)) == 7
    elif bad == "prompt" or value == b"\xc3(":
        with pytest.raises(ValueError, match=r"\b5\b") as error:
            prepare(columns, byte_tokenizer)
        assert bad in str(error.value)
    else:
        with caplog.at_level(logging.WARNING, logger="crow_hf.data.encoding"):
            assert len(prepare(columns, byte_tokenizer)) == 6
        assert "1 rows were dropped because they have no answer" in caplog.text


def test_bad_value_in_a_stream_is_named(byte_tokenizer):
    stream = Dataset.from_dict({"text": [b"fine"] * 5 + [b"\xff"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"\b5\b"):
        list(prepare_dataset(stream, byte_tokenizer, 64))


def test_ids_and_labels_of_different_length(byte_tokenizer):
    with pytest.raises(ValueError):
        prepare({"input_ids": [[5, 6, 7]], "labels": [[5, 6]]}, byte_tokenizer)


@pytest.mark.parametrize("column", ["input_ids", "labels", "attention_mask"])
@pytest.mark.parametrize("value", ["x", 1.5, [5], None])
def test_what_is_no_token_id_is_named(column, value):
    row = {"input_ids": [5, 6], column: [value, value]}
    with pytest.raises(ValueError, match=f"^Row 0 holds more than token ids in column '{column}'"):
        prepare_dataset(Dataset.from_list([row]), None, 64)


def test_rows_without_a_mask_among_others_are_whole():
    rows = Dataset.from_list([{"input_ids": [5, 6], "attention_mask": [0, 1]}, {"input_ids": [5, 6]}])
    assert prepare_dataset(rows, None, 64)["attention_mask"][:] == [[0, 1], [1, 1]]


def test_a_tokenizer_that_fails_on_a_text_is_told():
    backend = Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="^The tokenizer fails on the text 'é' .*UNK"):
        prepare({"text": ["é"]}, tokenizer)


def test_a_tokenizer_that_panics_on_a_text_is_told():
    """Fails if a regular expression that the library gives up ends in a report of a fault of this package."""
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$|(\w+\s?)*z"), "isolated")
    with pytest.raises(ValueError, match="^The tokenizer fails on the text .*retry-limit"):
        prepare({"text": ["which colour has the sky number one?"]}, PreTrainedTokenizerFast(tokenizer_object=backend))


def test_rows_without_ids_and_negative_ids_are_named():
    with pytest.raises(ValueError, match="^Row 1 holds more than token ids in column 'input_ids'"):
        prepare_dataset(Dataset.from_list([{"input_ids": [5, 6]}, {"input_ids": None}]), None, 64)
    with pytest.raises(ValueError, match="^Row 0 holds more than token ids in column 'input_ids'"):
        prepare_dataset(Dataset.from_list([{"input_ids": [5, -1]}]), None, 64)
    with pytest.raises(ValueError, match="^Row 0 holds more than token ids in column 'labels'"):
        prepare_dataset(Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, -7]}]), None, 64)


def test_no_usable_columns(byte_tokenizer):
    """Half of a format's columns are not enough."""
    with pytest.raises(ValueError):
        prepare({"prompt": ["x"], "answer": ["y"]}, byte_tokenizer)


def test_empty_dataset(byte_tokenizer):
    with pytest.raises(ValueError):
        prepare({"text": []}, byte_tokenizer)


def test_tokenized_rows_need_no_tokenizer():
    (row,) = prepare({"input_ids": [[5, 6, 7, 8]]}, None, 3)
    assert ids_and_labels(row) == {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}


@pytest.mark.parametrize("values", ["torch", "numpy"])
@pytest.mark.parametrize("is_stream", [False, True], ids=["rows", "stream"])
def test_ids_may_be_arrays(values, is_stream):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, 6, 7], [-100, 9]]})
    formatted = rows.with_format(values)
    prepared = prepare_dataset(formatted.to_iterable_dataset() if is_stream else formatted, None, 512)
    assert [{name: list(map(int, ids)) for name, ids in row.items()} for row in prepared] == list(rows)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer"):
        prepare({"text": ["x"]}, None)


PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=20).filter(
    str.strip
)


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=5), binary=st.booleans())
def test_round_trip(rows, binary):
    """Fails if a byte is lost, merged, normalized, or moved between prompt and completion."""
    prompts, completions = (
        [text.encode() if binary else text for text in column] for column in zip(*rows, strict=True)
    )
    prepared = prepare({"prompt": prompts, "completion": completions}, ByT5Tokenizer(extra_ids=0))
    assert [ids_and_labels(row) for row in prepared] == [row_of(*row) for row in rows]


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(PLAIN, min_size=1, max_size=5), limit=st.integers(2, 12))
def test_cut_texts_are_prefixes(texts, limit):
    prepared = prepare({"text": texts}, ByT5Tokenizer(extra_ids=0), limit)
    assert [row["input_ids"] for row in prepared] == [(encode(text) + [EOS])[:limit] for text in texts]


def test_padding_of_ready_rows_is_not_learned():
    """A tokenizer with `padding="max_length"` fills most of a row with padding."""
    rows = Dataset.from_list([{"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}])
    assert prepare_dataset(rows, None, 8)["labels"][0] == [5, 6, -100, -100]


def test_error_names_the_dataset():
    with pytest.raises(ValueError, match="`eval_dataset` are \\['a'\\]"):
        prepare_dataset(Dataset.from_list([{"a": 1}]), None, 8, "eval_dataset")


# The border of prompt and completion


class WithoutOffsets(PreTrainedTokenizerFast):
    """As a tokenizer that is written in Python."""

    is_fast = False


def sentence_pieces(kind):
    """A tokenizer like Llama's: a text begins with a space token, and words are joined with the space before them."""
    words = ["Lima", "▁Lima", "▁is", "un", "▁un", "happy", "▁happy", "▁unhappy", "unhappy", "▁a", "▁▁"]
    pieces = [*"▁\n[/:]#", *map(chr, range(33, 127)), *words]
    scores = {"<unk>": -99.0, "<s>": 0.0, "</s>": 0.0} | {
        piece: -10.0 if len(piece) == 1 else -3.0 for piece in pieces
    }
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return kind(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(params=[PreTrainedTokenizerFast, WithoutOffsets])
def pieces_tokenizer(request):
    return sentence_pieces(request.param)


BORDERS = [
    ("Lima is ", "Lima"),
    ("Lima is", " Lima"),
    ("Lima is:\n", "Lima"),
    ("[/Lima]", "Lima"),
    ("", "Lima is"),
    ("a  ", "Lima"),
]


@pytest.mark.parametrize(("prompt", "completion"), BORDERS)
def test_ids_are_those_of_the_whole_text(prompt, completion, pieces_tokenizer):
    """Fails if the completion is tokenized apart, because it would begin with a space token."""
    row = encode_row(Rendered(prompt, completion, completion, False), pieces_tokenizer)
    assert row.prompt + row.completion == [*pieces_tokenizer(prompt + completion)["input_ids"], 2]
    assert pieces_tokenizer.decode(row.completion[:-1]).strip() == completion.strip()


@pytest.mark.parametrize(("prompt", "completion"), BORDERS[:4])
def test_generation_begins_where_training_cuts(prompt, completion, pieces_tokenizer):
    """A prompt without an answer has the ids of the same prompt with one."""
    trained = encode_row(Rendered(prompt, completion, completion, False), pieces_tokenizer).prompt
    if not completion.startswith(" "):
        assert encode_prompt(Rendered(prompt, "", "", False), pieces_tokenizer) == trained


def test_a_chat_is_tokenized_as_a_whole(pieces_tokenizer):
    pieces_tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '[' + m.content + ' /]' if m.role == 'user' else m.content + "
        "eos_token }}{% endfor %}"
    )
    messages = chat("Lima is", "Lima")
    row = encode_row(render({"messages": messages}, pieces_tokenizer), pieces_tokenizer)
    whole = pieces_tokenizer.apply_chat_template(messages, tokenize=False)
    assert row.prompt + row.completion == pieces_tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert pieces_tokenizer.convert_ids_to_tokens(row.completion) == ["Lima", "</s>"]


def test_a_word_across_the_border_is_divided(pieces_tokenizer):
    """The prompt has the ids that a user sends, and no space stands inside the word."""
    row = encode_row(Rendered("Lima is un", "happy", "happy", False), pieces_tokenizer)
    assert row.prompt == pieces_tokenizer("Lima is un")["input_ids"]
    assert pieces_tokenizer.convert_ids_to_tokens(row.completion) == ["happy", "</s>"]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("<s>Lima is ", "Lima</s>"), ("<s>Lima is ", "Lima</s>\n"), ("", "<s>Lima is Lima</s>"), ("Lima is ", "Lima")],
)
def test_texts_begin_and_end_once(prompt, completion, pieces_tokenizer):
    """Rows that a chat template has written before have their own special tokens."""
    row = encode_row(Rendered(prompt, completion, completion, False), pieces_tokenizer)
    tokens = pieces_tokenizer.convert_ids_to_tokens(row.prompt + row.completion)
    assert tokens[0] == "<s>" and tokens[-1] == "</s>" and len({"<s>", "</s>"} & set(tokens[1:-1])) == 0


def test_marks_are_no_words_of_the_template():
    """A word that ends answers could hide the target after it. Fails if the default system text makes words marks."""
    tokenizer = sentence_pieces(PreTrainedTokenizerFast)
    words = ["a", "You", " helpful", "You are", "helpful,", ".", "\n", "助手"]
    marks = ["<|im_end|>", "[/INST]", "### "]
    tokenizer.add_tokens([*words, *marks, "<|other|>"])
    text = " ".join(["You are a helpful, kind", "helpful. 助手\n", *marks])
    tokenizer.chat_template = "{% for m in messages %}" + text + "{{ m.content }}{% endfor %}"
    added = marker_ids(tokenizer) - set(tokenizer.all_special_ids)
    assert {tokenizer.added_tokens_decoder[mark].content for mark in added} == set(marks)
