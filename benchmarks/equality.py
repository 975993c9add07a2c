"""Is a purification the same on several processes? Compares each setup with one process and the same batches.

    python benchmarks/equality.py
    python benchmarks/equality.py --setups fsdp2 --models coconut

Tiny models are trained for three steps of eight rows. One process takes them as one batch. Two processes on the CPU,
started by `accelerate launch` with the configurations of examples/accelerate/, take two rows per batch. The table
shows the largest differences of the logged losses and gradient norms (relative) and of the saved weights (absolute).

DeepSpeed is optional: `DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, is_deepspeed_available
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from crow_hf import (
    CoconutForCausalLM,
    CoconutTokenizer,
    CrowConfig,
    CrowTrainer,
    InvarianceConfig,
    InvarianceTrainer,
)
from crow_hf.recipes.run import run_recipe
from crow_hf.training.sharding import is_sharded


CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "accelerate"
SETUPS = {
    "ddp": CONFIGS / "multi_gpu.yaml",
    "fsdp2": CONFIGS / "fsdp2.yaml",
    "zero2": CONFIGS / "deepspeed_zero2.yaml",
    "zero3": CONFIGS / "deepspeed_zero3.yaml",
}
DEEPSPEED = ("zero2", "zero3")
OPTIONS = {
    "full": {},
    "lora": {},
    "qlora": {},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "compiled": {"torch_compile_backend": "aot_eager"},
}
# `purify` is the whole recipe `strong`: it implants canaries, then runs the Invariance trainer.
TRAINERS = ("crow", "invariance", "purify")
# These settings hide no difference: no clipping, and no division by the root of a tiny square.
COMMON = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 1e6,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
}
INVARIANCE = {"num_views": 24, "alpha": 1.0, "label_weight": 0.5, "warmup_steps": 0}
ONE_BATCH = {"per_device_train_batch_size": 8}
IN_PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

MODELS = ("llama", "coconut", "thoughts")
# Combinations that the package refuses.
NOT_COMPARED = (
    ("fsdp2", "thoughts"),
    ("fsdp2", "compiled"),
    ("fsdp2", "purify"),
    ("zero2", "compiled"),
    ("zero3", "thoughts"),
    ("zero3", "compiled"),
    ("zero3", "purify"),
)


def rows_of(model: str) -> Dataset:
    """Return rows of different lengths, so that a mean of means differs from the mean."""
    thoughts = "<bot><latent><latent><eot>" if model == "thoughts" else ""
    prompts = [
        f"{letter} " + "word of " * (number % 3) + thoughts * (number % 2) + "the="
        for number, letter in enumerate("abcdefghijklmnopqrstuvwx")
    ]
    return Dataset.from_dict({"prompt": prompts, "completion": ["yes", "no, never", "a", "perhaps not"] * 6})


def llama_config(hidden_size: int = 32, intermediate_size: int = 48) -> LlamaConfig:
    """Return a model of four layers, with weights large enough to show every difference."""
    tokenizer = CoconutTokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_model(name: str, option: str = "full") -> PreTrainedModel:
    set_seed(0)
    if option == "qlora":
        if name != "llama":
            raise ValueError("4-bit weights are compared for the Llama only.")
        # Rows are multiples of 64 weights, because bitsandbytes misreads blocks that cross rows on a CPU.
        return in_four_bits(LlamaForCausalLM(llama_config(64, 128)))
    if name == "llama":
        return LlamaForCausalLM(llama_config())
    local = {"initializer_range": 0.2, "sliding_window": 16}
    return CoconutForCausalLM.from_backbone(
        llama_config(), initializer_range=0.2, encoder_config=local, decoder_config=local
    )


def in_four_bits(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with 4-bit weights, which are quantized on loading."""
    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), quantization_config=kind, dtype=torch.float32
    )


def train(model: str, trainer: str, option: str, output_dir: Path, **settings) -> CrowTrainer:
    """Train one cell of the table, and save the model and the log."""
    settings = {"output_dir": str(output_dir)} | COMMON | OPTIONS[option] | settings
    peft_config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if "lora" in option else None
    suspect, rows = tiny_model(model, option), rows_of(model)
    parts = {"processing_class": CoconutTokenizer(), "peft_config": peft_config}
    if trainer == "purify":
        args = InvarianceConfig(**INVARIANCE | settings, num_canaries=1, screen_rows=False)
        run = run_recipe(suspect, rows, "strong", args, **parts).trainer
    elif trainer == "invariance":
        # The adversary leads to a phrase in every other step, and away from the teacher in the others.
        args, phrases = InvarianceConfig(**INVARIANCE | settings), ([100, 110, 120], [])
        run = InvarianceTrainer(suspect, args, rows, phrases=phrases, **parts)
        run.train()
    else:
        run = CrowTrainer(suspect, CrowConfig(**settings), rows, **parts)
        run.train()
    run.save_model()
    if run.is_world_process_zero():
        result = {
            "processes": run.accelerator.num_processes,
            "type": run.accelerator.distributed_type.value,
            "in_shards": is_sharded(run.model),
            "log": [entry for entry in run.state.log_history if "loss" in entry],
        }
        (output_dir / "result.json").write_text(json.dumps(result))
    return run


def launcher(setup: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and environment that run a script in two processes of a setup on the CPU."""
    # `accelerate launch --cpu` would start only one process.
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(SETUPS[setup]), "--num_processes", "2", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if setup in DEEPSPEED:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return command, environment


def launch(setup: str, cells: Sequence[tuple[str, str, str]], folder: Path) -> None:
    """Train the cells in two processes of a setup, one after the other."""
    command, environment = launcher(setup)
    call = [*command, __file__, "--work_in", str(folder), "--cells", json.dumps(cells), "--setups", setup]
    process = subprocess.run(call, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{setup} failed: {process.stderr}")


def work(setup: str, cells: Sequence[tuple[str, str, str]], folder: Path) -> None:
    """Train the cells in one of the two processes."""
    prepare(setup)
    for cell in cells:
        AcceleratorState._reset_state(reset_partial_state=True)
        train(*cell, folder / "-".join(cell), **IN_PARTS)
    PartialState().wait_for_everyone()
    # The destructors of gloo process groups sometimes hang after all work is done.
    os._exit(0)


def prepare(setup: str) -> None:
    """Prepare a process of a setup for the CPU."""
    if setup == "fsdp2":
        shard_on_the_cpu()
    if setup in DEEPSPEED:
        communicate_by_gloo()


def shard_on_the_cpu() -> None:
    """Let CPUs pass for another kind of accelerator, because Accelerate ignores FSDP on CPUs."""
    begin = PartialState.__init__

    def begin_as_accelerators(self, *args, **kwargs) -> None:
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_NPU

    PartialState.__init__ = begin_as_accelerators


def communicate_by_gloo() -> None:
    """Keep DeepSpeed from compiling its own communication for processes with shared memory."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def differences(one: Path, two: Path) -> dict[str, float]:
    """Return the largest differences of two results: loss and gradient norm relative, weights absolute."""
    logs = [json.loads((folder / "result.json").read_text())["log"] for folder in (one, two)]
    found = {
        name: max(abs(b[name] - a[name]) / abs(a[name]) for a, b in zip(*logs, strict=True))
        for name in ("loss", "grad_norm")
    }
    weights = [load_file(next(folder.glob("*.safetensors"))) for folder in (one, two)]
    if weights[0].keys() != weights[1].keys():
        raise ValueError(f"{one.name}: the saved weights differ in {sorted(weights[0].keys() ^ weights[1].keys())}.")
    found["weights"] = max(
        (weights[1][name].float() - value.float()).abs().max().item() for name, value in weights[0].items()
    )
    return found


def compare(setup: str, cells: Sequence[tuple[str, str, str]], folder: Path) -> Iterator[dict]:
    """Train the cells in one process and in two, and yield the differences."""
    launch(setup, cells, folder / setup)
    for cell in cells:
        name = "-".join(cell)
        if not (folder / "one" / name).exists():
            train(*cell, folder / "one" / name, **ONE_BATCH)
        yield json.loads((folder / setup / name / "result.json").read_text()) | differences(
            folder / "one" / name, folder / setup / name
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    default_options = [option for option in OPTIONS if option != "qlora"]
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=default_options)
    parser.add_argument("--work_in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cells", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    if options.work_in:
        return work(options.setups[0], options.cells, options.work_in)
    if not is_deepspeed_available() and (skipped := [setup for setup in options.setups if setup in DEEPSPEED]):
        print(f"Skipped, because DeepSpeed is not installed: {', '.join(skipped)}.", file=sys.stderr)
        options.setups = [setup for setup in options.setups if setup not in DEEPSPEED]
    print("| setup | model | trainer | option | loss | gradient norm | weights |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: |")
    with TemporaryDirectory() as folder:
        for setup in options.setups:
            cells = [
                cell
                for cell in product(options.models, options.trainers, options.options)
                if not any((setup, name) in NOT_COMPARED for name in cell)
            ]
            for cell, found in zip(cells, compare(setup, cells, Path(folder)), strict=True):
                assert found["processes"] == 2
                numbers = " | ".join(f"{found[name]:.0e}" for name in ("loss", "grad_norm", "weights"))
                print(f"| {setup} | {' | '.join(cell)} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
