"""The rows of a file are those that stand in it, whatever its name, its form and the caches."""

import gzip
import json
import os

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from crow_hf.data.load import load_rows


ROWS = [{"prompt": f"ask {n}", "completion": answer} for n, answer in enumerate(["one", "2021-05-01", "é 文", "NA"])]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


def loaded(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_rows(str(path)).to_list()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.v1.jsonl", LINES),
        ("mark.jsonl", "\ufeff" + LINES),
        ("windows.jsonl", LINES.replace("\n", "\r\n\r\n")),
        ("commas.jsonl", LINES.replace("}\n", "},\n")),
        ("ROWS.JSONL", LINES),
        ("rows.ndjson", LINES),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("lines.json", LINES),
        ("list.json", json.dumps(ROWS)),
        ("pretty.json", json.dumps(ROWS, indent=2)),
        ("comma.json", json.dumps(ROWS)[:-1] + ",\n]\n"),
        ("under.json", json.dumps({"version": 1, "data": ROWS})),
        ("columns.json", json.dumps(COLUMNS)),
        ("rows.csv", CSV),
        ("mark.csv", "\ufeff" + CSV),
        ("semicolons.csv", CSV.replace(",", ";")),
        ("tabs.tsv", CSV.replace(",", "\t")),
    ],
)
def test_rows_are_those_of_the_file(name, content, tmp_path):
    """Fails if a date becomes a point in time, "NA" no value, or a mark part of a name."""
    assert loaded(tmp_path / name, content) == ROWS


@pytest.mark.parametrize(
    "name",
    [
        "rows[1].jsonl",
        "rows*.jsonl",
        "what?.jsonl",
        "a{1,2}.jsonl",
        "run[2]/rows.jsonl",
        "a::b#c%20.jsonl",
        ".h/x.jsonl",
    ],
)
def test_signs_of_patterns_in_a_path_mean_nothing(name, tmp_path):
    """Fails if the rows of a file are read whose name fits a pattern."""
    for beside in ("rows1.jsonl", "rows22.jsonl", "what1.jsonl", "a1.jsonl", "run2/rows.jsonl"):
        loaded(tmp_path / beside, '{"text": "other"}\n')
    assert loaded(tmp_path / name, LINES) == ROWS


def test_a_changed_file_is_read_anew(tmp_path):
    """Fails if rows of a cache are read. Size and time of the file are the same."""
    path = tmp_path / "rows.jsonl"
    assert loaded(path, '{"text": "one"}\n') == [{"text": "one"}]
    before = path.stat()
    path.write_text('{"text": "two"}\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_rows(str(path)).to_list() == [{"text": "two"}]


def test_no_cache_is_needed(tmp_path, monkeypatch):
    """Fails if rows are copied into a cache, which may be full or read-only, or into the folder of the rows."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    rows = load_rows(str(tmp_path / "saved"))
    rows.map(lambda row: {"text": row["prompt"]})
    (tmp_path / "x.jsonl").write_text(LINES)
    load_rows(str(tmp_path / "x.jsonl")).map(lambda row: {"text": row["prompt"]})
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "x.jsonl"])


def test_numbers_are_text_as_written(tmp_path):
    """Answers may be numbers in some rows. Token ids stay numbers, and yes and no stay what they are."""
    rows = '{"text": 1}\n{"text": "two"}\n{"text": 3.50}\n{"text": -1e5}\n'
    assert [row["text"] for row in loaded(tmp_path / "numbers.jsonl", rows)] == ["1", "two", "3.50", "-1e5"]
    assert loaded(tmp_path / "ids.jsonl", '{"input_ids": [5, 6]}\n') == [{"input_ids": [5, 6]}]
    assert loaded(tmp_path / "yes.jsonl", '{"text": true}\n') == [{"text": True}]
    assert [row["a"] for row in loaded(tmp_path / "zeros.csv", "a,b\n007,\n3.0,x\n")] == ["007", "3.0"]


def test_keys_that_some_rows_lack(tmp_path):
    """Fails if a column of later rows is lost, in the first rows and beyond them."""
    lines = '{"text": "a"}\n' * 1500 + '{"text": "b", "more": [{"x": 1}]}\n'
    rows = loaded(tmp_path / "keys.jsonl", lines)
    assert rows[0] == {"text": "a", "more": None} and rows[-1] == {"text": "b", "more": [{"x": 1}]}


def test_lines_of_text_are_rows(tmp_path):
    assert loaded(tmp_path / "a.txt", "one\n\ntwo\u2028three\n") == [
        {"text": t} for t in ("one", "", "two\u2028three")
    ]


def test_parquet(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows[1].parquet")
    assert load_rows(str(tmp_path / "rows[1].parquet")).to_list() == ROWS


def test_folders_have_splits(tmp_path):
    """A folder that has no such split says which ones it has."""
    rows = Dataset.from_list(ROWS)
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "saved")
    for split in ("train", "test"):
        loaded(tmp_path / "files" / f"{split}.jsonl", LINES if split == "train" else LINES.splitlines()[1])
    for folder in ("saved", "files"):
        assert load_rows(str(tmp_path / folder)).to_list() == ROWS
        assert load_rows(str(tmp_path / folder), "test").to_list() == ROWS[1:2]
        with pytest.raises(ValueError, match=r"no split 'dev', but (train, test|test, train): choose"):
            load_rows(str(tmp_path / folder), "dev")
    assert load_rows(str(tmp_path / "saved" / "train")).to_list() == ROWS


def test_shards_of_a_split_are_merged(tmp_path):
    """A cloned dataset of the Hub has its files in `data`. Fails if rows are missing without a word."""
    for part in range(3):
        loaded(tmp_path / "data" / f"train-0000{part}-of-00003.jsonl", f'{{"text": "part {part}"}}\n')
    loaded(tmp_path / "data" / "test-00000-of-00001-a09b74b3ef9c3b56.jsonl", LINES)
    assert load_rows(str(tmp_path))["text"] == [f"part {part}" for part in range(3)]
    assert load_rows(str(tmp_path), "test").to_list() == ROWS
    (tmp_path / "data" / "train-00001-of-00003.jsonl").unlink()
    with pytest.raises(ValueError, match="are not one split: keep one file of it, or every shard"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("other", ["train.csv", "train.v2.jsonl", "data/train.jsonl", "train-00000-of-00001.jsonl"])
def test_two_files_of_one_split_are_refused(other, tmp_path):
    """Fails if one of them is chosen without a word."""
    for name in ("train.jsonl", other):
        loaded(tmp_path / name, CSV if name.endswith("csv") else LINES)
    with pytest.raises(ValueError, match="are not one split: keep one file"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("name", ["one.jsonl", "one.ndjson", "one.NDJSON", "one.jsonl.gz"])
def test_a_line_is_a_row(name, tmp_path):
    """Fails if the turns of a chat are taken for the rows of a document."""
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "there"}]}
    line = json.dumps(row)
    assert loaded(tmp_path / name, gzip.compress(line.encode()) if name.endswith("gz") else line) == [row]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("first.csv", "question,answer\nHow are you, friend?,Fine\n"),
        ("every.csv", "prompt,completion\nhi,there,\nyo,man,\n"),
        ("later.csv", "prompt,completion\nhi,there\nyo,my,man\n"),
        ("tabs.tsv", "prompt\tcompletion\nhi\tthere\tyou\n"),
    ],
)
def test_rows_longer_than_the_header_are_refused(name, content, tmp_path):
    """Fails if the columns of a row are shifted by one."""
    with pytest.raises(
        ValueError, match=rf"{name} cannot be read: a row has more fields than the header, .* in quotes"
    ):
        loaded(tmp_path / name, content)


def test_columns_without_a_name_of_their_own(tmp_path):
    assert loaded(tmp_path / "a.csv", "a,a,\nx,y,\nz\n") == [
        {"a": "x", "a.1": "y", "Unnamed: 2": ""},
        {"a": "z", "a.1": "", "Unnamed: 2": ""},
    ]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("empty.jsonl", "", "is empty"),
        ("empty.csv", "", "cannot be read"),
        ("header.csv", "prompt,completion\n", "is empty"),
        ("quote.csv", 'text\n"a\nb\n', "cannot be read: .*EOF inside string"),
        ("cut.jsonl", LINES[:-20], "the JSON of line 4 is broken"),
        ("quotes.jsonl", "{'text': 'a'}\n", "cannot be read"),
        ("utf16.jsonl", LINES.encode("utf-16"), "cannot be read"),
        ("latin.csv", "text\ncafé\n".encode("latin-1"), "cannot be read"),
        ("half.jsonl", '{"text": "\\ud83d"}\n', "cannot be read"),
        ("mixed.jsonl", '{"text": ["a"]}\n{"text": "a"}\n', "cannot be read"),
        ("ragged.json", '{"prompt": ["a", "b"], "completion": ["c"]}', "cannot be read"),
        ("broken.parquet", "x", "cannot be read"),
        ("pages.parquet", b"PAR1" + b"{" * 90 + b"PAR1", "cannot be read"),
        ("deep.json", '{"a":' * 50_000, "cannot be read"),
        ("text.jsonl", '"aaa"', "holds '\"aaa\"' and no rows"),
        ("number.json", "7", "and no rows"),
        ("damaged.jsonl.gz", gzip.compress(b"{}" * 9, mtime=0)[:10] + b"x" * 20, "cannot be read"),
        ("rows.xlsx", "x", "is no dataset"),
    ],
)
def test_unreadable_files_are_named(name, content, found, tmp_path):
    with pytest.raises(ValueError, match=f"{name} .*{found}|{name} {found}"):
        loaded(tmp_path / name, content)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"_data_files": [{}]}'])
def test_a_damaged_folder_of_save_to_disk_is_named(content, tmp_path):
    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "rows")
    (tmp_path / "rows" / "state.json").write_text(content)
    with pytest.raises(ValueError, match="rows cannot be read: "):
        load_rows(str(tmp_path / "rows"))


def test_missing_files_and_folders_without_rows(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        load_rows(str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="is no dataset"):
        load_rows(str(tmp_path))


def test_files_that_unpack_without_end_are_refused(tmp_path, monkeypatch):
    """Fails if a small file takes all memory, whatever packs it."""
    monkeypatch.setattr("crow_hf.data.bounds.FREE_BYTES", 2**20)
    bomb = gzip.compress(LINES.encode() * 40_000)
    table = pyarrow.table({"text": ["a" * 1000] * 10_000})
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "holes.txt").touch()
    os.truncate(tmp_path / "holes.txt", 2**40)
    for name, said in (
        ("rows.parquet", "it unpacks to over"),
        ("holes.txt", "it has over 1 MiB, but most of them are"),
    ):
        with pytest.raises(ValueError, match=f"{name} cannot be read: {said}"):
            load_rows(str(tmp_path / name))
    with pytest.raises(ValueError, match="it unpacks to over"):
        loaded(tmp_path / "rows.jsonl.gz", bomb)
    with pytest.raises(ValueError, match="it is compressed: unpack it, or put .gz at the end of its name"):
        loaded(tmp_path / "rows.jsonl", gzip.compress(LINES.encode()))
    with pytest.raises(ValueError, match="its rows have over 1000 columns"):
        loaded(tmp_path / "wide.jsonl", "".join(json.dumps({f"{n}": 1}) + "\n" for n in range(1_500)))


def test_a_pipe_is_no_dataset(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="rows.jsonl is a pipe or a device"):
        load_rows(str(tmp_path / "rows.jsonl"))
