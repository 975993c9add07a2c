"""Tests of the views of patches in the terminal and as a web page."""

from dataclasses import replace

import numpy as np
import pytest

from crow_hf.models.boundaries import PatchRule
from crow_hf.models.byte_vocabulary import BOS_TOKEN_ID, BYTE_OFFSET, EOS_TOKEN_ID
from crow_hf.patching.documents import PatchedDocument
from crow_hf.patching.view import describe_rule, render_terminal, summarize, write_html
from helpers.documents import Page


SCRIPTS = "naïve Ωμέγα кот 漢字 مرحبا 👍🏽 नमस्ते"


def document_of(data, lengths=None, bits=None):
    """Return a document with given patches."""
    ids = np.array([BOS_TOKEN_ID, *(byte + BYTE_OFFSET for byte in data), EOS_TOKEN_ID], np.int16)
    lengths = [1, *(lengths or [len(data)]), 1]
    entropies = np.array([0, *(bits or [1.0] * len(data)), 0], np.float32)
    return PatchedDocument(ids, np.array(lengths, np.int32), entropies)


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


def test_page_tints_a_byte_by_the_entropy_of_its_prediction(tmp_path):
    """Fails if the byte before a surprising byte is dark instead of the surprising byte."""
    write_html(document_of(b"abcd", bits=[0.0, 8.0, 4.0, 1.0]), tmp_path / "page.html")
    first, *others = Page(tmp_path / "page.html").boxes
    assert "unknown" in first["class"] and "style" not in first
    assert [box["style"] for box in others] == ["--l:97%", "--l:45%", "--l:71%"]
    assert others[1]["title"] == "0x63, 8.00 bits"


def test_page_shows_hostile_text_as_text(tmp_path):
    """The title is the name of a file. It hides nothing, and the page may load and run nothing."""
    title = "<b>title</b>\u202e\x1b\udcff"
    write_html(document_of(b"<script>alert(1)</script>&amp;"), tmp_path / "page.html", title=title)
    page, text = Page(tmp_path / "page.html"), (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("&lt;b&gt;title&lt;/b&gt;&lt;U+202E&gt;␛\\xff") == 2
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in text
    assert "script" not in page.tags and "b" not in page.tags
    assert page.glyphs == "<script>alert(1)</script>&amp;"


def test_invisible_characters_are_named(tmp_path):
    """Names invalid UTF-8, control characters, and characters that reverse the direction of a line."""
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


def test_terminal_marks_patches_between_and_inside_characters():
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


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("global", ["entropy exceeds 0.5 of the largest (4 bits) at 50.0%"]),
        ("monotonic", ["rise of the entropy exceeds 0.25 of the largest (2 bits) at 25.0%"]),
        ("either", ["(4 bits) at 50.0%", "(2 bits) at 25.0%"]),
        ("stride", ["uses no entropies"]),
    ],
)
def test_how_often_each_threshold_decides(rule, said):
    """The entropies of the predictions of the four bytes after the first are 5, 5, 1 and 3.5 bits."""
    document = document_of(b"ab\ncd", bits=[5.0, 5.0, 1.0, 3.5, 9.0])
    if rule == "stride":
        document = replace(document, entropies=None)
    sentences = describe_rule(document, PatchRule(rule, 0.5, 0.25, max_patch_length=2))
    assert all(part in sentences for part in said) and sentences.count("%") == sum("%" in part for part in said)
