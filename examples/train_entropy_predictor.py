"""Train the byte-entropy predictor that ships with crow_hf, on files that every Python installation has.

    OMP_NUM_THREADS=1 python examples/train_entropy_predictor.py --output_dir predictor    # 12 minutes on one core

The data has four parts: the docstrings of Python's standard library (prose), its source files (code), made-up words in
every script of Python's Unicode tables, and random bytes. The made-up words teach the bytes of each script, if not its
languages. The random bytes teach a high entropy for incompressible data. A few bytes of the text are random too, and a
third of the code is indented with tabs, so that one unusual byte does not make the next ones surprising. One in twenty
source files is held out. The configuration stores the thresholds that cut the held-out files into patches of 4.5
bytes. The README beside the weights lists the settings and the bits per byte.
"""

import ast
import hashlib
import math
import platform
import random
import sys
import sysconfig
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import HfArgumentParser, Trainer, TrainingArguments

from crow_hf import ByteEntropyPredictor, calibrate_threshold


NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
TIMES_DOCUMENTATION = 3
BYTES_OF_CODE = 4_000_000
BYTES_OF_SCRIPTS = 1_200_000
BYTES_OF_NOISE = 250_000
BYTES_PER_STRAY_BYTE = 500
PATCH_SIZE = 4.5
# In the ratio of 5 to 1 both scaled thresholds stay below the largest entropy, so that incompressible bytes form
# patches of their own.
THRESHOLDS = {"threshold": 0.5, "relative_threshold": 0.1}
README = """# The default byte-entropy predictor of crow_hf

{parameters:,} parameters in float32, trained on bytes by `examples/train_entropy_predictor.py` (seed {seed}, {steps:,}
steps of {batch:,} bytes, Python {python}). Training data: {training_bytes:,} bytes, sha256 `{digest}`.

| held out | bytes | bits per byte |
|---|---:|---:|
{rows}

A threshold of {threshold:.4f} and a relative one of {relative_threshold:.4f} (shares of 8 bits) cut the held-out
documentation and code into patches of {patch_size:.2f} bytes.
"""


@dataclass
class Arguments(TrainingArguments):
    output_dir: str = "predictor"
    hidden_size: int = field(default=96, metadata={"help": "Dimension of the hidden states."})
    num_layers: int = field(default=2, metadata={"help": "Number of layers."})
    num_heads: int = field(default=3, metadata={"help": "Number of attention heads."})
    ff_dim: int = field(default=256, metadata={"help": "Dimension of the feed-forward layers."})
    sliding_window: int = field(default=64, metadata={"help": "Number of bytes that a layer attends to."})
    row_length: int = field(default=256, metadata={"help": "Number of bytes per training row."})
    max_steps: int = 1800
    use_cpu: bool = True
    bf16: bool | None = True
    per_device_train_batch_size: int = 48
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup_steps: float = 100
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 50
    save_steps: float = 500
    save_total_limit: int | None = 1
    report_to: str = "none"


def library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [file for file in sorted(root.rglob("*.py")) if not NOT_LIBRARY & set(file.relative_to(root).parts)]


def documentation(source: str) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def words_of_all_scripts(size: int, rng: random.Random) -> bytes:
    """Generate lines of made-up words. Each line has one script and unequal letter frequencies, as in a language."""
    alphabets = defaultdict(list)
    for code in range(0xA0, 0xFFFF):
        if unicodedata.category(chr(code))[0] in "LM":
            alphabets[unicodedata.name(chr(code), "UNKNOWN").split()[0]].append(chr(code))
    scripts = [letters for letters in alphabets.values() if len(letters) >= 20]
    lines, total = [], 0
    while total < size:
        letters = rng.sample(alphabet := rng.choice(scripts), min(len(alphabet), 60))
        weights = [1 / rank for rank in range(1, len(letters) + 1)]
        words = ["".join(rng.choices(letters, weights, k=rng.randint(1, 9))) for _ in range(rng.randint(3, 20))]
        lines.append((" ".join(words) + "\n").encode())
        total += len(lines[-1])
    return b"".join(lines)


def stray_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for index in rng.sample(range(len(data)), len(data) // BYTES_PER_STRAY_BYTE):
        changed[index] = rng.randrange(256)
    return bytes(changed)


def corpora(seed: int) -> tuple[bytes, dict[str, bytes]]:
    """Return the training bytes and the held-out bytes of each kind."""
    rng = random.Random(seed)
    kinds = {kind: ([], []) for kind in ("documentation", "code")}
    for number, file in enumerate(library_files()):
        source = file.read_text("utf-8", errors="ignore")
        held_out = number % 20 == 0
        code = source.replace("    ", "\t") if number % 3 == 0 else source
        kinds["code"][held_out].append(code.encode())
        kinds["documentation"][held_out].append(documentation(source).encode())
    rng.shuffle(kinds["code"][0])
    training = [b"\n".join(kinds["documentation"][0])] * TIMES_DOCUMENTATION
    training += [b"\n".join(kinds["code"][0])[:BYTES_OF_CODE]]
    training += [words_of_all_scripts(BYTES_OF_SCRIPTS, rng), rng.randbytes(BYTES_OF_NOISE)]
    # Only the training data gets stray bytes, not the held-out data.
    training = [stray_bytes(b"".join(training[:-1]), rng), training[-1]]
    held_out = {kind: b"\n".join(held) for kind, (_, held) in kinds.items()}
    return b"".join(training), held_out | {"random bytes": rng.randbytes(20_000)}


def rows(data: bytes, length: int) -> Dataset:
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: len(data) // length * length].view(-1, length)
    return Dataset.from_dict({"input_ids": values.numpy(), "labels": values.numpy()}).with_format("torch")


def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in batch]).long() for name in ("input_ids", "labels")}


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    training, held_out = corpora(args.seed)
    torch.manual_seed(args.seed)
    predictor = ByteEntropyPredictor(
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        ff_dim=args.ff_dim,
        sliding_window=args.sliding_window,
    )
    trainer = Trainer(predictor, args, data_collator=collate, train_dataset=rows(training, args.row_length))
    resume = any(Path(args.output_dir).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resume or None)

    predictor.eval()
    table = []
    for kind, data in held_out.items():
        metrics = trainer.evaluate(rows(data, args.row_length))
        table.append(f"| {kind} | {len(data):,} | {metrics['eval_loss'] / math.log(2):.3f} |")
    files = [held_out["documentation"], held_out["code"]]
    found = calibrate_threshold(files, predictor, PATCH_SIZE, **THRESHOLDS)
    predictor.config.patch_threshold = round(found.threshold, 4)
    predictor.config.patch_relative_threshold = round(found.relative_threshold, 4)
    weights = Path(args.output_dir) / "weights"
    predictor.save_pretrained(weights)
    (weights / "README.md").write_text(
        README.format(
            parameters=predictor.num_parameters(),
            seed=args.seed,
            steps=args.max_steps,
            batch=args.per_device_train_batch_size * args.row_length,
            python=platform.python_version(),
            training_bytes=len(training),
            digest=hashlib.sha256(training).hexdigest(),
            rows="\n".join(table),
            threshold=found.threshold,
            relative_threshold=found.relative_threshold,
            patch_size=found.patch_size,
        ),
        encoding="utf-8",
    )
    print(weights / "README.md", file=sys.stderr)


if __name__ == "__main__":
    main()
