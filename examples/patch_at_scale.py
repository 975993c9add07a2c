"""Patch a corpus that does not fit one machine, shard by shard, in the engine datatrove (`pip install ".[scale]"`).

    python examples/patch_at_scale.py --input_folder redpajama --output_folder patched --workers 8
    python examples/patch_at_scale.py --input_folder redpajama --output_folder patched --workers 500 \\
        --slurm_partition cpu --slurm_setup "source .venv/bin/activate"

The corpus: files of JSON lines, plain or as .gz or .zst, with `text` or `raw_content`. A shard is a share of the documents of one
file, and becomes one Parquet file with the columns `id` (file and number of the document), `input_ids` and `patch_lengths`. The
same command again does what is left and prints where the job stands; nothing is done or counted twice, whenever and however
the run before was stopped.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import uuid4

import dill
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.fingerprint import Hasher
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.io import DataFolder, get_datafolder
from datatrove.pipeline.base import PipelineStep
from transformers import HfArgumentParser

from crow_hf import EntropyPatcher
from crow_hf.patching.shards import RedPajamaReader


SCHEMA = pa.schema({"id": pa.string(), "input_ids": pa.list_(pa.int16()), "patch_lengths": pa.list_(pa.int32())})
BATCH_CHARACTERS = 2**20
UNFINISHED = "unfinished"


@dataclass
class Arguments:
    input_folder: str = field(metadata={"help": "Folder with the corpus: a path, or a URL of any fsspec file system."})
    output_folder: str = field(
        metadata={"help": "Folder for the patched shards; a shared one if several machines work."}
    )
    pattern: str = field(default="**/*.json*", metadata={"help": "Which files of the input folder."})
    shard_megabytes: float = field(default=500, metadata={"help": "Larger files are shared among several shards."})
    workers: int = field(default=1, metadata={"help": "Shards at a time, each on one core."})
    predictor: str | None = field(default=None, metadata={"help": "Entropy predictor; the shipped one by default."})
    slurm_partition: str | None = field(
        default=None, metadata={"help": "Submit to this Slurm partition, not run here."}
    )
    slurm_time: str = field(default="24:00:00", metadata={"help": "Time limit of a shard."})
    slurm_gigabytes: int = field(default=4, metadata={"help": "Memory of a shard."})
    slurm_setup: str | None = field(default=None, metadata={"help": "Shell command that activates the environment."})


class Shard(NamedTuple):
    """Every document of `file` whose number leaves the remainder `part` when divided by `parts`."""

    file: str
    part: int
    parts: int


class ReadShard(PipelineStep):
    """Documents of one shard. All shards of a file read the whole of it, which costs little beside patching."""

    type, name = "READER", "shard of JSON lines"

    def __init__(self, folder: DataFolder, shards: list[Shard]) -> None:
        super().__init__()
        self.folder, self.shards = folder, shards

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        file, part, parts = self.shards[rank]
        reader = RedPajamaReader([self.folder.resolve_paths(file)])
        for number, row in enumerate(reader):
            if number % parts == part:
                yield Document(row["text"], f"{file}:{number}")
        # All shards of a file see the same faults, and one of them tells.
        for kind in reader.counts.keys() - {"kept"} if part == 0 else ():
            self.stat_update(kind, value=reader.counts[kind])


class Patch(PipelineStep):
    """Adds the columns of the patcher to the documents' metadata."""

    type, name = "PATCHER", "entropy patches"

    def __init__(self, patcher: EntropyPatcher) -> None:
        super().__init__()
        self.patcher = patcher

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        # The engine counts cores by shards.
        torch.set_num_threads(1)
        for batch in by_size(data):
            columns = self.patcher({"text": [document.text for document in batch]})
            for number, document in enumerate(batch):
                document.metadata = {name: values[number] for name, values in columns.items()}
                self.stat_update("documents")
                self.stat_update("bytes", value=len(document.text.encode()))
                self.stat_update("patches", value=len(document.metadata["patch_lengths"]))
                yield document


class WriteShard(PipelineStep):
    """
    One Parquet file for each shard, which is there when it is whole.

    A shard can have two writers: workers outlive a launcher that was killed, and a scheduler may start a node's work anew
    elsewhere. So each attempt writes a file of its own and moves it into place at the end; both have the same rows.
    """

    type, name = "WRITER", "shard of Parquet"

    def __init__(self, folder: DataFolder) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        attempt = f"{UNFINISHED}/{rank:05d}-{uuid4().hex}.parquet"
        with self.folder.open(attempt, "wb") as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for batch in by_size(data):
                rows = [{"id": document.id, **document.metadata} for document in batch]
                writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                yield from batch
        self.folder.mv(attempt, shard_name(rank))


def shard_name(rank: int) -> str:
    return f"{rank:05d}.parquet"


def by_size(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Batches of about a million characters, so that memory does not depend on how long the documents are."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def executor_of(args: Arguments) -> PipelineExecutor:
    """
    The whole job.

    Raises:
        `ValueError`: If there is nothing to patch, or the output folder is that of another job.
    """
    if args.shard_megabytes <= 0 or args.workers < 1:
        raise ValueError("`shard_megabytes` must be above 0, and `workers` at least 1.")
    corpus, output = get_datafolder(args.input_folder), get_datafolder(args.output_folder)
    # What was written before is no corpus, also where it lies beside one.
    written = output.resolve_paths("job.json").removesuffix("job.json")
    files = [
        file
        for file in corpus.list_files(glob_pattern=args.pattern)
        if not corpus.resolve_paths(file).startswith(written)
    ]
    if not files:
        raise ValueError(f"No file in {args.input_folder} matches {args.pattern}: pass another `pattern`.")
    sizes = {file: corpus.size(file) for file in files}
    shards = []
    for file, size in sizes.items():
        parts = max(1, math.ceil(size / args.shard_megabytes / 10**6))
        shards += [Shard(file, part, parts) for part in range(parts)]
    patcher = EntropyPatcher(args.predictor, column="text")
    claim(output, {"sizes": sizes, "shard_megabytes": args.shard_megabytes, "patcher": Hasher.hash(patcher)})

    pipeline = [ReadShard(corpus, shards), Patch(patcher), WriteShard(output)]
    logs = output.resolve_paths("logs")
    if args.slurm_partition is None:
        return LocalPipelineExecutor(pipeline, len(shards), args.workers, logs)
    # The steps of a script travel by value, and have to take along what they name.
    dill.settings["recurse"] = True
    return SlurmPipelineExecutor(
        pipeline,
        len(shards),
        args.slurm_time,
        args.slurm_partition,
        mem_per_cpu_gb=args.slurm_gigabytes,
        workers=args.workers,
        job_name="patch",
        env_command=args.slurm_setup,
        logging_dir=logs,
    )


def claim(output: DataFolder, job: dict) -> None:
    """Shards are known by their numbers: with other files or settings, the same number would be something else."""
    if output.exists("job.json"):
        if json.loads(output.read_text("job.json")) != job:
            raise ValueError(
                f"{output.path} holds shards of other files, another size or another patcher: choose another `output_folder`."
            )
    else:
        with output.open("job.json", "w") as file:
            json.dump(job, file, indent=1)


def progress(executor: PipelineExecutor) -> tuple[int, Counter[str]]:
    """How many shards are complete, and what is in them. The engine's own totals leave out what earlier runs have done."""
    total = Counter()
    complete = sorted(set(range(executor.world_size)) - set(executor.get_incomplete_ranks(skip_completed=True)))
    for rank in complete:
        for step in json.loads(executor.logging_dir.read_text(f"stats/{rank:05d}.json")):
            for name, value in step["stats"].items():
                total[name] += value["total"] if isinstance(value, dict) else value
    return len(complete), total


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    executor = executor_of(args)
    executor.run()
    num_complete, total = progress(executor)
    print(f"{num_complete} of {executor.world_size} shards are in {args.output_folder}: {dict(total)}")
    output = get_datafolder(args.output_folder)
    if num_complete == executor.world_size and output.exists(UNFINISHED):
        output.rm(UNFINISHED, recursive=True)


if __name__ == "__main__":
    main()
