"""Does CROW remove BackdoorLLM's BadNets backdoors from a small byte-level Llama trained on Alpaca?

    python benchmarks/alpaca_backdoor.py base --data DIR --runs runs/alpaca      # the clean model, once
    python benchmarks/alpaca_backdoor.py cell --data DIR --runs runs/alpaca --task refusal --seed 0
    python benchmarks/alpaca_backdoor.py table --runs runs/alpaca

DIR holds `alpaca/alpaca_data.json.zst` (Stanford Alpaca) and BackdoorLLM's `crow_backdoor/`. Every stage writes its
result when it is done and is skipped when the result is there, so a run that was stopped goes on where it was.
"""

import argparse
import io
import json
from pathlib import Path

import zstandard
from datasets import Dataset
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from crow_hf import CrowConfig, CrowTrainer
from crow_hf.data import render


TASKS = {"refusal": "refusal", "sentiment": "negsentiment"}
MAX_BYTES = 256  # of prompt and answer of the rows that the base model is trained on


def read_json(path: Path) -> list[dict]:
    if path.suffix == ".zst":
        with path.open("rb") as file:
            return json.load(io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"))
    return json.loads(path.read_text(encoding="utf-8"))


def benchmark_instructions(data: Path) -> set[str]:
    """The instructions of the poisoning, purification and test rows: the base model must not have seen them."""
    folder = data / "crow_backdoor"
    files = [folder / "consistency_data/consistency_data.json", *folder.glob("test_data/clean/*/*.json")]
    files += folder.glob("poison_data/*/badnet/none_*.json")
    return {row["instruction"] for file in files for row in read_json(file)}


def train_base(data: Path, runs: Path) -> None:
    """Train the clean model on the short rows of Alpaca, without those of the benchmark."""
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
        num_train_epochs=4,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["base", "cell", "table"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/alpaca"))
    options = parser.parse_args()
    if options.stage == "base":
        train_base(options.data, options.runs)


if __name__ == "__main__":
    main()
