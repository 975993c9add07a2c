"""Compare the byte-latent model with a byte-level Llama and transformers' Blt in learning, speed and thoughts.

    OMP_NUM_THREADS=1 python benchmarks/coconut.py learning --data DIR --output runs/learning
    OMP_NUM_THREADS=1 python benchmarks/coconut.py thoughts --data DIR --output runs/thoughts
    OMP_NUM_THREADS=1 python benchmarks/coconut.py speed --data DIR
    OMP_NUM_THREADS=1 python benchmarks/coconut.py step --data DIR

DIR holds `text_english/`, `alpaca/` and `eval/coconut/`. A run whose result is in the output folder is not repeated.
Ratios compare values of the same call. They are medians over repetitions in which the models take turns.
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import zstandard
from datasets import Dataset, disable_progress_bars
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BltConfig,
    BltForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from crow_hf import CoconutForCausalLM, CoconutTokenizer, CrowDataCollator
from crow_hf.arena.subjects import arena_reasoner
from crow_hf.arena.table import estimate
from crow_hf.methods.thoughts import ThoughtStage, reachability_rows, train_by_stages


BLT_VOCABULARY = 260
MODELS = ("Llama", "Coconut", "Blt")
METHODS = ("thoughts", "written chain", "no reasoning")


def read(path: Path) -> bytes:
    if path.suffix != ".zst":
        return path.read_bytes()
    with path.open("rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file).read()


def build(name: str, scale: int = 1, layers: int = 4) -> PreTrainedModel:
    """Build a model, of about 0.9 million parameters by default. Two local layers are as large as one other layer."""
    width = 128 * scale
    shape = {"num_attention_heads": 4 * scale, "num_key_value_heads": 4 * scale, "hidden_size": width}
    # All models get the initialization of Blt, which is better for all of them at this size.
    shape |= {"intermediate_size": 3 * width, "max_position_embeddings": 8192, "initializer_range": width**-0.5}
    half = {"hidden_size": width // 2, "intermediate_size": 3 * width // 2, "num_attention_heads": 2 * scale}
    half |= {"num_key_value_heads": 2 * scale}
    if name == "Llama":
        return LlamaForCausalLM(
            LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=264, tie_word_embeddings=True)
        )
    if name == "Coconut":
        return CoconutForCausalLM.from_backbone(
            LlamaConfig(**shape, num_hidden_layers=layers - 1),
            encoder_config=half | {"num_hidden_layers": 1},
            decoder_config=half | {"num_hidden_layers": 2},
        )
    local = half | {"vocab_size": BLT_VOCABULARY, "hidden_size_global": width, "cross_attn_k": 2}
    model = BltForCausalLM(
        BltConfig(
            vocab_size=BLT_VOCABULARY,
            encoder_hash_byte_group_size=[3],
            encoder_hash_byte_group_vocab=200,
            patcher_config=half | {"num_hidden_layers": 1, "vocab_size": BLT_VOCABULARY},
            encoder_config=local | {"num_hidden_layers": 1},
            decoder_config=local | {"num_hidden_layers": 2},
            global_config=shape | {"num_hidden_layers": layers - 1},
        )
    )
    model.config.use_cache = False
    return model


def num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def loss_of(name: str, model: PreTrainedModel, patcher: CoconutForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """Return nats per byte. All byte-latent models use the patches of one predictor, and its cost counts for each."""
    inputs = {"input_ids": input_ids, "labels": input_ids, "use_cache": False}
    if name == "Coconut":
        inputs |= model.model.patch(input_ids)
    elif name == "Blt":
        inputs["patch_lengths"] = patcher.model.patch(input_ids)["patch_lengths"]
    return model(**inputs).loss


def corpus(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return training and held-out rows of 256 bytes from WikiText-2, Shakespeare, C4 and Alpaca."""
    alpaca = json.loads(read(data / "alpaca" / "alpaca_data.json.zst"))
    instructions = [f"{row['instruction']}\n{row['input']}\n{row['output']}\n\n".encode() for row in alpaca]
    english = data / "text_english"
    texts = [read(english / f"{name}.zst") for name in ("wikitext2_valid.txt", "tinyshakespeare.txt", "c4_demo.jsonl")]
    train = b"".join([*texts, *instructions[:6000]])
    held_out = read(english / "wikitext2_test.txt.zst")[:60_000] + b"".join(instructions[-250:])

    def rows(text: bytes) -> torch.Tensor:
        ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + 4
        ids = ids[: len(ids) // 255 * 255].view(-1, 255)
        return torch.cat([torch.ones(len(ids), 1, dtype=torch.long), ids], dim=1)

    return rows(train), rows(held_out)


def learning(options: argparse.Namespace) -> None:
    """Bits per byte on held-out text at equal steps, equal training FLOPs and equal training time."""
    options.output.mkdir(parents=True, exist_ok=True)
    train, held_out = corpus(options.data)
    for seed in options.seeds:
        for name in MODELS:
            file = options.output / f"{name}-{seed}.json"
            if not file.exists():
                curve = learning_curve(name, seed, train, held_out, options.steps[MODELS.index(name)])
                file.write_text(json.dumps(curve))
    curves = {n: [json.loads((options.output / f"{n}-{s}.json").read_text()) for s in options.seeds] for n in MODELS}
    for name in MODELS:
        points = [curve["points"][-1] for curve in curves[name]]
        print(
            f"{name}: {curves[name][0]['parameters']:,} parameters, "
            f"{points[0]['flops'] / points[0]['step'] / 1e9:.1f} GFLOP and "
            f"{median(p['seconds'] / p['step'] for p in points):.3f} s per step of 16 x 256 bytes"
        )
    print("| equal | " + " | ".join(MODELS) + " |\n| --- |" + " ---: |" * len(MODELS))
    for what in ("step", "flops", "seconds"):
        cells = []
        for name in MODELS:
            scores = []
            for number, curve in enumerate(curves[name]):
                limit = min(curves[other][number]["points"][-1][what] for other in MODELS)
                limit = min(limit, curves["Llama"][number]["points"][-1][what])
                scores.append(interpolate(curve["points"], what, limit))
            cells.append(with_interval(scores))
        print(f"| {what} | " + " | ".join(cells) + " |")


def learning_curve(name: str, seed: int, train: torch.Tensor, held_out: torch.Tensor, steps: int) -> dict[str, Any]:
    set_seed(seed)
    model, patcher = build(name), build("Coconut")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50))
    generator = torch.Generator().manual_seed(seed)
    points, seconds = [], 0.0
    with FlopCounterMode(display=False) as counter:
        loss_of(name, model, patcher, train[:16]).backward()
    flops = counter.get_total_flops()
    model.zero_grad()
    for step in range(1, steps + 1):
        batch = train[torch.randint(len(train), (16,), generator=generator)]
        begin = time.perf_counter()
        loss_of(name, model, patcher, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - begin
        if step % 50 == 0:
            with torch.no_grad():
                losses = [loss_of(name, model, patcher, rows).item() for rows in held_out.split(64)]
            bits = mean(losses) / math.log(2)
            points.append({"step": step, "flops": step * flops, "seconds": seconds, "bits": bits})
            print(name, seed, points[-1], flush=True)
    return {"parameters": num_parameters(model), "points": points}


def interpolate(points: list[dict[str, float]], what: str, limit: float) -> float:
    after = next((number for number, point in enumerate(points) if point[what] >= limit * (1 - 1e-9)), len(points) - 1)
    if after == 0 or points[after][what] <= limit:
        return points[after]["bits"]
    low, high = points[after - 1], points[after]
    share = (limit - low[what]) / (high[what] - low[what])
    return low["bits"] + share * (high["bits"] - low["bits"])


def with_interval(values: list[float]) -> str:
    """Format the mean over seeds with its 95 % interval by Student's t."""
    found = estimate(values)
    return f"{found.mean:.3f}" if math.isnan(found.high) else f"{found.mean:.3f} ± {found.high - found.mean:.3f}"


def reasoner() -> CoconutForCausalLM:
    """
    Build a model of 0.17 million parameters, which learns the written chain in about 500 steps. Its patches are the
    symbols of the task.
    """
    return arena_reasoner(num_layers=2, patch_length=3)


def thoughts(options: argparse.Namespace) -> None:
    """Accuracy on reachability with continuous thoughts, and at equal FLOPs with a written chain and without one."""
    disable_progress_bars()
    tokenizer = CoconutTokenizer()
    task = {"num_nodes": options.nodes, "steps": (options.depth,)}
    test, held_out = (reachability_rows(options.test_rows, seed, **task) for seed in (10_000, 20_000))
    asked = {*test["question"], *held_out["question"]}
    found: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        train = reachability_rows(options.rows, seed, **task).filter(lambda row: row["question"] not in asked)
        # The curriculum comes first, because its FLOPs are the budget of the others.
        for method in METHODS:
            file = options.output / f"{method.replace(' ', '-')}-{seed}.json"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                set_seed(seed)
                budget = found["thoughts"][-1]["TFLOP"] if found else 0.0
                file.write_text(json.dumps(teach(method, tokenizer, train, held_out, test, seed, budget, options)))
            found.setdefault(method, []).append(json.loads(file.read_text()))
            print(method, seed, found[method][-1], flush=True)
    print("| method | right answers | training, TFLOP | steps | bytes written |\n| --- | ---: | ---: | ---: | ---: |")
    for method, results in found.items():
        share = with_interval([100 * result["right"] for result in results])
        cells = [f"{mean(result[name] for result in results):.4g}" for name in ("TFLOP", "steps", "bytes")]
        print(f"| {method} | {share} % | " + " | ".join(cells) + " |")


def teach(
    method: str,
    tokenizer: CoconutTokenizer,
    train: Dataset,
    held_out: Dataset,
    test: Dataset,
    seed: int,
    budget: float,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Train by stages, or in stage 0 alone for the same FLOPs. Return the right answers and what they cost."""
    model, folder = reasoner(), options.output / f"{method.replace(' ', '-')}-{seed}"
    args = TrainingArguments(
        str(folder),
        learning_rate=2e-3,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=250,
        warmup_steps=100,
        seed=seed,
        use_cpu=True,
        logging_steps=100,
        eval_strategy="steps",
        eval_steps=100,
        save_strategy="no",
        lr_scheduler_type="constant_with_warmup",
        max_steps=options.stage_steps,
    )
    collate = CrowDataCollator(tokenizer.pad_token_id)
    if method == "thoughts":
        count = options.thoughts_per_step
        last = ThoughtStage(tokenizer, options.depth, count, drop_rest=True)
        labels = {"label_thoughts": options.label_thoughts}
        train_by_stages(model, args, train, held_out, tokenizer, options.depth, count, **labels)
        states = sorted(folder.glob("stage-*/trainer_state.json"))
        steps = [json.loads(file.read_text())["global_step"] for file in states]
        stages = [*(ThoughtStage(tokenizer, number, count) for number in range(options.depth + 1)), last]
        spent = sum(count * flops_of(stage, train, collate) for count, stage in zip(steps, stages, strict=True))
    else:
        last = ThoughtStage(tokenizer, drop_rest=method == "no reasoning")
        cost = flops_of(last, train, collate)
        args.max_steps, args.eval_strategy = round(1e12 * budget / cost), "no"
        Trainer(
            model, args, train_dataset=train.map(last, remove_columns=train.column_names), data_collator=collate
        ).train()
        steps, spent = [args.max_steps], args.max_steps * cost
    right, written = answers(model, tokenizer, test, last)
    return {
        "right": mean(right),
        "bytes": mean(written),
        "TFLOP": spent / 1e12,
        "steps": sum(steps),
        "by stage": steps,
    }


def flops_of(stage: ThoughtStage, train: Dataset, collate: CrowDataCollator) -> int:
    """Return the FLOPs of a training step of 64 rows."""
    model, rows = reasoner(), train.select(range(64))
    with FlopCounterMode(display=False) as counter:
        model(**collate(list(rows.map(stage, remove_columns=rows.column_names)))).loss.backward()
    return counter.get_total_flops()


@torch.no_grad()
def answers(
    model: CoconutForCausalLM, tokenizer: CoconutTokenizer, test: Dataset, stage: ThoughtStage
) -> tuple[list[bool], list[int]]:
    """Return whether each greedy answer is right, and how many bytes were written for it."""
    model.eval()
    right, written = [], []
    for start in range(0, len(test), 100):
        batch = test[start : start + 100]
        prompts = [stage.prompt(question) for question in batch["question"]]
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        config = GenerationConfig(max_new_tokens=80, eos_token_id=2, pad_token_id=263)
        outputs = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
        right += [text.rpartition("### ")[2].strip() == a for text, a in zip(texts, batch["answer"], strict=True)]
        written += [len(text.encode()) for text in texts]
    return right, written


class Forced(LogitsProcessor):
    """Forces the generation of a given text, since the bytes of untrained models give patches of unusual sizes."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1]]] = 0
        return forced


def speed(options: argparse.Namespace) -> None:
    """Bytes per second of `generate()` after 128, 512 and 2,048 bytes, for one row."""
    set_seed(0)
    text = read(options.data / "text_english" / "wikitext2_test.txt.zst")[:4096]
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + 4
    models = {name: build(name, options.scale, options.layers).eval() for name in MODELS}
    patcher = models["Coconut"]
    # Blt's own patcher is random too, so Blt uses the same patches as the others and includes the cost of computing
    # them.
    lengths_of = patcher.model.patch
    for name, model in models.items():
        print(f"{name}: {num_parameters(model):,} parameters")
    print("| context | bytes | " + " | ".join(MODELS) + " | Coconut / Llama | Coconut / Blt |")
    for context in (128, 512, 2048):
        rates = {name: [] for name in MODELS}
        for _ in range(options.repeats):
            for name, model in models.items():
                new = options.blt_bytes if name == "Blt" else options.new_bytes
                rates[name].append(new / generation_seconds(name, model, ids, context, new, lengths_of))
        cells = {name: median(values) for name, values in rates.items()}
        print(
            f"| {context} | {options.new_bytes} | "
            + " | ".join(f"{cells[name]:.1f}" for name in MODELS)
            + f" | {cells['Coconut'] / cells['Llama']:.2f} | {cells['Coconut'] / cells['Blt']:.1f} |",
            flush=True,
        )


@torch.no_grad()
def generation_seconds(
    name: str, model: PreTrainedModel, ids: torch.Tensor, context: int, new: int, patch: Callable
) -> float:
    """Return the seconds to generate `new` bytes after the context, without the time for the context itself."""
    prompt = ids[None, :context]
    if name == "Blt":
        # The `generate()` of Blt calls a patcher with random weights. This loop uses the patches of the others
        # instead.
        begin = time.perf_counter()
        for length in range(context, context + new):
            lengths = patch(ids[None, :length])["patch_lengths"]
            model(ids[None, :length], patch_lengths=lengths, use_cache=False, logits_to_keep=1).logits.argmax(-1)
        return time.perf_counter() - begin
    times = []
    for count in (1, new + 1):
        config = GenerationConfig(max_new_tokens=count, use_cache=True)
        begin = time.perf_counter()
        model.generate(prompt, generation_config=config, logits_processor=LogitsProcessorList([Forced(ids)]))
        times.append(time.perf_counter() - begin)
    return times[1] - times[0]


def step(options: argparse.Namespace) -> None:
    """Seconds and peak memory of a training step. Each model runs in a process of its own."""
    print("| model | s per step of 16 x 256 bytes | times the Llama's | peak MiB above the model |")
    results = {name: [] for name in MODELS}
    for _ in range(options.repeats):
        for name in MODELS:
            command = [sys.executable, __file__, "one-step", "--data", str(options.data), "--model", name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[name].append(json.loads(output.splitlines()[-1]))
    llama = median(result["seconds"] for result in results["Llama"])
    for name in MODELS:
        seconds = median(result["seconds"] for result in results[name])
        peak = median(result["peak"] for result in results[name])
        print(f"| {name} | {seconds:.3f} | {seconds / llama:.2f} | {peak:.0f} |")


def one_step(options: argparse.Namespace) -> None:
    """Measure the training step of one model in this process, and print the result as JSON."""
    set_seed(0)
    model, patcher = build(options.model), build("Coconut")
    rows, _ = corpus(options.data)
    loss_of(options.model, model, patcher, rows[:1]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for batch in batches(rows, 6):
        begin = time.perf_counter()
        loss_of(options.model, model, patcher, batch).backward()
        model.zero_grad()
        times.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": median(times), "peak": (peak - before) / 1024}))


def batches(rows: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    rng = random.Random(0)
    for _ in range(count):
        yield rows[torch.tensor(rng.sample(range(len(rows)), 16))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (learning, thoughts, speed, step, one_step):
        command = commands.add_parser(function.__name__.replace("_", "-"), help=function.__doc__)
        command.set_defaults(run=function)
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--output", type=Path, default=Path("runs", function.__name__))
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        command.add_argument("--repeats", type=int, default=3)
        command.add_argument("--model", choices=MODELS, default="Coconut")
        command.add_argument("--scale", type=int, default=4, help="width of the models in units of 128")
        command.add_argument(
            "--layers", type=int, default=12, help="layers of the Llama; the others have one less, plus local layers"
        )
        command.add_argument(
            "--steps", type=int, nargs=3, default=[400, 700, 500], help=f"training steps of {', '.join(MODELS)}"
        )
        command.add_argument("--new_bytes", type=int, default=128)
        command.add_argument("--blt_bytes", type=int, default=8)
        command.add_argument("--nodes", type=int, default=6)
        command.add_argument("--depth", type=int, default=2, help="number of steps per chain")
        command.add_argument("--rows", type=int, default=40_000)
        command.add_argument("--thoughts_per_step", type=int, default=2)
        command.add_argument("--label_thoughts", action=argparse.BooleanOptionalAction, default=True)
        command.add_argument("--test_rows", type=int, default=500)
        command.add_argument("--stage_steps", type=int, default=3000, help="maximum number of steps of a stage")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
