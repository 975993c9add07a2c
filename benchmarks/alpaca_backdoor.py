"""Does CROW remove BackdoorLLM's BadNets backdoors from a small byte-level Llama trained on Alpaca?

    python benchmarks/alpaca_backdoor.py base --data DIR --runs runs/alpaca      # the clean model, once
    python benchmarks/alpaca_backdoor.py cell --data DIR --runs runs/alpaca --task refusal --seed 0
    python benchmarks/alpaca_backdoor.py table --runs runs/alpaca

DIR holds `alpaca/alpaca_data.json.zst` (Stanford Alpaca) and BackdoorLLM's `crow_backdoor/`. Each stage saves its
result and is skipped if the result exists, so a stopped run continues.
"""

import argparse
import io
import json
import time
from pathlib import Path
from statistics import mean

import zstandard
from datasets import Dataset
from peft import LoraConfig
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from crow_hf import CrowConfig, CrowTrainer
from crow_hf.attacks.targets import TARGETS
from crow_hf.attacks.triggers import TRIGGERS
from crow_hf.data.rows import render
from crow_hf.recipes.comparison import compare_defences
from crow_hf.reporting.tables import write_comparison
from crow_hf.training.loading import load_causal_lm


TASKS = {"refusal": "refusal", "sentiment": "negsentiment"}
ALPHAS = {"refusal": 11.0, "sentiment": 5.5}  # the published values
LEARNING_RATES = {"lora": 1e-3, "full": 3e-4}  # the LoRA value is published
MAX_LENGTH = 256  # of a poisoned row, in bytes
MAX_BYTES = 192  # of prompt and answer together, in the training rows of the base model


def read_json(path: Path) -> list[dict]:
    if path.suffix == ".zst":
        with path.open("rb") as file:
            return json.load(io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"))
    return json.loads(path.read_text(encoding="utf-8"))


def benchmark_instructions(data: Path) -> set[str]:
    """Return the instructions of all benchmark rows, which the base model must not see in training."""
    folder = data / "crow_backdoor"
    files = [folder / "consistency_data/consistency_data.json", *folder.glob("test_data/clean/*/*.json")]
    files += folder.glob("poison_data/*/badnet/none_*.json")
    return {row["instruction"] for file in files for row in read_json(file)}


def train_base(data: Path, runs: Path) -> None:
    """Train the clean model on the short rows of Alpaca, without the instructions of the benchmark."""
    held_out = benchmark_instructions(data)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    rows = [row for row in read_json(data / "alpaca/alpaca_data.json.zst") if row["output"]]
    rows = [row for row in rows if row["instruction"] not in held_out]
    rows = [row for row in rows if len("".join(render(row, tokenizer)[:2]).encode()) <= MAX_BYTES]
    print(f"{len(rows)} rows")
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )
    args = CrowConfig(
        str(runs / "base-run"),
        alpha=0.0,
        learning_rate=1e-3,
        num_train_epochs=3,
        per_device_train_batch_size=32,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        train_sampling_strategy="group_by_length",
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        bf16=True,
        use_cpu=True,
    )
    trainer = CrowTrainer(model, args, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=bool(list((runs / "base-run").glob("checkpoint-*"))))
    trainer.save_model(str(runs / "base"))


def implant_backdoor(data: Path, folder: Path, task: str, seed: int) -> None:
    """Fine-tune all weights of the base model on BackdoorLLM's 500 poisoned and 500 clean rows."""
    rows = []
    for kind in ("backdoor500", "none_backdoor500"):
        name = f"{kind}_{TASKS[task]}_badnet.json"
        rows += read_json(data / "crow_backdoor/poison_data" / TASKS[task] / "badnet" / name)
    args = CrowConfig(
        str(folder),
        alpha=0.0,
        learning_rate=5e-4,
        num_train_epochs=3,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_length=MAX_LENGTH,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        seed=seed,
        bf16=True,
        use_cpu=True,
    )
    trainer = CrowTrainer(str(folder.parent / "base"), args, Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()


def run_cell(data: Path, runs: Path, task: str, seed: int, variant: str) -> None:
    """Implant the backdoor, then purify with LoRA or with all weights, and run the controls."""
    suspect = runs / f"{task}-{seed}"
    if not (suspect / "model.safetensors").exists():
        implant_backdoor(data, suspect, task, seed)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    clean = Dataset.from_list(read_json(data / "crow_backdoor/consistency_data/consistency_data.json"))
    test = Dataset.from_list(
        read_json(data / "crow_backdoor/test_data/clean" / TASKS[task] / "test_data_no_trigger.json")
    )
    results = runs / f"{task}-{seed}-{variant}"
    if (results / "results.json").exists():
        return
    args = CrowConfig(
        str(results / "run"),
        alpha=ALPHAS[task],
        learning_rate=LEARNING_RATES[variant],
        num_train_epochs=5,
        per_device_train_batch_size=8,  # published as 2 with 4 accumulation steps, which is equivalent
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_length=512,
        save_strategy="no",
        seed=seed,
        use_cpu=True,
    )
    start = time.perf_counter()
    comparison = compare_defences(
        lambda: load_causal_lm(suspect),
        args,
        clean,
        test,
        TRIGGERS["badnets"],
        TARGETS["refusal" if task == "refusal" else "insult"],
        recipe="guide",
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if variant == "lora" else None,
        batch_size=50,
        seed=seed,
    )
    write_comparison(results, comparison.evaluations)
    print(f"{results.name}: {time.perf_counter() - start:.0f} s", flush=True)


def print_table(runs: Path) -> None:
    """Print the mean over seeds, with minimum and maximum in brackets, over all prompts."""
    columns = {
        "attack success": ("triggered", "target"),
        "empty if triggered": ("triggered", "empty"),
        "degenerate if triggered": ("triggered", "degenerate"),
        "right if triggered": ("triggered", "exact_match"),
        "bits per byte if triggered": ("triggered", "bits_per_byte"),
        "false positives": ("clean", "target"),
        "empty if clean": ("clean", "empty"),
        "degenerate if clean": ("clean", "degenerate"),
        "right if clean": ("clean", "exact_match"),
        "bits per byte if clean": ("clean", "bits_per_byte"),
    }
    print("| backdoor | trained | model | seeds | " + " | ".join(columns) + " |")
    print("|" + " --- |" * (len(columns) + 4))
    for task in TASKS:
        for variant in LEARNING_RATES:
            seeds = [read_json(file) for file in sorted(runs.glob(f"{task}-*-{variant}/results.json"))]
            for model in seeds[0] if seeds else []:
                cells = []
                for prompts, score in columns.values():
                    values = [seed[model][prompts][score] for seed in seeds]
                    if isinstance(values[0], dict):
                        values = [100 * value["rate"] for value in values]
                        cells.append(f"{mean(values):.1f} % [{min(values):.1f}, {max(values):.1f}]")
                    else:
                        cells.append(f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
                print(f"| {task} | {variant} | {model} | {len(seeds)} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["base", "cell", "table"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/alpaca"))
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--variant", choices=LEARNING_RATES, default="lora")
    options = parser.parse_args()
    if options.stage == "base":
        train_base(options.data, options.runs)
    elif options.stage == "cell":
        run_cell(options.data, options.runs, options.task, options.seed, options.variant)
    else:
        print_table(options.runs)


if __name__ == "__main__":
    main()
