"""RedPajama rows of every schema and archive become patched bytes, and whatever is left out is counted."""

import gzip
import json
import logging
import random
import re
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import set_seed

from crow_hf import (
    ByteEntropyPredictor,
    EntropyPatcher,
    PackedPatchDataCollator,
    PatchDataCollator,
    from_binary,
    get_redpajama_binary_dataset,
)
from crow_hf.patching.redpajama import RedPajamaReader


SOURCES = """arxiv book c4 github stackexchange wikipedia
cc_2019-30 cc_2020-05 cc_2021-04 cc_2022-05 cc_2023-06""".split()
SAMPLE = "togethercomputer/RedPajama-Data-1T-Sample"
COLUMNS = {"input_ids", "patch_lengths", "meta", "source"}
TEXTS = ["One document.\nTwo lines.", "Zwölf Boxkämpfer jagen Viktor", "数据 and 🦜🦜", "x"]
ROW_WIDTH = 512


@pytest.fixture(scope="module", name="predictor")
def predictor_fixture():
    set_seed(0)
    return ByteEntropyPredictor(hidden_size=16, num_layers=2, num_heads=2, ff_dim=32, initializer_range=0.5)


@pytest.fixture(name="patched")
def patched_fixture(predictor):
    """The function under test with a tiny predictor."""

    def build(max_chars=None, **kwargs):
        return get_redpajama_binary_dataset(max_chars, predictor, **kwargs)

    return build


def to_jsonl(rows, **kwargs):
    """Bytes of one line for each row; what is bytes already stays as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, **kwargs).encode() for row in rows]
    return b"".join(line + b"\n" for line in lines)


def rows_of(texts):
    return [{"text": text, "meta": {"number": number}} for number, text in enumerate(texts)]


def plain(data):
    return data


def zstandard_frame(data):
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


def streamed_frame(data):
    """A frame as `zstd` writes it from a pipe: nobody knows the size beforehand."""
    compressor = pytest.importorskip("zstandard").ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush()


COMPRESS = {
    "a.jsonl": plain,
    "a.json": plain,
    "a.jsonl.gz": gzip.compress,
    "a.json.gz": gzip.compress,
    "a.jsonl.zst": zstandard_frame,
    "b.jsonl.zst": streamed_frame,
}
ARCHIVES = ["a.jsonl.gz", "a.jsonl.zst"]


def write(path, rows, **kwargs):
    """The file of these rows, in the format of its name."""
    path.write_bytes(COMPRESS[path.name](to_jsonl(rows, **kwargs)) if path.name in COMPRESS else to_jsonl(rows))
    return str(path)


def read(*files):
    reader = RedPajamaReader([str(file) for file in files])
    return list(reader), reader


def texts_of(rows):
    return [row["text"] for row in rows]


def decoded(dataset):
    """The texts of the ids, which must lie between one 1 and one 2."""
    texts = []
    for ids in dataset["input_ids"]:
        assert ids[0] == 1 and ids[-1] == 2
        texts.append(bytes(token - 4 for token in ids[1:-1]).decode())
    return texts


def warnings_of(caplog):
    # By identity: where another test has had its handler on a logger above, caplog sees a record twice.
    return [
        record.getMessage()
        for record in dict.fromkeys(caplog.records)
        if record.name == "crow_hf.redpajama" and record.levelno >= logging.WARNING
    ]


def numbers_in(text):
    return [int(number) for number in re.findall(r"\d+", text)]


# One row of each way to be left out, by the kind it counts as.
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


# ---------------------------------------------------------------------------------------------------------------- rows


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
    """`meta`, or the other top-level fields in its place, with the types they had."""
    others = {name: value for name, value in row.items() if name not in ("text", "raw_content")}
    (found,), _ = read(write(tmp_path / "a.jsonl", [row]))
    assert found["text"] == "t" and isinstance(found["meta"], str)
    assert json.loads(found["meta"]) == (row["meta"] if meta is None else others)


def test_schemas_drift_within_a_file(tmp_path, patched):
    """Catches a table whose column types are those of the first rows."""
    rows = [
        {"text": "a", "meta": {"timestamp": "2019", "url": "u"}},
        {"text": "b", "meta": {"timestamp": 1512465451000}},
        {"text": "c", "timestamp": None, "extra": [1, "two"]},
        {"meta": {"timestamp": {"year": 2019}}, "text": "d"},
        {"raw_content": "e", "url": "u"},
        {"text": None, "raw_content": "f"},
    ]
    dataset = patched(data_files=write(tmp_path / "a.jsonl", rows))
    assert decoded(dataset) == list("abcdef")
    assert [json.loads(meta) for meta in dataset["meta"][:4]] == [
        rows[0]["meta"],
        rows[1]["meta"],
        {"timestamp": None, "extra": [1, "two"]},
        rows[3]["meta"],
    ]


@pytest.mark.parametrize("escaped", [True, False])
def test_only_newlines_end_lines(tmp_path, escaped):
    """Raw U+2028 or U+0085 is an ordinary character of a JSON string, and a line of CRLF files may be blank."""
    text = "a\u2028b\u2029c\u0085d\ufeff e\r\nf\x00"
    data = b"\n\r\n  \n" + to_jsonl(rows_of([text, text]), ensure_ascii=escaped).replace(b"\n", b"\r\n\n")
    (tmp_path / "a.jsonl").write_bytes(data.rstrip())
    rows, reader = read(tmp_path / "a.jsonl")
    assert texts_of(rows) == [text, text]
    assert reader.counts == Counter(kept=2)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_counted(tmp_path, name):
    row, kind = LEFT_OUT[name]
    rows, reader = read(write(tmp_path / "a.jsonl", [{"text": "before"}, row, {"text": "after"}]))
    assert texts_of(rows) == ["before", "after"]
    assert reader.counts == Counter({"kept": 2, kind: 1})


def test_utf16_is_no_utf8(tmp_path):
    """Catches json.loads on bytes, which guesses the encoding."""
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": "words"}).encode("utf-16"))
    rows, reader = read(tmp_path / "a.jsonl")
    assert not rows and reader.counts == Counter(broken=1)


@pytest.mark.parametrize("column", ["text", "meta"])
def test_half_a_surrogate_does_not_stop_the_reading(tmp_path, patched, column):
    r"""`"\ud800"` is JSON, but no text that UTF-8 or an Arrow table can hold."""
    odd = {"text": "odd", "meta": {"title": "odd"}}
    odd[column] = "\ud800" if column == "text" else {"title": "\ud800"}
    dataset = patched(data_files=write(tmp_path / "a.jsonl", [{"text": "before"}, odd, {"text": "after"}]))
    texts = decoded(dataset)
    assert texts[0] == "before" and texts[-1] == "after" and len(texts) in (2, 3)


def test_counts_over_files_and_the_report(tmp_path):
    rows = [{"text": "a"}] * 13 + [{"text": ""}] * 2 + [{"meta": {}}] * 3 + [b"{"] * 4
    first = write(tmp_path / "a.jsonl", rows)
    second = write(tmp_path / "a.jsonl.gz", rows)
    found, reader = read(first, second)
    assert [row["source"] for row in found] == ["a.jsonl"] * 13 + ["a.jsonl.gz"] * 13
    assert reader.counts == Counter({"kept": 26, "blank": 4, "no text": 6, "broken": 8})
    assert sorted(numbers_in(reader.report())) == [4, 6, 8, 26]
    assert "\n" not in reader.report() and "truncated" not in reader.report()


def test_the_report_of_a_clean_file(tmp_path):
    _, reader = read(write(tmp_path / "a.jsonl", rows_of(TEXTS)))
    assert numbers_in(reader.report()) == [len(TEXTS)]


def test_counts_during_iteration(tmp_path):
    """A reader that is left early has counted what it read, and no more."""
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


# ------------------------------------------------------------------------------------------------------------ archives


@pytest.mark.parametrize("name", [*ARCHIVES, "b.jsonl.zst"])
def test_archives_of_several_parts(tmp_path, name):
    """Compressors that work in parallel, and `cat`, make archives of several members or frames."""
    parts = [COMPRESS[name](to_jsonl(rows_of(TEXTS))) for _ in range(3)]
    (tmp_path / name).write_bytes(b"".join(parts))
    rows, reader = read(tmp_path / name)
    assert texts_of(rows) == TEXTS * 3
    assert reader.counts == Counter(kept=3 * len(TEXTS))


def test_a_line_over_two_frames(tmp_path):
    data = to_jsonl(rows_of(TEXTS))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard_frame(data[:20]) + zstandard_frame(data[20:]))
    rows, reader = read(tmp_path / "a.jsonl.zst")
    assert texts_of(rows) == TEXTS and reader.counts == Counter(kept=len(TEXTS))


def test_skippable_frames(tmp_path):
    """pzstd writes one before each frame."""
    skippable = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"size"
    frame = zstandard_frame(to_jsonl(rows_of(TEXTS)))
    (tmp_path / "a.jsonl.zst").write_bytes((skippable + frame) * 2)
    rows, reader = read(tmp_path / "a.jsonl.zst")
    assert texts_of(rows) == TEXTS * 2 and reader.counts == Counter(kept=2 * len(TEXTS))


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from([*ARCHIVES, "b.jsonl.zst"]), where=st.floats(0, 1), repeat=st.integers(1, 3))
def test_an_archive_that_ends_anywhere(tmp_path_factory, name, where, repeat):
    """Catches zstandard's readers, which take the end of the file for the end of the frame."""
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


def incompressible(count=300):
    generator = random.Random(0)
    return [generator.randbytes(1000).hex() for _ in range(count)]


def cut(archive):
    return archive[: 2 * len(archive) // 3]


def flipped(archive):
    middle = 2 * len(archive) // 3
    return archive[:middle] + bytes(255 - byte for byte in archive[middle : middle + 4000]) + archive[middle + 4000 :]


@pytest.mark.parametrize("harm", [cut, flipped])
@pytest.mark.parametrize("name", ARCHIVES)
def test_what_was_read_before_the_harm_counts(tmp_path, patched, caplog, name, harm):
    texts = incompressible()
    (tmp_path / name).write_bytes(harm(COMPRESS[name](to_jsonl(rows_of(texts)))))
    rows, reader = read(tmp_path / name, write(tmp_path / "next.jsonl", rows_of(["next"])))
    kept = texts_of(rows)
    assert kept[-1] == "next" and reader.counts["truncated"] == 1
    # Checksums are looked at last: until then a flipped byte may pass for text.
    healthy = [text for text in kept[:-1] if text in texts]
    assert healthy[:100] == texts[:100]

    dataset = patched(data_files=str(tmp_path / name), rule="whitespace")
    assert decoded(dataset) == kept[:-1]
    assert len(warnings_of(caplog)) == 1 and "truncated" in warnings_of(caplog)[0]


@pytest.mark.parametrize("count", [4, 3000])
def test_a_wrong_checksum_is_told(tmp_path, count):
    """It is the last thing of an archive: how much of what came before is kept depends on the size of the reads."""
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
def test_no_archive_at_all(tmp_path, name):
    COMPRESS[name](b"")  # skips the test where zstandard is missing
    (tmp_path / name).write_bytes(to_jsonl(rows_of(TEXTS)))
    rows, reader = read(tmp_path / name, write(tmp_path / "next.jsonl", rows_of(["next"])))
    assert texts_of(rows) == ["next"] and reader.counts == Counter(kept=1, truncated=1)


# ------------------------------------------------------------------------------------------------------------- dataset


def test_columns_and_patches(tmp_path, patched, predictor):
    """The result is what EntropyPatcher makes of the same texts, and holds no text that a trainer could take."""
    path = write(tmp_path / "a.jsonl", rows_of(TEXTS))
    dataset = patched(data_files=path, entropy_threshold=7.2, relative_threshold=0.3)
    assert set(dataset.column_names) == COLUMNS
    assert decoded(dataset) == TEXTS
    assert list(dataset["source"]) == ["a.jsonl"] * len(TEXTS)
    assert [json.loads(meta)["number"] for meta in dataset["meta"]] == list(range(len(TEXTS)))
    assert all(sum(row["patch_lengths"]) == len(row["input_ids"]) for row in dataset)
    expected = EntropyPatcher(predictor, 7.2, 0.3).patch([text.encode() for text in TEXTS])
    for row, document in zip(dataset, expected, strict=True):
        assert row["input_ids"] == document.input_ids.tolist()
        assert row["patch_lengths"] == document.patch_lengths.tolist()


def test_the_thresholds_of_the_guide_are_the_defaults(tmp_path, patched):
    path = write(tmp_path / "a.jsonl", rows_of(TEXTS))
    explicit = patched(data_files=path, entropy_threshold=0.8, relative_threshold=0.1)
    assert list(patched(data_files=path)["patch_lengths"]) == list(explicit["patch_lengths"])
    other = patched(data_files=path, entropy_threshold=9.0, relative_threshold=9.0)
    assert list(other["patch_lengths"]) != list(explicit["patch_lengths"])


def test_other_settings_reach_the_patcher(tmp_path, patched):
    path = write(tmp_path / "a.jsonl", rows_of(TEXTS))
    full = patched(data_files=path, return_entropies=True, return_binary_patches=True)
    assert set(full.column_names) == COLUMNS | {"entropies", "binary_patches"}
    for row, text in zip(full, TEXTS, strict=True):
        assert len(row["entropies"]) == len(row["input_ids"]) and max(row["entropies"]) > 0
        assert b"".join(from_binary(row["binary_patches"])) == text.encode()
    strides = patched(data_files=path, rule="stride", max_patch_length=3, reset_on_newline=False)
    size = len(TEXTS[0].encode())
    assert strides[0]["patch_lengths"] == [1] + [3] * (size // 3) + [size % 3] * (size % 3 > 0) + [1]
    bare = patched(data_files=path, rule="whitespace", add_special_tokens=False)
    assert bare[3]["input_ids"] == [ord("x") + 4] and bare[3]["patch_lengths"] == [1]


def cut_to(texts, max_chars):
    """What max_chars characters of the documents that are not blank are."""
    taken, left = [], max_chars
    for text in texts:
        if text.strip() and (left is None or left > 0):
            taken.append(text if left is None else text[:left])
            left = None if left is None else left - len(taken[-1])
    return taken


@pytest.mark.parametrize("max_chars", [1, 5, 23, 24, 25, 53, 57, 63, 64, 65, 66, 1000, None])
def test_max_chars_counts_characters(tmp_path, patched, max_chars):
    """Documents of 24, 29, 9 and 1 characters, and more bytes: cut within, at and after each."""
    assert list(map(len, TEXTS)) == [24, 29, 9, 1]
    path = write(tmp_path / "a.jsonl", rows_of(TEXTS), ensure_ascii=False)
    found = decoded(patched(max_chars, data_files=path))
    assert found == cut_to(TEXTS, max_chars)
    assert sum(map(len, found)) == min(max_chars or 63, 63)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=6),
    max_chars=st.none() | st.integers(1, 30),
)
def test_any_cut(tmp_path_factory, predictor, texts, max_chars):
    path = write(tmp_path_factory.getbasetemp() / "a.jsonl", [{"text": "é"}, *rows_of(texts)])
    dataset = get_redpajama_binary_dataset(max_chars, predictor, data_files=path, rule="whitespace")
    assert decoded(dataset) == cut_to(["é", *texts], max_chars)
    assert all(sum(row["patch_lengths"]) == len(row["input_ids"]) for row in dataset)


def test_a_thousand_characters_by_default(tmp_path, predictor):
    path = write(tmp_path / "a.jsonl", rows_of(["ä" * 900, "ö" * 900]))
    dataset = get_redpajama_binary_dataset(entropy_predictor=predictor, data_files=path, rule="whitespace")
    assert decoded(dataset) == ["ä" * 900, "ö" * 100]


def test_files_in_their_order(tmp_path, patched):
    """A path, several, patterns, and a name that looks like a pattern."""
    for name in ["c.jsonl", "a.jsonl", "b.jsonl", "a.jsonl.gz", "d[1].jsonl"]:
        write(tmp_path / name, [{"text": name}])

    def found(files, max_chars=None):
        dataset = patched(max_chars, data_files=files, rule="whitespace")
        assert decoded(dataset) == cut_to(dataset["source"], max_chars)
        return list(dataset["source"])

    assert found(str(tmp_path / "b.jsonl")) == found(tmp_path / "b.jsonl") == ["b.jsonl"]
    assert found([str(tmp_path / "c.jsonl"), tmp_path / "a.jsonl"]) == ["c.jsonl", "a.jsonl"]
    assert found(str(tmp_path / "?.jsonl")) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert found([str(tmp_path / "*.gz"), str(tmp_path / "[bc].jsonl")]) == ["a.jsonl.gz", "b.jsonl", "c.jsonl"]
    assert found(str(tmp_path / "d[1].jsonl")) == ["d[1].jsonl"]
    assert found(str(tmp_path / "?.jsonl"), 10) == ["a.jsonl", "b.jsonl"]


def test_a_file_that_changed_is_read_again(tmp_path, patched):
    """Catches a cache that knows files by their name."""
    path = tmp_path / "a.jsonl"
    for text in ["before", "after!"]:
        assert decoded(patched(data_files=write(path, [{"text": text}]))) == [text]


def test_rows_for_the_collators(tmp_path, patched):
    dataset = patched(data_files=write(tmp_path / "a.jsonl", rows_of(TEXTS)))
    padded = PatchDataCollator()(list(dataset))
    assert padded["attention_mask"].sum(1).tolist() == [len(ids) for ids in dataset["input_ids"]]
    packed = PackedPatchDataCollator(max_patches=1000)([dataset[index] for index in range(len(TEXTS))])
    assert packed["input_ids"].shape == (1, sum(len(ids) for ids in dataset["input_ids"]))
    arrays = PatchDataCollator()(list(dataset.with_format("numpy", columns=["input_ids", "patch_lengths"])))
    assert np.array_equal(arrays["input_ids"], padded["input_ids"])


# ------------------------------------------------------------------------------------------------ warnings and refusals


def test_one_warning_with_the_counts(tmp_path, patched, caplog):
    rows = [{"text": "a"}] * 11 + [{"text": ""}] * 2 + [{"meta": {}}] * 3 + [b"{"] * 4
    files = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "a.jsonl.gz", rows_of(TEXTS))]
    with open(files[1], "rb+") as file:
        file.truncate(12)
    patched(data_files=files)
    (warning,) = warnings_of(caplog)
    assert {2, 3, 4, 1} <= set(numbers_in(warning))
    assert all(kind in warning for kind in ("blank", "text", "broken", "truncated"))


def test_no_warning_if_nothing_is_skipped(tmp_path, patched, caplog):
    patched(data_files=write(tmp_path / "a.jsonl", rows_of(TEXTS)))
    patched(100, offline_sample=True)
    assert not warnings_of(caplog)


def test_what_comes_after_the_last_document_is_not_looked_at(tmp_path, patched, caplog):
    files = [write(tmp_path / "a.jsonl", [*rows_of(TEXTS), b"{", {"text": ""}]), str(tmp_path / "a.jsonl.gz")]
    (tmp_path / "a.jsonl.gz").write_bytes(b"no archive")
    assert decoded(patched(30, data_files=files)) == cut_to(TEXTS, 30)
    assert decoded(patched(63, data_files=files)) == TEXTS
    assert not warnings_of(caplog)


@pytest.mark.parametrize("missing", ["nowhere.jsonl", "none*.jsonl"])
def test_files_that_are_not_there_are_named(tmp_path, patched, missing):
    good, missing = write(tmp_path / "a.jsonl", rows_of(TEXTS)), str(tmp_path / missing)
    for files in [missing, [missing], [good, missing]]:
        with pytest.raises(ValueError, match=re.escape(missing)):
            patched(data_files=files)
    with pytest.raises(ValueError, match=re.escape(missing)):
        # Even if the first file would do.
        patched(1, data_files=[good, missing])


@pytest.mark.parametrize("max_chars", [0, -5])
def test_too_few_characters_are_refused(tmp_path, patched, max_chars):
    path = write(tmp_path / "a.jsonl", rows_of(TEXTS))
    for kwargs in [{"data_files": path}, {"offline_sample": True}, {}]:
        with pytest.raises(ValueError, match="max_chars"):
            patched(max_chars, **kwargs)


def test_files_and_a_sample_are_refused(tmp_path, patched):
    with pytest.raises(ValueError, match="data_files.*offline_sample|offline_sample.*data_files"):
        patched(data_files=write(tmp_path / "a.jsonl", rows_of(TEXTS)), offline_sample=True)


@pytest.mark.parametrize("source", ["common_crawl", "C4", "", "cc"])
def test_unknown_sources_are_refused(patched, source):
    with pytest.raises(ValueError) as raised:
        patched(source=source)
    assert all(name in str(raised.value) for name in SOURCES)


def test_nothing_to_read_is_refused_with_the_counts(tmp_path, patched):
    rows = [{"text": ""}] * 2 + [{"meta": {}}] * 3 + [b"{"] * 4
    with pytest.raises(ValueError) as raised:
        patched(data_files=write(tmp_path / "a.jsonl", rows))
    assert {2, 3, 4} <= set(numbers_in(str(raised.value)))
    assert all(kind in str(raised.value) for kind in ("blank", "text", "broken"))
    with pytest.raises(ValueError):
        patched(data_files=write(tmp_path / "a.jsonl", []))


# ------------------------------------------------------------------------------------------------------ offline sample


@pytest.mark.parametrize("max_chars", [1, 7, 1000, 20_000])
def test_the_offline_sample(patched, max_chars):
    first, second = (patched(max_chars, offline_sample=True, rule="whitespace") for _ in range(2))
    assert list(first) == list(second)
    assert set(first.column_names) == COLUMNS
    texts = decoded(first)
    assert sum(map(len, texts)) == max_chars
    assert all(texts) and (max_chars < 1000 or len(texts) >= 3)
    assert all(isinstance(json.loads(meta), dict) for meta in first["meta"])


def test_a_longer_sample_begins_like_a_shorter_one(patched):
    short, long = (decoded(patched(size, offline_sample=True, rule="whitespace")) for size in (1000, 3000))
    assert long[: len(short) - 1] == short[:-1] and long[len(short) - 1].startswith(short[-1])


# ------------------------------------------------------------------------------------------------------------- the Hub


def hub_row(number):
    row = json.dumps({"text": f"document {number:08d} ", "meta": {"timestamp": "2019", "url": "u"}})
    return (row[:-1] + " " * (ROW_WIDTH - 1 - len(row)) + "}\n").encode()


class HubHandler(BaseHTTPRequestHandler):
    """The few answers that the client asks for to stream one file of a dataset."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(self.tree())

    def tree(self):
        size = self.server.hub.num_rows * ROW_WIDTH
        return [
            {"type": "file", "oid": "a" * 40, "size": size, "path": f"{source}_sample.jsonl"} for source in SOURCES
        ]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if "/resolve/" in self.path:
            self.serve_file()
        elif "/tree/" in self.path:
            self.answer(self.tree())
        else:
            self.answer({"id": SAMPLE, "sha": "a" * 40, "siblings": [], "private": False, "tags": []})

    def serve_file(self):
        hub, wanted = self.server.hub, re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        size = hub.num_rows * ROW_WIDTH
        begin, end = (int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)) if wanted else (0, size - 1)
        hub.files.add(self.path.split("?")[0])
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end + 1 - begin))
        self.send_header("ETag", '"a"')
        self.send_header("X-Repo-Commit", "a" * 40)
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{end}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            while begin <= end:
                first = begin // ROW_WIDTH
                rows = b"".join(map(hub_row, range(first, first + 256)))
                piece = rows[begin - first * ROW_WIDTH :][: end + 1 - begin]
                self.wfile.write(piece)
                begin += len(piece)
                hub.num_bytes += len(piece)
        except OSError:
            # The client has read enough.
            self.close_connection = True


def use_endpoint(monkeypatch, url, offline=False):
    """Let the client of this process take `url` for the Hub."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    huggingface_hub.close_session()


@pytest.fixture
def hub(monkeypatch):
    """A loopback server in the place of the Hub, that counts what it serves."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.daemon_threads = True
    server.hub = SimpleNamespace(num_rows=0, num_bytes=0, files=set())
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield server.hub
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def test_the_sample_on_the_hub_is_read_no_further_than_needed(patched, hub, caplog):
    hub.num_rows = 200_000  # about 100 MB
    dataset = patched(1000, rule="whitespace")
    texts = decoded(dataset)
    assert "".join(texts) == "".join(f"document {number:08d} " for number in range(60))[:1000]
    assert set(dataset["source"]) == {"c4_sample.jsonl"}
    assert json.loads(dataset[0]["meta"]) == {"timestamp": "2019", "url": "u"}
    assert hub.files == {f"/datasets/{SAMPLE}/resolve/main/c4_sample.jsonl"}
    assert 0 < hub.num_bytes < 0.25 * hub.num_rows * ROW_WIDTH
    assert not warnings_of(caplog)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_on_the_hub(patched, hub, source):
    hub.num_rows = 3
    dataset = patched(source=source, rule="whitespace")
    assert decoded(dataset) == [f"document {number:08d} " for number in range(3)]
    assert hub.files == {f"/datasets/{SAMPLE}/resolve/main/{source}_sample.jsonl"}


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_error_says_what_to_do(monkeypatch, patched, offline):
    """HF_HUB_OFFLINE=1, or a connection that is refused: one sentence that names both ways out."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_endpoint(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}", offline)
        with pytest.raises(ValueError) as raised:
            patched()
    huggingface_hub.close_session()
    message = str(raised.value)
    assert "data_files" in message and "offline_sample" in message and "\n" not in message


def test_files_and_the_sample_need_no_network(monkeypatch, tmp_path, patched):
    def refuse(*args, **kwargs):
        raise AssertionError("The Hub was asked.")

    monkeypatch.setattr(huggingface_hub.HfFileSystem, "__init__", refuse)
    assert decoded(patched(data_files=write(tmp_path / "a.jsonl", rows_of(TEXTS)))) == TEXTS
    assert len(patched(100, offline_sample=True))


def test_archives_that_others_read_are_read(tmp_path):
    """Zeros that fill the last block, a suffix in capitals, a window above the library's default, a name with colons."""
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


@pytest.mark.parametrize("files", [[], ["shard.jsonl.xz"]])
def test_no_shards_and_other_archives_are_refused(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shard.jsonl.xz").write_bytes(b"\xfd7zXZ")
    with pytest.raises(ValueError, match="data_files|shard.jsonl.xz"):
        get_redpajama_binary_dataset(data_files=files)
