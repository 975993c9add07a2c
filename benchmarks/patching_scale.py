"""Does memory stay constant when patching more than fits into it, and how much time and disk does a corpus need?

    OMP_NUM_THREADS=1 python benchmarks/patching_scale.py memory --predictor tiny --megabytes 1024
    OMP_NUM_THREADS=1 python benchmarks/patching_scale.py memory --predictor shipped --megabytes 32
    OMP_NUM_THREADS=1 python benchmarks/patching_scale.py memory --predictor none --megabytes 1024
    OMP_NUM_THREADS=1 python benchmarks/patching_scale.py corpus --data DIR 2>log

`memory` streams generated documents through `IterableDataset.map` and prints the peak whenever the bytes have doubled.
`corpus` runs `examples/patch_at_scale.py` on the first documents of each source of RedPajama-1T, in one worker, and
prints the time and the disk space. DIR holds `1t_sample/SOURCE/*.jsonl`, plain or as .zst. Times are processor times,
which other programs do not affect.
"""

import argparse
import json
import math
import random
import resource
import runpy
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from datasets import IterableDataset

from crow_hf import ByteEntropyPredictor, EntropyPatcher
from crow_hf.patching.shards import RedPajamaReader


MEGABYTE = 10**6
BATCH_SIZE = 100


def patcher_of(name: str) -> EntropyPatcher:
    """Return a patcher with the shipped predictor, with a tiny untrained one (its speed differs), or with none."""
    if name == "none":
        return EntropyPatcher(rule="whitespace")
    if name == "shipped":
        return EntropyPatcher()
    torch.manual_seed(0)
    predictor = ByteEntropyPredictor(
        hidden_size=8, num_layers=1, num_heads=1, ff_dim=8, sliding_window=16, max_position_embeddings=128
    )
    return EntropyPatcher(predictor, threshold=7.99, relative_threshold=0.05, unit="bits")


def generated_documents(num_bytes: int, seed: int) -> Iterator[dict[str, bytes]]:
    """Generate documents of made-up words. Lengths of 100 to 100,000 bytes are uniform on a logarithmic scale."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmf", k=rng.randint(1, 9))) for _ in range(5000)]
    text = "\n".join(" ".join(rng.choices(words, k=12)) for _ in range(20_000)).encode()
    while num_bytes > 0:
        length = min(num_bytes, int(math.exp(rng.uniform(math.log(100), math.log(100_000)))))
        begin = rng.randrange(len(text) - length)
        yield {"bytes": text[begin : begin + length]}
        num_bytes -= length


def peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(predictor: str, megabytes: int, seed: int) -> None:
    """Print the peak memory of one stream at growing sizes."""
    stream = IterableDataset.from_generator(
        generated_documents, gen_kwargs={"num_bytes": megabytes * MEGABYTE, "seed": seed}
    )
    patched = stream.map(patcher_of(predictor), batched=True, batch_size=BATCH_SIZE, remove_columns="bytes")
    print(f"| streamed, predictor: {predictor} | documents | peak memory | bytes per core-second |")
    print("|---:|---:|---:|---:|")
    print(f"| 0 MB | 0 | {peak_mebibytes():.0f} MiB | |", flush=True)
    begin, seen, reported = time.process_time(), 0, MEGABYTE
    for number, row in enumerate(patched, 1):
        seen += len(row["input_ids"]) - 2
        if seen >= reported:
            rate = seen / (time.process_time() - begin)
            print(
                f"| {seen // MEGABYTE:,} MB | {number:,} | {peak_mebibytes():.0f} MiB | {rate:,.0f} |",
                flush=True,
            )
            reported = min(2 * reported, megabytes * MEGABYTE) if reported < megabytes * MEGABYTE else math.inf
    assert seen == megabytes * MEGABYTE, f"{megabytes * MEGABYTE - seen} bytes are missing"


def corpus(data: Path, bytes_per_source: int) -> None:
    """Print bytes per core-second and bytes on disk of the whole pipeline, for each source."""
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "patch_at_scale.py"))
    print(
        "| source | bytes | read, bytes per core-second | patched, bytes per core-second | bytes per patch | stored |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    totals = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(path for path in (data / "1t_sample").iterdir() if path.is_dir()):
            shard = Path(folder) / source.name / "shard.jsonl"
            write_first_documents(sorted(map(str, source.glob("*.jsonl*"))), bytes_per_source, shard)
            counts = Counter(read=core_seconds(lambda shard=shard: deque(RedPajamaReader([shard]), maxlen=0)))
            output = shard.parent / "patched"
            executor = example["executor_of"](example["Arguments"](str(shard.parent), str(output)))
            counts["patched"] = core_seconds(executor.run)
            counts += example["progress"](executor)[1]
            counts["stored"] = sum(file.stat().st_size for file in output.glob("*.parquet"))
            print_costs(source.name, counts)
            totals += counts
    print_costs("all", totals)
    print(f"Peak memory: {peak_mebibytes():.0f} MiB.")


def write_first_documents(files: list[str], num_bytes: int, path: Path) -> None:
    path.parent.mkdir()
    with path.open("w", encoding="utf-8") as file:
        for row in RedPajamaReader(files):
            file.write(json.dumps({"text": row["text"][:num_bytes]}) + "\n")
            num_bytes -= len(row["text"].encode())
            if num_bytes <= 0:
                return


def core_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def print_costs(name: str, counts: Counter) -> None:
    size = counts["bytes"]
    print(
        f"| {name} | {size:,} | {size / counts['read']:,.0f} | {size / counts['patched']:,.0f} | "
        f"{size / (counts['patches'] - 2 * counts['documents']):.2f} | {counts['stored'] / size:.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["memory", "corpus"])
    parser.add_argument("--predictor", choices=["none", "tiny", "shipped"], default="shipped")
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bytes_per_source", type=int, default=500_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.stage == "memory":
        memory(arguments.predictor, arguments.megabytes, arguments.seed)
    else:
        corpus(arguments.data, arguments.bytes_per_source)


if __name__ == "__main__":
    main()
