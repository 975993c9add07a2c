"""Patch a corpus that does not fit on one machine, shard by shard, with datatrove (`pip install ".[scale]"`).

    python examples/patch_at_scale.py --input_folder redpajama --output_folder patched --workers 8
    python examples/patch_at_scale.py --input_folder redpajama --output_folder patched --workers 500 \\
        --slurm_partition cpu --slurm_setup "source .venv/bin/activate"

The corpus consists of JSON-lines files, plain or as .gz or .zst, with the field `text` or `raw_content`. A shard is a
part of the documents of one file. It becomes one Parquet file with the columns `id` (file and number of the document),
`input_ids` and `patch_lengths`.

Run the same command again to finish a stopped job. It processes the remaining shards and prints the progress. No shard
is processed or counted twice, whenever and however the previous run was stopped.
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
    input_folder: str = field(metadata={"help": "Folder of the corpus: a path, or a URL of any fsspec file system."})
    output_folder: str = field(metadata={"help": "Folder for the patched shards. Several machines need a shared one."})
    pattern: str = field(default="**/*.json*", metadata={"help": "Pattern of the files in the input folder."})
    shard_megabytes: float = field(default=500, metadata={"help": "Larger files are split into several shards."})
    workers: int = field(default=1, metadata={"help": "Number of shards to process at a time, each on one core."})
    predictor: str | None = field(default=None, metadata={"help": "Entropy predictor. Defaults to the shipped one."})
    slurm_partition: str | None = field(
        default=None, metadata={"help": "Submit to this Slurm partition instead of running here."}
    )
    slurm_time: str = field(default="24:00:00", metadata={"help": "Time limit per shard."})
    slurm_gigabytes: int = field(default=4, metadata={"help": "Memory per shard, in gigabytes."})
    slurm_setup: str | None = field(default=None, metadata={"help": "Shell command that activates the environment."})


class Shard(NamedTuple):
    """All documents of `file` whose number modulo `parts` is `part`."""

    file: str
    part: int
    parts: int


class ReadShard(PipelineStep):
    """Reads the documents of one shard. Each shard reads its whole file, which costs little compared to patching."""

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
        # All shards of a file skip the same rows, so only the first one reports them.
        for kind in reader.counts.keys() - {"kept"} if part == 0 else ():
            self.stat_update(kind, value=reader.counts[kind])


class Patch(PipelineStep):
    """Adds the columns of the patcher to the metadata of each document."""

    type, name = "PATCHER", "entropy patches"

    def __init__(self, patcher: EntropyPatcher) -> None:
        super().__init__()
        self.patcher = patcher

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        # datatrove uses one core per shard.
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
    Writes one Parquet file per shard. The file appears when it is complete.

    A shard can have two writers, because workers outlive a killed launcher, and a scheduler may restart the work of a
    node elsewhere. So each attempt writes a file of its own and moves it into place at the end. Both files have the
    same rows.
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
    """Yield batches of about a million characters, so that memory does not depend on the length of documents."""
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
    Build the executor of the whole job.

    Raises:
        `ValueError`: If there is nothing to patch, or if the output folder belongs to another job.
    """
    if args.shard_megabytes <= 0 or args.workers < 1:
        raise ValueError("`shard_megabytes` must be above 0 and `workers` at least 1.")
    corpus, output = get_datafolder(args.input_folder), get_datafolder(args.output_folder)
    # The output folder may lie inside the input folder. Its files do not belong to the corpus.
    written = output.resolve_paths("job.json").removesuffix("job.json")
    files = [
        file
        for file in corpus.list_files(glob_pattern=args.pattern)
        if not corpus.resolve_paths(file).startswith(written)
    ]
    if not files:
        raise ValueError(f"No file in {args.input_folder} matches {args.pattern}. Pass another `pattern`.")
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
    # Steps defined in a script are pickled by value, together with everything they refer to.
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
    """Record the job in the output folder, or check that it is the same, because shard numbers belong to one job."""
    if output.exists("job.json"):
        if json.loads(output.read_text("job.json")) != job:
            raise ValueError(
                f"{output.path} holds shards of other files, of another size or of another patcher. Choose another "
                "`output_folder`."
            )
    else:
        with output.open("job.json", "w") as file:
            json.dump(job, file, indent=1)


def progress(executor: PipelineExecutor) -> tuple[int, Counter[str]]:
    """Count the complete shards and their content. The totals of datatrove leave out earlier runs."""
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
