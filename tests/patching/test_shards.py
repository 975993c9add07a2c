"""Tests of the shard reader: every schema and archive is read, and every skipped row is counted."""

import gzip
import json
import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crow_hf.patching.shards import RedPajamaReader
from helpers.shards import (
    ARCHIVES,
    COMPRESS,
    TEXTS,
    incompressible,
    numbers_in,
    read,
    rows_of,
    texts_of,
    to_jsonl,
    write,
    zstandard_frame,
)


# One row for each reason to skip it, and the kind that counts it.
LEFT_OUT = {
    "empty": ({"text": "", "meta": {}}, "blank"),
    "whitespace": ({"text": " \n\t\u3000", "meta": {}}, "blank"),
    "blank raw_content": ({"raw_content": " ", "url": "u"}, "blank"),
    "no text": ({"content": "words", "meta": {}}, "no text"),
    "null": ({"text": None, "meta": {}}, "no text"),
    "number": ({"text": 7}, "no text"),
    "list of texts": ({"text": ["words"]}, "no text"),
    "array": (["text", "words"], "no text"),
    "string": ("text", "no text"),
    "scalar": (3, "no text"),
    "JSON null": (None, "no text"),
    "cut line": (b'{"text": "wor', "broken"),
    "words": (b"no JSON at all", "broken"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "broken"),
    "Latin-1": ('{"text": "Zwölf"}'.encode("latin-1"), "broken"),
    "surrogate bytes": (b'{"text": "a\xed\xa0\x80"}', "broken"),
}


@pytest.mark.parametrize("name", COMPRESS)
def test_every_format(tmp_path, name):
    rows, reader = read(write(tmp_path / name, rows_of(TEXTS)))
    assert texts_of(rows) == TEXTS
    assert [json.loads(row["meta"]) for row in rows] == [{"number": number} for number in range(len(TEXTS))]
    assert all(set(row) == {"text", "meta", "source"} and row["source"] == name for row in rows)
    assert isinstance(reader.counts, Counter) and reader.counts == Counter(kept=len(TEXTS))


@pytest.mark.parametrize(
    ("row", "meta"),
    [
        ({"text": "t", "meta": {"timestamp": "2019-04-18T12:00:00Z", "url": "u"}}, None),
        ({"text": "t", "meta": {"timestamp": 1512465451000, "url": "u"}}, None),
        ({"meta": {"short_book_title": "Ü, a life", "publication_date": 1882}, "text": "t"}, None),
        ({"text": "t", "meta": {"repo_name": "a/b", "license": ["mit"], "nested": {"deep": None}, "mode": 1.5}}, None),
        ({"text": "t", "meta": {}}, None),
        ({"pred_label": "__label__wiki", "wiki_prob": 0.8, "text": "t", "source": "cc"}, ...),
        ({"text": "t"}, ...),
        ({"url": "u", "date_download": "2023", "raw_content": "t", "digest": "sha1:x", "nlines": 3}, ...),
    ],
)
def test_metadata_of_any_schema(tmp_path, row, meta):
    """`meta` holds the field `meta` or, without it, all other fields with their types."""
    others = {name: value for name, value in row.items() if name not in ("text", "raw_content")}
    (found,), _ = read(write(tmp_path / "a.jsonl", [row]))
    assert found["text"] == "t" and isinstance(found["meta"], str)
    assert json.loads(found["meta"]) == (row["meta"] if meta is None else others)


@pytest.mark.parametrize("escaped", [True, False])
def test_only_newlines_end_lines(tmp_path, escaped):
    """Raw U+2028 and U+0085 are ordinary characters of a JSON string. Lines of CRLF files may be blank."""
    text = "a\u2028b\u2029c\u0085d\ufeff e\r\nf\x00"
    data = b"\n\r\n  \n" + to_jsonl(rows_of([text, text]), ensure_ascii=escaped).replace(b"\n", b"\r\n\n")
    (tmp_path / "a.jsonl").write_bytes(data.rstrip())
    rows, reader = read(tmp_path / "a.jsonl")
    assert texts_of(rows) == [text, text]
    assert reader.counts == Counter(kept=2)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_skipped_rows_are_counted(tmp_path, name):
    row, kind = LEFT_OUT[name]
    rows, reader = read(write(tmp_path / "a.jsonl", [{"text": "before"}, row, {"text": "after"}]))
    assert texts_of(rows) == ["before", "after"]
    assert reader.counts == Counter({"kept": 2, kind: 1})


def test_utf16_is_not_read_as_utf8(tmp_path):
    """Fails if json.loads gets bytes, because it then guesses the encoding."""
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": "words"}).encode("utf-16"))
    rows, reader = read(tmp_path / "a.jsonl")
    assert not rows and reader.counts == Counter(broken=1)


def test_counts_add_up_over_files_and_are_reported(tmp_path):
    rows = [{"text": "a"}] * 13 + [{"text": ""}] * 2 + [{"meta": {}}] * 3 + [b"{"] * 4
    first = write(tmp_path / "a.jsonl", rows)
    second = write(tmp_path / "a.jsonl.gz", rows)
    found, reader = read(first, second)
    assert [row["source"] for row in found] == ["a.jsonl"] * 13 + ["a.jsonl.gz"] * 13
    assert reader.counts == Counter({"kept": 26, "blank": 4, "no text": 6, "broken": 8})
    assert sorted(numbers_in(reader.report())) == [4, 6, 8, 26]
    assert "\n" not in reader.report() and "truncated" not in reader.report()


def test_the_report_of_a_clean_file_has_one_count(tmp_path):
    _, reader = read(write(tmp_path / "a.jsonl", rows_of(TEXTS)))
    assert numbers_in(reader.report()) == [len(TEXTS)]


def test_counts_cover_the_rows_read_so_far(tmp_path):
    """Fails if a reader that stops early counts rows it has not returned."""
    reader = RedPajamaReader([write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}, b"{"])])
    rows = iter(reader)
    assert next(rows)["text"] == "a" and reader.counts == Counter(kept=1)
    assert next(rows)["text"] == "b" and reader.counts == Counter(kept=2, blank=1)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=8),
    meta=st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.text(max_size=4), max_size=3),
    escaped=st.booleans(),
    name=st.sampled_from(["a.jsonl", *ARCHIVES]),
)
def test_any_text_survives(tmp_path_factory, texts, meta, escaped, name):
    path = tmp_path_factory.getbasetemp() / name
    rows, reader = read(write(path, [{"meta": meta, "text": text} for text in texts], ensure_ascii=escaped))
    kept = [text for text in texts if text.strip()]
    assert texts_of(rows) == kept
    assert all(json.loads(row["meta"]) == meta for row in rows)
    assert reader.counts == Counter(kept=len(kept), blank=len(texts) - len(kept))


@pytest.mark.parametrize("name", [*ARCHIVES, "b.jsonl.zst"])
def test_archives_of_several_parts_are_read(tmp_path, name):
    """Parallel compressors and `cat` make archives of several members or frames."""
    parts = [COMPRESS[name](to_jsonl(rows_of(TEXTS))) for _ in range(3)]
    (tmp_path / name).write_bytes(b"".join(parts))
    rows, reader = read(tmp_path / name)
    assert texts_of(rows) == TEXTS * 3
    assert reader.counts == Counter(kept=3 * len(TEXTS))


def test_a_line_may_span_two_frames(tmp_path):
    data = to_jsonl(rows_of(TEXTS))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard_frame(data[:20]) + zstandard_frame(data[20:]))
    rows, reader = read(tmp_path / "a.jsonl.zst")
    assert texts_of(rows) == TEXTS and reader.counts == Counter(kept=len(TEXTS))


def test_skippable_frames_are_skipped(tmp_path):
    """pzstd writes a skippable frame before each frame."""
    skippable = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"size"
    frame = zstandard_frame(to_jsonl(rows_of(TEXTS)))
    (tmp_path / "a.jsonl.zst").write_bytes((skippable + frame) * 2)
    rows, reader = read(tmp_path / "a.jsonl.zst")
    assert texts_of(rows) == TEXTS * 2 and reader.counts == Counter(kept=2 * len(TEXTS))


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from([*ARCHIVES, "b.jsonl.zst"]), where=st.floats(0, 1), repeat=st.integers(1, 3))
def test_truncated_archives_are_counted(tmp_path_factory, name, where, repeat):
    """Fails if the end of the file is taken for the end of the frame, as zstandard's own readers do."""
    folder = tmp_path_factory.getbasetemp()
    texts = TEXTS * repeat
    archive = COMPRESS[name](to_jsonl(rows_of(texts)))
    (folder / name).write_bytes(archive[: 1 + int(where * (len(archive) - 2))])
    rows, reader = read(folder / name, write(folder / "next.jsonl", rows_of(["next"])))
    kept = texts_of(rows)
    assert kept.pop() == "next"
    assert kept == texts[: len(kept)]
    assert reader.counts["truncated"] == 1 and reader.counts["kept"] == len(kept) + 1
    assert "truncated" in reader.report() and "1" in reader.report()


@pytest.mark.parametrize("count", [4, 3000])
def test_a_wrong_checksum_is_counted(tmp_path, count):
    """The checksum is at the end of an archive. The number of rows kept before it depends on the chunk size."""
    texts = incompressible(count)
    archive = bytearray(gzip.compress(to_jsonl(rows_of(texts)), 1))
    archive[-8:-4] = bytes(4)
    (tmp_path / "a.jsonl.gz").write_bytes(archive)
    rows, reader = read(tmp_path / "a.jsonl.gz", write(tmp_path / "next.jsonl", rows_of(["next"])))
    kept = texts_of(rows)
    assert kept.pop() == "next" and kept == texts[: len(kept)]
    assert len(kept) >= count - 2500
    assert reader.counts["truncated"] == 1 and reader.counts["kept"] == len(kept) + 1


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_file_that_is_not_an_archive_is_counted(tmp_path, name):
    COMPRESS[name](b"")  # skips the test where zstandard is missing
    (tmp_path / name).write_bytes(to_jsonl(rows_of(TEXTS)))
    rows, reader = read(tmp_path / name, write(tmp_path / "next.jsonl", rows_of(["next"])))
    assert texts_of(rows) == ["next"] and reader.counts == Counter(kept=1, truncated=1)


def test_unusual_archives_are_read(tmp_path):
    """Reads padding zeros, an uppercase suffix, a window above the library's default, and a name with colons."""
    zstandard = pytest.importorskip("zstandard")
    line = json.dumps({"text": "words"}).encode() + b"\n"
    wide = zstandard.ZstdCompressionParameters(window_log=28)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line) + b"\0" * 512)
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(line))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor(compression_params=wide).compress(line))
    (tmp_path / "d::e.jsonl").write_bytes(line)
    reader = RedPajamaReader(sorted(tmp_path.iterdir()))
    assert [document["text"] for document in reader] == ["words"] * 4
    assert reader.counts == {"kept": 4}


def test_a_shard_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    """Fails if a small file takes all memory: neither many lines nor one line may grow without end."""
    monkeypatch.setattr("crow_hf.patching.shards.FREE_BYTES", 2**20)
    monkeypatch.setattr("crow_hf.patching.shards._MAX_LINE", 2**19)
    lines = {"a.jsonl.gz": (b'{"text": "a"}\n', "unpacks to over"), "a.jsonl.zst": (b"a", "has a line")}
    for name, (line, said) in lines.items():
        (tmp_path / name).write_bytes(COMPRESS[name](line * 2**20))
        with pytest.raises(ValueError, match=f"{name} {said}"):
            list(RedPajamaReader([str(tmp_path / name)]))


def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        list(RedPajamaReader([str(tmp_path / "a.jsonl")]))
