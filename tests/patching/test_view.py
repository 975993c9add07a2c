"""What people look at: patches in the terminal and as a page, and the command that shows or writes them."""

from html.parser import HTMLParser

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from crow_hf import ByteEntropyPredictor, EntropyPatcher, load_entropy_predictor
from crow_hf.models.byte_vocabulary import BOS_TOKEN_ID, BYTE_OFFSET, EOS_TOKEN_ID
from crow_hf.patching.patcher import PatchedDocument
from crow_hf.patching.view import render_terminal, summarize, write_html
from helpers.command_line import assert_one_sentence, files_in, run


SCRIPTS = "naïve Ωμέγα кот 漢字 مرحبا 👍🏽 नमस्ते"


def document_of(data, lengths=None, bits=None):
    """A document that was cut by hand."""
    ids = np.array([BOS_TOKEN_ID, *(byte + BYTE_OFFSET for byte in data), EOS_TOKEN_ID], np.int16)
    lengths = [1, *(lengths or [len(data)]), 1]
    entropies = np.array([0, *(bits or [1.0] * len(data)), 0], np.float32)
    return PatchedDocument(ids, np.array(lengths, np.int32), entropies)


class Page(HTMLParser):
    """The text, the boxes and the tags of a page."""

    def __init__(self, path):
        super().__init__()
        self.glyphs, self.boxes, self.tags, self.inside = "", [], [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = dict(attrs).get("class") == "glyphs"
        if tag == "i":
            self.boxes.append(dict(attrs))

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.glyphs += data if self.inside else ""


def test_page_has_a_box_for_each_byte_and_a_line_for_each_patch(tmp_path):
    data = SCRIPTS.encode()
    lengths = [1, 2, *[3] * ((len(data) - 3) // 3), (len(data) - 3) % 3 or 3][: (len(data) - 3) // 3 + 3]
    lengths[-1] += len(data) - sum(lengths)
    write_html(document_of(data, lengths), tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert [int(box["title"][2:4], 16) for box in page.boxes] == list(data)
    starts = [index for index, box in enumerate(page.boxes) if "start" in box["class"]]
    assert starts == list(np.cumsum(lengths) - lengths)
    assert page.glyphs.replace("\N{NO-BREAK SPACE}", " ") == SCRIPTS.replace("\u200d", "<U+200D>")


def test_page_tints_a_byte_by_the_entropy_it_was_predicted_with(tmp_path):
    """That of the byte before: the surprising byte is dark, not the one in front of it."""
    write_html(document_of(b"abcd", bits=[0.0, 8.0, 4.0, 1.0]), tmp_path / "page.html")
    first, *others = Page(tmp_path / "page.html").boxes
    assert "unknown" in first["class"] and "style" not in first
    assert [box["style"] for box in others] == ["--l:97%", "--l:45%", "--l:71%"]
    assert others[1]["title"] == "0x63, 8.00 bits"


def test_page_shows_hostile_text_as_text(tmp_path):
    write_html(document_of(b"<script>alert(1)</script>&amp;"), tmp_path / "page.html", title="<b>title</b>")
    page = Page(tmp_path / "page.html")
    assert "script" not in page.tags and "b" not in page.tags
    assert page.glyphs == "<script>alert(1)</script>&amp;"


def test_what_cannot_be_seen_is_named(tmp_path):
    """Bytes that are no UTF-8, control characters, and those that turn the direction of a line."""
    data = b"a\xff\xc3(\x00\t\x7f\r" + "\u202e\u200b".encode() + b"\n"
    write_html(document_of(data), tmp_path / "page.html")
    glyphs = Page(tmp_path / "page.html").glyphs
    assert glyphs == "a\\xff\\xc3(␀⇥␡␍<U+202E><U+200B>⏎"
    assert render_terminal(document_of(data)).plain == f"│{glyphs}\n"


def test_page_is_not_overwritten(tmp_path):
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(FileExistsError):
        write_html(document_of(b"a"), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "mine"


def test_terminal_marks_borders_between_and_inside_characters():
    text = render_terminal(document_of("aé漢b".encode(), [1, 1, 1, 2, 2]))
    assert text.plain == "│a│é┊│漢┊b"


def test_terminal_tints_by_the_highest_entropy_of_a_character():
    text = render_terminal(document_of("aé".encode(), bits=[1.0, 8.0, 0.0]))
    styles = [str(span.style) for span in text.spans if "on" in str(span.style)]
    assert styles == ["black on rgb(255,80,60)"]


def test_summary_counts_bytes_and_not_special_tokens():
    assert summarize(document_of(b"abcdef", [2, 4], [1.0, 1.0, 1.0, 2.0, 2.0, 2.0])) == (
        "6 bytes in 2 patches of 3.00 bytes on average; mean entropy 1.50 bits."
    )
    assert summarize(PatchedDocument(np.array([BOS_TOKEN_ID, EOS_TOKEN_ID]), np.array([1, 1]), None)) == "No bytes."


def test_command_shows_a_text(capsys):
    assert run("patch", "--text", "hello there") == 0
    out = capsys.readouterr().out
    assert out.replace("│", "").replace("\N{NO-BREAK SPACE}", " ").startswith("hello there")
    assert "11 bytes in" in out


def test_command_shows_any_file_and_writes_the_page(tmp_path, capsys):
    (tmp_path / "data.bin").write_bytes(bytes(range(256)) * 3)
    page = tmp_path / "page.html"
    assert run("patch", "--file", tmp_path / "data.bin", "--html", page, "--max_bytes", 700) == 0
    assert "700 bytes in" in capsys.readouterr().out
    assert len(Page(page).boxes) == 700


def test_command_takes_rules_without_entropy(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run("patch", "--text", "abcdefg", "--rule", "stride", "--max_patch_length", 3, "--html", page) == 0
    assert "│abc│def│g" in capsys.readouterr().out
    assert all("unknown" in box["class"] for box in Page(page).boxes)


def test_command_calibrates(capsys):
    assert run("patch", "--text", "the cat sat on the mat and slept for a while " * 20, "--target_patch_size", 3) == 0
    assert " 2.9" in (out := capsys.readouterr().out) or " 3.0" in out


def test_command_writes_the_dataset_that_the_transform_makes(tmp_path):
    rows = Dataset.from_dict({"text": ["hello there", "", "second row\nwith a newline"], "other": [1, 2, 3]})
    rows.to_json(tmp_path / "rows.jsonl")
    assert run("patch", "--dataset", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out", "--threshold", 2) == 0
    written = load_from_disk(tmp_path / "out")
    expected = rows.map(EntropyPatcher(threshold=2.0), batched=True, remove_columns=["text", "other"])
    assert written.column_names == ["input_ids", "patch_lengths"]
    assert written[:] == expected[:]


def test_command_takes_another_predictor(tmp_path, capsys):
    """The one that ships, whatever is asked for."""
    other = ByteEntropyPredictor(hidden_size=16, num_layers=1, num_heads=2, ff_dim=16)
    for name, predictor in {"same": load_entropy_predictor(), "other": other}.items():
        predictor.save_pretrained(tmp_path / name)
    shown = {}
    for name in (None, "same", "other"):
        options = [] if name is None else ["--predictor", tmp_path / name]
        assert run("patch", "--text", "hello", "--rule", "global", "--threshold", 4, *options) == 0
        shown[name] = capsys.readouterr().out
    assert shown[None] == shown["same"] != shown["other"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--text"),
        ({"text": "a", "file": "b"}, "--text"),
        ({"dataset": "rows.jsonl"}, "--output_dir"),
        ({"text": "a", "output_dir": "out"}, "--dataset"),
        ({"dataset": "rows.jsonl", "output_dir": "out", "html": "page.html"}, "--html"),
        ({"dataset": "none.jsonl", "output_dir": "out"}, "none.jsonl"),
        ({"dataset": "rows.jsonl", "output_dir": "full"}, "full"),
        ({"file": "none.txt"}, "none.txt"),
        ({"text": "a", "html": "full/precious.txt"}, "--html"),
        ({"text": "a", "rule": "best"}, "best"),
        ({"text": "a", "rule": "stride"}, "max_patch_length"),
        ({"text": "a", "max_patch_length": "0"}, "max_patch_length"),
        ({"text": "a", "predictor": "nowhere"}, "nowhere"),
        ({"text": "a", "target_patch_size": "0.5"}, "target_patch_size"),
        ({"text": "", "target_patch_size": "2"}, "bytes"),
        ({"dataset": "rows.jsonl", "output_dir": "out", "column": "none"}, "none"),
    ],
)
def test_command_refuses_in_one_sentence(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    assert run("patch", *(part for name, value in options.items() for part in (f"--{name}", value))) == 1
    error = capsys.readouterr().err
    assert_one_sentence(error, "patch")
    assert said in error
    assert files_in(tmp_path) == ["full", "full/precious.txt", "rows.jsonl"]
