"""Tests of the RedPajama dataset: its rows, limits, warnings, the offline sample and the sample on the Hub."""

import json
import logging
import re
import socket
import threading
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
)


SOURCES = """arxiv book c4 github stackexchange wikipedia
cc_2019-30 cc_2020-05 cc_2021-04 cc_2022-05 cc_2023-06""".split()
SAMPLE = "togethercomputer/RedPajama-Data-1T-Sample"
COLUMNS = {"input_ids", "patch_lengths", "meta", "source"}
ROW_WIDTH = 512


@pytest.fixture(scope="module", name="predictor")
def predictor_fixture():
    set_seed(0)
    return ByteEntropyPredictor(hidden_size=16, num_layers=2, num_heads=2, ff_dim=32, initializer_range=0.5)


@pytest.fixture(name="patched")
def patched_fixture(predictor):
    """Return the function under test with a tiny predictor."""

    def build(max_chars=None, **kwargs):
        return get_redpajama_binary_dataset(max_chars, predictor, **kwargs)

    return build


def decoded(dataset):
    """Decode the texts, and check that each is enclosed in one id 1 and one id 2."""
    texts = []
    for ids in dataset["input_ids"]:
        assert ids[0] == 1 and ids[-1] == 2
        texts.append(bytes(token - 4 for token in ids[1:-1]).decode())
    return texts


def warnings_of(caplog):
    # Without duplicates: caplog sees a record twice if another test left its handler on a parent logger.
    return [
        record.getMessage()
        for record in dict.fromkeys(caplog.records)
        if record.name == "crow_hf.patching.redpajama" and record.levelno >= logging.WARNING
    ]


def test_schemas_may_change_within_a_file(tmp_path, patched):
    """Fails if the first rows determine the types of the columns."""
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


@pytest.mark.parametrize("column", ["text", "meta"])
def test_half_a_surrogate_does_not_stop_the_reader(tmp_path, patched, column):
    r"""`"\ud800"` is valid JSON, but neither UTF-8 nor an Arrow table can hold it."""
    odd = {"text": "odd", "meta": {"title": "odd"}}
    odd[column] = "\ud800" if column == "text" else {"title": "\ud800"}
    dataset = patched(data_files=write(tmp_path / "a.jsonl", [{"text": "before"}, odd, {"text": "after"}]))
    texts = decoded(dataset)
    assert texts[0] == "before" and texts[-1] == "after" and len(texts) in (2, 3)


def cut(archive):
    return archive[: 2 * len(archive) // 3]


def flipped(archive):
    middle = 2 * len(archive) // 3
    return archive[:middle] + bytes(255 - byte for byte in archive[middle : middle + 4000]) + archive[middle + 4000 :]


@pytest.mark.parametrize("damage", [cut, flipped])
@pytest.mark.parametrize("name", ARCHIVES)
def test_rows_before_the_damage_are_kept(tmp_path, patched, caplog, name, damage):
    texts = incompressible()
    (tmp_path / name).write_bytes(damage(COMPRESS[name](to_jsonl(rows_of(texts)))))
    rows, reader = read(tmp_path / name, write(tmp_path / "next.jsonl", rows_of(["next"])))
    kept = texts_of(rows)
    assert kept[-1] == "next" and reader.counts["truncated"] == 1
    # Checksums are checked last, so a flipped byte may pass for text until then.
    healthy = [text for text in kept[:-1] if text in texts]
    assert healthy[:100] == texts[:100]

    dataset = patched(data_files=str(tmp_path / name), rule="whitespace")
    assert decoded(dataset) == kept[:-1]
    assert len(warnings_of(caplog)) == 1 and "truncated" in warnings_of(caplog)[0]


def test_columns_and_patches_equal_those_of_the_patcher(tmp_path, patched, predictor):
    """The rows equal those of EntropyPatcher, and there is no column `text` that a trainer could use."""
    path = write(tmp_path / "a.jsonl", rows_of(TEXTS))
    dataset = patched(data_files=path, entropy_threshold=0.9, relative_threshold=0.3, unit="share")
    assert set(dataset.column_names) == COLUMNS
    assert decoded(dataset) == TEXTS
    assert list(dataset["source"]) == ["a.jsonl"] * len(TEXTS)
    assert [json.loads(meta)["number"] for meta in dataset["meta"]] == list(range(len(TEXTS)))
    assert all(sum(row["patch_lengths"]) == len(row["input_ids"]) for row in dataset)
    expected = EntropyPatcher(predictor, 0.9, 0.3).patch([text.encode() for text in TEXTS])
    for row, document in zip(dataset, expected, strict=True):
        assert row["input_ids"] == document.input_ids.tolist()
        assert row["patch_lengths"] == document.patch_lengths.tolist()


def test_the_thresholds_of_the_guide_are_the_defaults(tmp_path, patched):
    path = write(tmp_path / "a.jsonl", rows_of(TEXTS))
    explicit = patched(data_files=path, entropy_threshold=0.8, relative_threshold=0.1)
    assert list(patched(data_files=path)["patch_lengths"]) == list(explicit["patch_lengths"])
    other = patched(data_files=path, entropy_threshold=1.0, relative_threshold=1.0)
    assert list(other["patch_lengths"]) != list(explicit["patch_lengths"])
    bits = patched(data_files=path, entropy_threshold=6.4, relative_threshold=0.8, unit="bits")
    assert list(bits["patch_lengths"]) == list(explicit["patch_lengths"])


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
    """Return the first `max_chars` characters of the documents that are not blank."""
    taken, left = [], max_chars
    for text in texts:
        if text.strip() and (left is None or left > 0):
            taken.append(text if left is None else text[:left])
            left = None if left is None else left - len(taken[-1])
    return taken


@pytest.mark.parametrize("max_chars", [1, 5, 23, 24, 25, 53, 57, 63, 64, 65, 66, 1000, None])
def test_max_chars_counts_characters(tmp_path, patched, max_chars):
    """Cuts within, at and after documents of 24, 29, 9 and 1 characters, which have more bytes."""
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
def test_any_texts_and_limits_are_cut_correctly(tmp_path_factory, predictor, texts, max_chars):
    path = write(tmp_path_factory.getbasetemp() / "a.jsonl", [{"text": "é"}, *rows_of(texts)])
    dataset = get_redpajama_binary_dataset(max_chars, predictor, data_files=path, rule="whitespace")
    assert decoded(dataset) == cut_to(["é", *texts], max_chars)
    assert all(sum(row["patch_lengths"]) == len(row["input_ids"]) for row in dataset)


def test_the_default_is_a_thousand_characters(tmp_path, predictor):
    path = write(tmp_path / "a.jsonl", rows_of(["ä" * 900, "ö" * 900]))
    dataset = get_redpajama_binary_dataset(entropy_predictor=predictor, data_files=path, rule="whitespace")
    assert decoded(dataset) == ["ä" * 900, "ö" * 100]


def test_files_are_read_in_order(tmp_path, patched):
    """Reads one path, several paths, patterns, and a name that looks like a pattern."""
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
    """Fails if a cache identifies files by their names."""
    path = tmp_path / "a.jsonl"
    for text in ["before", "after!"]:
        assert decoded(patched(data_files=write(path, [{"text": text}]))) == [text]


def test_rows_fit_the_collators(tmp_path, patched):
    dataset = patched(data_files=write(tmp_path / "a.jsonl", rows_of(TEXTS)))
    padded = PatchDataCollator()(list(dataset))
    assert padded["attention_mask"].sum(1).tolist() == [len(ids) for ids in dataset["input_ids"]]
    packed = PackedPatchDataCollator(max_patches=1000)([dataset[index] for index in range(len(TEXTS))])
    assert packed["input_ids"].shape == (1, sum(len(ids) for ids in dataset["input_ids"]))
    arrays = PatchDataCollator()(list(dataset.with_format("numpy", columns=["input_ids", "patch_lengths"])))
    assert np.array_equal(arrays["input_ids"], padded["input_ids"])


def test_skipped_rows_give_one_warning_with_the_counts(tmp_path, patched, caplog):
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


def test_rows_after_the_last_document_are_not_read(tmp_path, patched, caplog):
    files = [write(tmp_path / "a.jsonl", [*rows_of(TEXTS), b"{", {"text": ""}]), str(tmp_path / "a.jsonl.gz")]
    (tmp_path / "a.jsonl.gz").write_bytes(b"no archive")
    assert decoded(patched(30, data_files=files)) == cut_to(TEXTS, 30)
    assert decoded(patched(63, data_files=files)) == TEXTS
    assert not warnings_of(caplog)


@pytest.mark.parametrize("missing", ["missing.jsonl", "none*.jsonl"])
def test_missing_files_are_named(tmp_path, patched, missing):
    good, missing = write(tmp_path / "a.jsonl", rows_of(TEXTS)), str(tmp_path / missing)
    for files in [missing, [missing], [good, missing]]:
        with pytest.raises(ValueError, match=re.escape(missing)):
            patched(data_files=files)
    with pytest.raises(ValueError, match=re.escape(missing)):
        # Even if the first file has enough characters.
        patched(1, data_files=[good, missing])


@pytest.mark.parametrize("max_chars", [0, -5])
def test_too_few_characters_are_refused(tmp_path, patched, max_chars):
    path = write(tmp_path / "a.jsonl", rows_of(TEXTS))
    for kwargs in [{"data_files": path}, {"offline_sample": True}, {}]:
        with pytest.raises(ValueError, match="max_chars"):
            patched(max_chars, **kwargs)


def test_files_together_with_a_sample_are_refused(tmp_path, patched):
    with pytest.raises(ValueError, match="data_files.*offline_sample|offline_sample.*data_files"):
        patched(data_files=write(tmp_path / "a.jsonl", rows_of(TEXTS)), offline_sample=True)


@pytest.mark.parametrize("source", ["common_crawl", "C4", "", "cc"])
def test_unknown_sources_are_refused(patched, source):
    with pytest.raises(ValueError) as raised:
        patched(source=source)
    assert all(name in str(raised.value) for name in SOURCES)


def test_files_without_documents_are_refused_with_the_counts(tmp_path, patched):
    rows = [{"text": ""}] * 2 + [{"meta": {}}] * 3 + [b"{"] * 4
    with pytest.raises(ValueError) as raised:
        patched(data_files=write(tmp_path / "a.jsonl", rows))
    assert {2, 3, 4} <= set(numbers_in(str(raised.value)))
    assert all(kind in str(raised.value) for kind in ("blank", "text", "broken"))
    with pytest.raises(ValueError):
        patched(data_files=write(tmp_path / "a.jsonl", []))


@pytest.mark.parametrize("max_chars", [1, 7, 1000, 20_000])
def test_the_offline_sample_is_reproducible_and_has_the_size(patched, max_chars):
    first, second = (patched(max_chars, offline_sample=True, rule="whitespace") for _ in range(2))
    assert list(first) == list(second)
    assert set(first.column_names) == COLUMNS
    texts = decoded(first)
    assert sum(map(len, texts)) == max_chars
    assert all(texts) and (max_chars < 1000 or len(texts) >= 3)
    assert all(isinstance(json.loads(meta), dict) for meta in first["meta"])


def test_a_longer_sample_starts_with_the_shorter_one(patched):
    short, long = (decoded(patched(size, offline_sample=True, rule="whitespace")) for size in (1000, 3000))
    assert long[: len(short) - 1] == short[:-1] and long[len(short) - 1].startswith(short[-1])


def hub_row(number):
    row = json.dumps({"text": f"document {number:08d} ", "meta": {"timestamp": "2019", "url": "u"}})
    return (row[:-1] + " " * (ROW_WIDTH - 1 - len(row)) + "}\n").encode()


class HubHandler(BaseHTTPRequestHandler):
    """Answers the requests that a client needs to stream one file of a dataset."""

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
            # The client has closed the connection.
            self.close_connection = True


def use_endpoint(monkeypatch, url, offline=False):
    """Direct the Hub client of this process to `url`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    huggingface_hub.close_session()


@pytest.fixture
def hub(monkeypatch):
    """A loopback server that replaces the Hub and counts the bytes it serves."""
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
def test_every_source_on_the_hub_is_read(patched, hub, source):
    hub.num_rows = 3
    dataset = patched(source=source, rule="whitespace")
    assert decoded(dataset) == [f"document {number:08d} " for number in range(3)]
    assert hub.files == {f"/datasets/{SAMPLE}/resolve/main/{source}_sample.jsonl"}


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_error_says_what_to_do(monkeypatch, patched, offline):
    """With HF_HUB_OFFLINE=1 or a refused connection, one line names both alternatives."""
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
        raise AssertionError("The Hub was accessed.")

    monkeypatch.setattr(huggingface_hub.HfFileSystem, "__init__", refuse)
    assert decoded(patched(data_files=write(tmp_path / "a.jsonl", rows_of(TEXTS)))) == TEXTS
    assert len(patched(100, offline_sample=True))


@pytest.mark.parametrize("files", [[], ["shard.jsonl.xz"]])
def test_empty_lists_and_unsupported_archives_are_refused(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shard.jsonl.xz").write_bytes(b"\xfd7zXZ")
    with pytest.raises(ValueError, match="data_files|shard.jsonl.xz"):
        get_redpajama_binary_dataset(data_files=files)
