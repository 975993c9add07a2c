"""How fast is entropy patching, how does it cut real data, and does it lose a byte?

    OMP_NUM_THREADS=1 python benchmarks/patching.py speed --data DIR
    OMP_NUM_THREADS=1 python benchmarks/patching.py corpora --data DIR --output runs/patching   # + a picture
    OMP_NUM_THREADS=1 python benchmarks/patching.py lossless --documents 100000
    OMP_NUM_THREADS=1 python benchmarks/patching.py memory

DIR holds `redpajama/`, `text_english/`, `text_multiscript/` and `binary/`, as their manifests describe. Ratios compare
values of the same call. They are medians over repetitions in which the contestants take turns.
"""

import argparse
import base64
import json
import math
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
import zstandard
from datasets import Dataset, Features, IterableDataset, Value, disable_progress_bars
from matplotlib.figure import Figure
from transformers.models.blt.configuration_blt import BltPatcherConfig
from transformers.models.blt.modeling_blt import BltPatcher

from crow_hf import (
    ByteEntropyConfig,
    ByteEntropyPredictor,
    EntropyPatcher,
    calibrate_threshold,
    from_binary,
    load_entropy_predictor,
)
from crow_hf.models.boundaries import patch_starts
from crow_hf.patching.shards import RedPajamaReader


TARGET = 4.5
REDPAJAMA = (
    "c4-rp/sample_c4-rp1",
    "github/sample_github1",
    "stackexchange/sample_stackexchange1",
    "arxiv/sample_arxiv1",
)
SENTENCE = b"The committee met in Reykjavik; nobody had expected that the committee would vote twice."


def read(path: Path) -> bytes:
    if path.suffix != ".zst":
        return path.read_bytes()
    with path.open("rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file).read()


def json_lines(path: Path) -> Iterator[dict]:
    return map(json.loads, read(path).splitlines())


def redpajama_documents(data: Path, bytes_per_source: int) -> list[bytes]:
    documents = []
    for name in REDPAJAMA:
        left = bytes_per_source
        for row in RedPajamaReader([data / f"redpajama/1t_sample/{name}.jsonl.zst"]):
            documents.append(row["text"].encode()[:left])
            left -= len(documents[-1])
            if left <= 0:
                break
    return documents


def speed(data: Path, bytes_per_source: int, repetitions: int) -> None:
    """Compare the whole `map` with the bare forward pass, with transformers' patcher, and with one call per byte."""
    disable_progress_bars()
    predictor = load_entropy_predictor()
    documents = redpajama_documents(data, bytes_per_source)
    num_bytes = sum(map(len, documents))
    contestants = _contestants(predictor, documents)
    times = defaultdict(list)
    with torch.inference_mode():
        for _ in range(repetitions):
            for name, contestant in contestants.items():
                begin = time.perf_counter()
                contestant()
                times[name].append(time.perf_counter() - begin)
    rates = {name: num_bytes / median(seconds) for name, seconds in times.items()}
    bare = max(rate for name, rate in rates.items() if name.startswith("bare forward, rows"))
    print(f"{len(documents)} documents, {num_bytes:,} bytes, {torch.get_num_threads()} thread(s)\n")
    print("| | kB/s | speed of the map relative to it |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate / 1e3:.1f} | {rates['map'] / rate:.2f} |")
    print(f"\nmap / bare forward of the same lines: {rates['map'] / rates['bare forward, the same lines']:.3f}")
    print(f"map / best bare forward of rows that cut lines (different results): {rates['map'] / bare:.3f}")
    _boundary_share(predictor, documents, repetitions)
    _one_call_per_byte(predictor, b"".join(documents)[:4096], repetitions)


def _contestants(predictor: ByteEntropyPredictor, documents: list[bytes]) -> dict[str, Callable[[], None]]:
    """Return all ways to score the documents, by name."""
    flat = np.frombuffer(b"".join(documents), np.uint8).copy()
    dataset = Dataset.from_dict({"bytes": documents}, features=Features({"bytes": Value("large_binary")}))
    blt, line_batches = _blt_of_the_same_size(predictor.config), _line_batches(documents, predictor.config)

    def rows_of(length: int) -> torch.Tensor:
        return torch.from_numpy(flat[: len(flat) // length * length]).long().view(-1, length)

    def whole_map() -> None:
        dataset.map(EntropyPatcher(predictor), batched=True, load_from_cache_file=False)

    def bare_forward(length: int) -> Callable[[], None]:
        def run() -> None:
            for batch in rows_of(length).split(2**12 // length):
                predictor(batch, reset_on_newline=False, use_cache=False)

        return run

    def blt_patcher(length: int, batch_size: int) -> Callable[[], None]:
        def run() -> None:
            for batch in (rows_of(length) + 4).split(batch_size):
                blt(batch, patch_size=4, threshold=1.335, use_cache=False)

        return run

    def bare_forward_of_lines() -> None:
        for batch in line_batches:
            predictor(batch, reset_on_newline=False, use_cache=False)

    contestants = {"map": whole_map, "bare forward, the same lines": bare_forward_of_lines}
    contestants |= {f"bare forward, rows of {length}": bare_forward(length) for length in (64, 128, 256, 512)}
    return contestants | {
        f"BltPatcher, {batch} x {length}": blt_patcher(length, batch)
        for length, batch in ((256, 64), (4096, 4), (8192, 2))
    }


def _blt_of_the_same_size(config: ByteEntropyConfig) -> BltPatcher:
    return BltPatcher(
        BltPatcherConfig(
            vocab_size=260,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=8192,
        )
    ).eval()


def _line_batches(documents: list[bytes], config: ByteEntropyConfig) -> list[torch.Tensor]:
    """Return padded batches of lines, sorted by length."""
    lines = sorted((line for document in documents for line in _lines(document, config)), key=len, reverse=True)
    batches = []
    while lines:
        size = max(1, 2**12 // len(lines[0]))
        rows = [torch.frombuffer(bytearray(line), dtype=torch.uint8).long() for line in lines[:size]]
        batches.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        lines = lines[size:]
    return batches


def _lines(document: bytes, config: ByteEntropyConfig) -> Iterator[bytes]:
    """Yield lines with their newline in front. Long lines become windows that overlap by the predictor's reach."""
    length, step = config.max_position_embeddings, config.max_position_embeddings - config.receptive_field + 1
    for number, line in enumerate(document.split(b"\n")):
        line = b"\n" * (number > 0) + line
        for begin in range(0, max(len(line) - config.receptive_field + 1, 1), step):
            if piece := line[begin : begin + length]:
                yield piece


def _boundary_share(predictor: ByteEntropyPredictor, documents: list[bytes], repetitions: int) -> None:
    patcher = EntropyPatcher(predictor, add_special_tokens=True)
    shares = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        patched = patcher.patch(documents)
        whole = time.perf_counter() - begin
        ids = torch.from_numpy(np.concatenate([document.input_ids for document in patched]))[None]
        entropies = torch.from_numpy(np.concatenate([document.entropies for document in patched]))[None]
        begin = time.perf_counter()
        starts = patch_starts(ids, entropies, patcher.rule)[0].numpy()
        np.diff(np.flatnonzero(np.append(starts, True)))
        np.cumsum(starts)
        shares.append((time.perf_counter() - begin) / whole)
    print(f"boundaries, lengths and patch ids: {median(shares):.2%} of the time")


def _one_call_per_byte(predictor: ByteEntropyPredictor, document: bytes, repetitions: int) -> None:
    ids = torch.tensor([list(document)])
    begin = time.perf_counter()
    with torch.inference_mode():
        for end in range(1, len(document) + 1):
            predictor.entropies(ids[:, :end])[0, -1].item()
    slow = time.perf_counter() - begin
    patcher, seconds = EntropyPatcher(predictor), []
    for _ in range(10 * repetitions):
        begin = time.perf_counter()
        patcher.patch([document])
        seconds.append(time.perf_counter() - begin)
    print(
        f"one call per byte, {len(document)} bytes: {slow:.1f} s; patcher {median(seconds):.4f} s: "
        f"{slow / median(seconds):.0f} times as fast"
    )


def corpora(data: Path, output: Path) -> None:
    """Write mean patch sizes, bits per byte and calibrations on real data as JSON lines, and a picture."""
    output.mkdir(parents=True, exist_ok=True)
    predictor = load_entropy_predictor()
    table = output / "corpora.jsonl"
    done = {json.loads(line)["name"] for line in table.read_text().splitlines()} if table.exists() else set()
    for kind, name, documents in _collections(data):
        if name in done:
            continue
        entry = {"kind": kind, "name": name, **_measure(predictor, documents)}
        with table.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)
    plot_sentence(predictor, output / "sentence.png")


def _collections(data: Path) -> Iterator[tuple[str, str, list[bytes]]]:
    for name in ("wikitext2_valid.txt.zst", "tinyshakespeare.txt.zst", "gutenberg_alice29.txt", "state_union.txt.zst"):
        yield "English", name, [read(data / "text_english" / name)[:300_000]]
    yield (
        "English",
        "c4_demo.jsonl.zst",
        [row["text"].encode() for row in json_lines(data / "text_english/c4_demo.jsonl.zst")][:120],
    )
    for name in ("github/sample_github1", "stackexchange/sample_stackexchange1", "arxiv/sample_arxiv1"):
        documents = [row["text"].encode() for row in RedPajamaReader([data / f"redpajama/1t_sample/{name}.jsonl.zst"])]
        yield "code and markup", name, [documents[0][:100_000], *(document[:20_000] for document in documents[1:15])]
    languages = defaultdict(list)
    for row in json_lines(data / "text_multiscript/tatoeba_v1_112.jsonl.zst"):
        languages[row["lang"]].append(row["text"].encode())
    for language, sentences in sorted(languages.items()):
        yield "Tatoeba", language, sentences[:300]
    encodings = defaultdict(list)
    for row in json_lines(data / "text_multiscript/udhr_legacy_encodings.jsonl.zst"):
        if not row["utf8_valid"]:
            encodings[row["file"].rsplit("-", 1)[-1]].append(base64.b64decode(row["bytes_b64"]))
    for encoding, documents in sorted(encodings.items()):
        yield "UDHR, legacy code page", encoding, [document[:10_000] for document in documents[:5]]
    for file in sorted((data / "binary").iterdir()):
        if file.suffix != ".md":
            yield "binary", file.name, [read(file)[:60_000]]


def _measure(predictor: ByteEntropyPredictor, documents: list[bytes]) -> dict[str, float]:
    patched = EntropyPatcher(predictor).patch(documents)
    num_bytes = sum(map(len, documents))
    num_patches = sum(len(document.patch_lengths) - 2 for document in patched)
    found = calibrate_threshold(documents, predictor, TARGET, max_bytes=num_bytes)
    return {
        "bytes": num_bytes,
        "bits_per_byte": bits_per_byte(predictor, documents),
        "mean_entropy": float(sum(document.entropies.sum() for document in patched)) / num_bytes,
        "patch_size": num_bytes / num_patches,
        "calibrated_threshold": found.threshold,
        "calibrated_patch_size": found.patch_size,
    }


def bits_per_byte(predictor: ByteEntropyPredictor, documents: list[bytes]) -> float:
    """Return the negative log-likelihood per byte. The first byte of a document is not predicted and counts 8 bits."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for document in documents:
            # Rows overlap by one byte, so that each row predicts the first byte of the next row.
            for begin in range(0, len(document), 8192):
                ids = torch.from_numpy(np.frombuffer(document[begin : begin + 8193], np.uint8).copy()).long()
                count += min(8192, len(ids))
                total += 8 if begin == 0 else 0
                if len(ids) < 2:
                    continue
                rows = [ids[start : start + 513] for start in range(0, len(ids) - 1, 512)]
                batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
                labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
                logits = predictor(batch).logits[:, :-1]
                total += torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
                ).item() / math.log(2)
    return total / count


def plot_sentence(predictor: ByteEntropyPredictor, path: Path) -> None:
    """Plot entropies and patches of a sentence with the guide's thresholds, the predictor's own, and a global one."""
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    calibrated = calibrate_threshold([SENTENCE], predictor, TARGET, rule="global").threshold
    patchers = {
        "the guide's thresholds": EntropyPatcher(predictor, 0.8, 0.1),
        "the predictor's own thresholds": EntropyPatcher(predictor),
        f"a global threshold for {TARGET} bytes per patch": EntropyPatcher(predictor, calibrated, rule="global"),
    }
    axes = figure.subplots(len(patchers), 1, sharex=True)
    for axis, (title, patcher) in zip(axes, patchers.items(), strict=True):
        document = patcher.patch([SENTENCE])[0]
        lengths, entropies = document.patch_lengths[1:-1], document.entropies[1:-1]
        axis.plot(range(1, len(SENTENCE)), entropies[:-1], ".-", color="C0", linewidth=1)
        for start in np.cumsum(lengths) - lengths:
            axis.axvline(start - 0.5, color="0.6", linewidth=0.8)
        threshold, relative_threshold = patcher.rule.bits
        rise = "" if patcher.rule.rule == "global" else f" or a rise of {relative_threshold:.2f} bits"
        axis.set(
            title=f"{title}: above {threshold:.2f} bits{rise}, {len(SENTENCE) / len(lengths):.2f} bytes per patch",
            ylabel="bits",
            ylim=(0, None),
            xlim=(-0.6, len(SENTENCE) - 0.4),
        )
    axes[-1].set_xticks(range(len(SENTENCE)), [chr(byte).replace(" ", "␣") for byte in SENTENCE], family="monospace")
    figure.savefig(path, dpi=110)


def lossless(num_documents: int, seed: int) -> None:
    """Send random byte strings through the transform and back. A one-layer predictor suffices for this test."""
    torch.manual_seed(seed)
    predictor = ByteEntropyPredictor(
        hidden_size=16, num_layers=1, num_heads=1, ff_dim=16, sliding_window=16, max_position_embeddings=128
    )
    patcher = EntropyPatcher(predictor, threshold=7.995, relative_threshold=0.05, return_binary_patches=True)
    rng = np.random.default_rng(seed)
    lost = altered = total = 0
    seen = np.zeros(256, bool)
    for begin in range(0, num_documents, 1000):
        # Lengths are uniform on a logarithmic scale.
        lengths = np.exp(rng.uniform(0, math.log(10_002), min(1000, num_documents - begin))).astype(int) - 1
        lengths[:3] = 0, 1, 10_000
        documents = [rng.bytes(length) for length in lengths]
        dataset = Dataset.from_dict({"bytes": documents}, features=Features({"bytes": Value("large_binary")}))
        patched = dataset.map(patcher, batched=True, batch_size=250, keep_in_memory=True).with_format("numpy")
        lost += len(documents) - len(patched)
        for document, ids, lengths_of_row, binary in zip(
            documents, patched["input_ids"], patched["patch_lengths"], patched["binary_patches"], strict=True
        ):
            same = (ids[1:-1] - 4).astype(np.uint8).tobytes() == document and lengths_of_row.sum() == len(ids)
            altered += not (same and b"".join(from_binary(binary)) == document)
            total += len(document)
            seen[np.frombuffer(document, np.uint8)] = True
        print(f"{begin + len(documents)} documents, {total:,} bytes, {lost} lost, {altered} altered", flush=True)
    print(f"byte values seen: {seen.sum()}")


def memory() -> None:
    """Print the peak memory of streaming documents of several lengths, each in a process of its own."""
    print("| document | peak above that of a 10 kB document |\n|---|---:|")
    smallest = None
    for size in (10_000, 100_000, 1_000_000):
        script = f"import runpy; runpy.run_path({__file__!r})['_stream'](int({size}))"
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        peak = float(process.stdout)
        smallest = smallest or peak
        print(f"| {size:,} bytes | {peak - smallest:.0f} MiB |", flush=True)


def _stream(size: int) -> None:
    stream = IterableDataset.from_generator(lambda: iter([{"bytes": np.random.default_rng(0).bytes(size)}]))
    for row in stream.map(EntropyPatcher(), batched=True, batch_size=1, remove_columns="bytes"):
        assert len(row["input_ids"]) == size + 2
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["speed", "corpora", "lossless", "memory"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/patching"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--bytes_per_source", type=int, default=250_000)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.stage == "speed":
        speed(arguments.data, arguments.bytes_per_source, arguments.repetitions)
    elif arguments.stage == "corpora":
        corpora(arguments.data, arguments.output)
    elif arguments.stage == "lossless":
        lossless(arguments.documents, arguments.seed)
    else:
        memory()


if __name__ == "__main__":
    main()
