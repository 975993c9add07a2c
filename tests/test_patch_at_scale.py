"""Tests of `examples/patch_at_scale.py` with datatrove, and of streams that several trainers share."""

import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from crow_hf import ByteEntropyPredictor, EntropyPatcher


SCRIPT = Path(__file__).parent.parent / "examples" / "patch_at_scale.py"
LETTERS = ("alpha", "beta", "gamma", "delta")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("patch_at_scale", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """A small untrained predictor whose thresholds give patches of several lengths."""
    torch.manual_seed(0)
    model = ByteEntropyPredictor(
        hidden_size=16, num_layers=1, num_heads=1, ff_dim=16, sliding_window=8, max_position_embeddings=64
    )
    model.config.patch_threshold, model.config.patch_relative_threshold = 0.9994, 0.00625
    path = tmp_path_factory.mktemp("predictor")
    model.save_pretrained(path)
    return str(path)


def text_of(file, number):
    return f"{file} says {LETTERS[number % 4]} ü {number}\n" * (1 + number * 7 % 23)


@pytest.fixture
def corpus(tmp_path):
    """Three files of different compression, each with 20 documents, a broken line and a blank document."""
    folder = tmp_path / "corpus"
    (folder / "crawl").mkdir(parents=True)
    for file in ("a.jsonl", "crawl/b.json.gz", "crawl/c.jsonl.zst"):
        lines = [json.dumps({"text": text_of(file, number), "meta": {}}) for number in range(20)]
        lines[7:7] = ["{broken", json.dumps({"text": "  "})]
        data = "".join(line + "\n" for line in lines).encode()
        compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(file).suffix, bytes)
        (folder / file).write_bytes(compress(data))
    return folder


def arguments(example, corpus, predictor, **kwargs):
    defaults = {"input_folder": str(corpus), "output_folder": str(corpus.parent / "patched"), "predictor": predictor}
    return example.Arguments(**(defaults | {"shard_megabytes": 0.001} | kwargs))


def run(example, args):
    executor = example.executor_of(args)
    executor.run()
    return executor


def rows_of(folder):
    return [row for file in sorted(Path(folder).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def assert_every_document_once(corpus, predictor, patched):
    """Check that the rows equal those of `Dataset.map` over the same texts."""
    texts = {}
    for file in ("a.jsonl", "crawl/b.json.gz", "crawl/c.jsonl.zst"):
        texts |= {f"{file}:{number}": text_of(file, number) for number in range(20)}
    plain = Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
    plain = plain.map(EntropyPatcher(predictor), batched=True, remove_columns="text", keep_in_memory=True)
    assert sorted(rows_of(patched), key=lambda row: row["id"]) == sorted(plain, key=lambda row: row["id"])


def test_shards_together_hold_every_document_once(example, corpus, predictor):
    """Fails if a document is lost or doubled, if skipped rows count twice, or if patches depend on the shard."""
    args = arguments(example, corpus, predictor)
    executor = run(example, args)
    assert executor.world_size > 9, "no file was shared"
    assert_every_document_once(corpus, predictor, args.output_folder)

    num_complete, total = example.progress(executor)
    rows = rows_of(args.output_folder)
    assert num_complete == executor.world_size
    assert total["documents"] == 60 and total["broken"] == total["blank"] == 3
    assert total["bytes"] == sum(len(row["input_ids"]) - 2 for row in rows)
    assert total["patches"] == sum(len(row["patch_lengths"]) for row in rows)


def start(corpus, predictor, *options):
    """Start the script in a new process group."""
    words = [
        "--input_folder",
        corpus,
        "--output_folder",
        corpus.parent / "patched",
        "--predictor",
        predictor,
        *options,
    ]
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def complete_shards(patched):
    return sorted((patched / "logs" / "completions").glob("*"))


def wait_for_the_middle_of_a_shard(process, patched, num_complete):
    deadline = time.monotonic() + 120
    while len(complete_shards(patched)) < num_complete or not list(patched.glob("unfinished/*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


@pytest.fixture
def long_corpus(corpus):
    """A corpus long enough to stop the job in the middle."""
    for number in range(8):
        lines = [json.dumps({"text": text_of(number, line) * 4}) for line in range(30)]
        (corpus / f"long-{number}.jsonl").write_text("\n".join(lines))
    return corpus


def assert_every_long_document_once(patched):
    ids = sorted(row["id"] for row in rows_of(patched))
    files = [("a.jsonl", 20), ("crawl/b.json.gz", 20), ("crawl/c.jsonl.zst", 20)]
    files += [(f"long-{number}.jsonl", 30) for number in range(8)]
    assert ids == sorted(f"{file}:{number}" for file, count in files for number in range(count))


def test_a_killed_run_continues(example, long_corpus, predictor):
    """Fails if finished shards are redone, if a partial shard counts, or if the totals leave out the first run."""
    patched = long_corpus.parent / "patched"
    process = start(long_corpus, predictor, "--shard_megabytes", "0.02")
    wait_for_the_middle_of_a_shard(process, patched, 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path.name: (patched / f"{path.name}.parquet").stat().st_mtime_ns for path in complete_shards(patched)}

    executor = run(example, arguments(example, long_corpus, predictor, shard_megabytes=0.02))
    assert 3 <= len(kept) < executor.world_size
    assert all((patched / f"{name}.parquet").stat().st_mtime_ns == written for name, written in kept.items())
    assert_every_long_document_once(patched)
    assert example.progress(executor)[1]["documents"] == 60 + 8 * 30


def test_two_writers_of_one_shard_give_one_complete_file(example, tmp_path):
    """Fails if a worker that outlives its launcher, or a restarted node, writes into the file of its successor."""
    writer = example.WriteShard(example.get_datafolder(str(tmp_path)))
    columns = {"input_ids": [1] * example.BATCH_CHARACTERS, "patch_lengths": [example.BATCH_CHARACTERS]}
    documents = [example.Document("x" * example.BATCH_CHARACTERS, str(n), metadata=columns) for n in range(3)]
    first, second = writer.run(documents, 5), writer.run(documents, 5)
    next(first), next(second), next(first)
    assert list(tmp_path.glob("*.parquet")) == []
    for attempt in (second, first):
        assert len(list(attempt)) < 3
        assert [row["id"] for row in rows_of(tmp_path)] == ["0", "1", "2"]


def test_an_empty_shard_becomes_a_file(example, tmp_path):
    """Without a file, readers could not tell an empty shard from a lost one."""
    writer = example.WriteShard(example.get_datafolder(str(tmp_path)))
    assert list(writer.run([], 0)) == []
    assert pq.read_table(tmp_path / "00000.parquet").schema == example.SCHEMA


def test_batches_are_bounded_by_size(example):
    """Fails if long documents make a batch too large, or if the last batch is lost."""
    sizes = [10, 2**19, 2**19, 5, 2**21, 3]
    batches = list(example.by_size(example.Document("x" * size, str(size)) for size in sizes))
    assert [[len(document.text) for document in batch] for batch in batches] == [[10, 2**19, 2**19], [5, 2**21], [3]]


def test_another_job_is_refused(example, corpus, predictor):
    """datatrove identifies shards by their numbers and would confuse the shards of two jobs in one folder."""
    run(example, arguments(example, corpus, predictor, shard_megabytes=1))
    with pytest.raises(ValueError, match="another `output_folder`"):
        example.executor_of(arguments(example, corpus, predictor, shard_megabytes=0.002))
    with pytest.raises(ValueError, match="another `output_folder`"):
        example.executor_of(arguments(example, corpus, None, shard_megabytes=1))
    (corpus / "d.jsonl").write_text('{"text": "new"}\n')
    with pytest.raises(ValueError, match="another `output_folder`"):
        example.executor_of(arguments(example, corpus, predictor, shard_megabytes=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pattern": "*.txt"}, "Pass another `pattern`"),
        ({"shard_megabytes": 0}, "`shard_megabytes` must be above 0"),
        ({"workers": 0}, "`workers` at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(example, corpus, predictor, wrong, message):
    """Fails if a bad job starts, or if it claims the output folder."""
    args = arguments(example, corpus, predictor, **wrong)
    with pytest.raises(ValueError, match=message):
        example.executor_of(args)
    assert not Path(args.output_folder).exists()


def test_output_inside_the_input_is_not_read(example, corpus, predictor):
    """Fails if files of datatrove count as documents, or if they make a continued job look like another job."""
    args = arguments(example, corpus, predictor, output_folder=str(corpus / "patched"), shard_megabytes=1)
    run(example, args)
    assert run(example, args).world_size == 3
    assert_every_document_once(corpus, predictor, args.output_folder)


@pytest.mark.slow
def test_workers_that_outlive_their_launcher_change_nothing(long_corpus, predictor):
    """Fails if workers of a killed run break shards of the next run, or if shards count twice."""
    patched = long_corpus.parent / "patched"
    options = ("--shard_megabytes", "0.02", "--workers", "2")
    killed = start(long_corpus, predictor, *options)
    try:
        wait_for_the_middle_of_a_shard(killed, patched, 3)
        killed.kill()
        restarted = start(long_corpus, predictor, *options)
        out, err = restarted.communicate(timeout=300)
        assert restarted.returncode == 0, err
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
    assert_every_long_document_once(patched)
    assert "'documents': 300" in out and not (patched / "unfinished").exists()


SLURM = {
    # Runs the tasks of the array one after the other, and skips the merge job.
    "sbatch": """
script=${@: -1}
if grep -q launch_pickled_pipeline "$script"; then
    last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
    for task in $(seq 0 "$last"); do
        SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=localhost SLURM_JOB_ID=7 bash "$script" >&2 || exit 1
    done
fi
echo Submitted batch job 7
""",
    "srun": """
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
""",
    "scontrol": "echo localhost",
}


@pytest.mark.slow
def test_slurm_runs_the_same_pipeline(corpus, predictor, tmp_path, monkeypatch):
    """Fails if a pickled pipeline runs only in its own process, since each task of an array loads it from a file."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in SLURM.items():
        (commands / name).write_text("#!/bin/bash" + "\n" + script)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    options = ("--shard_megabytes", "1", "--slurm_partition", "cpu", "--slurm_setup", "export OMP_NUM_THREADS=1")
    process = start(corpus, predictor, *options)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.startswith("3 of 3 shards")
    assert_every_document_once(corpus, predictor, corpus.parent / "patched")


def test_rows_do_not_depend_on_the_number_of_workers(predictor):
    """Fails if patches or the order of rows depend on how documents are spread over processes."""
    rows = {"text": [text_of("row", number) for number in range(24)], "number": list(range(24))}
    plain, patcher = Dataset.from_dict(rows), EntropyPatcher(predictor, return_entropies=True)
    expected = plain.map(patcher, batched=True, keep_in_memory=True).to_list()
    for num_proc in (1, 2):
        mapped = plain.map(patcher, batched=True, batch_size=5, num_proc=num_proc)
        assert_same(mapped.to_list(), expected)
    streamed = plain.to_iterable_dataset(num_shards=3).map(patcher, batched=True, batch_size=5)
    as_lists = ("input_ids", "patch_lengths", "entropies")
    assert_same([{**row, **{name: row[name].tolist() for name in as_lists}} for row in streamed], expected)


def assert_same(rows, expected):
    """Check equality, except for the last digits of entropies, which depend on the shape of the batch."""
    assert [{**row, "entropies": None} for row in rows] == [{**row, "entropies": None} for row in expected]
    for row, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(torch.tensor(row["entropies"]), torch.tensor(other["entropies"]), rtol=0, atol=1e-5)


@pytest.fixture
def patched_files(example, corpus, predictor):
    """Three files of 20 rows each."""
    args = arguments(example, corpus, predictor, shard_megabytes=1)
    run(example, args)
    return sorted(str(path) for path in Path(args.output_folder).glob("*.parquet"))


def stream_of(files) -> IterableDataset:
    return load_dataset("parquet", data_files=files, split="train", streaming=True)


@pytest.mark.parametrize("num_files", [2, 3])
@pytest.mark.parametrize("shuffled", [False, True])
def test_two_nodes_together_see_every_row_once(patched_files, num_files, shuffled):
    """Nodes get whole files if they divide evenly, otherwise every second row. No row is lost or doubled."""
    files = patched_files[:num_files]
    nodes = []
    for rank in range(2):
        stream = stream_of(files)
        # Read one file at a time, because threads that read ahead take five seconds to stop.
        stream = stream.shuffle(seed=0, buffer_size=10, max_buffer_input_shards=1) if shuffled else stream
        nodes.append([row["id"] for row in split_dataset_by_node(stream, rank, world_size=2)])
    every = [row["id"] for row in stream_of(files)]
    assert len(every) == 20 * num_files
    assert sorted(nodes[0] + nodes[1]) == sorted(every)
    assert min(map(len, nodes)) == 10 * num_files
    if not shuffled:
        assert nodes == ([every[:20], every[20:]] if num_files == 2 else [every[0::2], every[1::2]])


def test_the_trainer_splits_a_stream_between_processes(patched_files):
    """Fails if an update of Accelerate lets every process read every row, which the documentation rules out."""
    seen = []
    for rank in range(2):
        loader = DataLoader(stream_of(patched_files).select_columns("id"), batch_size=5)
        loader = prepare_data_loader(loader, num_processes=2, process_index=rank, dispatch_batches=False)
        seen += [name for batch in loader for name in batch["id"]]
    assert sorted(seen) == sorted(row["id"] for row in stream_of(patched_files))
