"""How much time and memory does a step of CROW cost, relative to a step of plain fine-tuning?

    python benchmarks/step_cost.py

A forward pass costs F. A backward pass costs 2 F with full weights, and a little more than F with LoRA, because frozen
weights need no gradient. Plain fine-tuning has one forward and one backward pass. CROW adds the backward pass to the
embeddings (F) and the forward and backward passes of the perturbed input.

All steps of a round run in one process. Ratios compare steps of the same round, and the tables show medians over the
rounds. With one thread, other programs may use another core.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from crow_hf import CrowConfig, CrowDataCollator, CrowTrainer
from crow_hf.methods.crow.objective import layer_consistency_loss, perturb_embeddings


@dataclass
class Arguments:
    """The tables to make, and the number of repetitions."""

    tables: list[str] = field(
        default_factory=lambda: ["time", "memory", "scaling", "ranks", "profile"],
        metadata={"help": "Tables to make: time, memory, scaling, ranks, profile."},
    )
    rounds: int = field(default=5, metadata={"help": "Number of rounds. The tables show medians over them."})
    steps: int = field(default=3, metadata={"help": "Number of steps per round. The first one does not count."})
    threads: int = field(default=1, metadata={"help": "Number of PyTorch threads."})


@dataclass(frozen=True)
class Setting:
    """The sizes of a model and of its batches."""

    layers: int = 8
    width: int = 384
    vocabulary: int = 260
    batch: int = 8
    length: int = 128
    lora: bool = False
    checkpointing: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
        if not self.lora:
            return model
        return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

    def rows(self) -> Dataset:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, self.vocabulary, (self.batch, self.length), generator=generator).tolist()
        return Dataset.from_dict({"input_ids": ids, "labels": ids})


SETTINGS = {
    "full weights, 260 tokens": Setting(),
    "full weights, 32,000 tokens": Setting(vocabulary=32_000),
    "LoRA, 260 tokens": Setting(lora=True),
}
SCALES = {"length": (64, 128, 256, 512), "layers": (4, 8, 16), "width": (192, 384, 768), "batch": (2, 8, 32)}


class PerturbedOnlyTrainer(CrowTrainer):
    """A fast mode with L_LM on the perturbed pass, so that the clean pass needs neither head nor backward pass."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, recorder, inputs = self.args, self.recorder, self.recorder.prepare(inputs)
        mask = recorder.chain_mask(inputs)
        with recorder.record() as clean:
            self.accelerator.unwrap_model(model)(**recorder.without_head(inputs))
        before = layer_consistency_loss(clean.hidden_states, mask, args.consistency_layers)
        (gradient,) = torch.autograd.grad(before, clean.perturbed)
        push = partial(perturb_embeddings, gradient=gradient, epsilon=args.epsilon, mode=args.epsilon_mode)
        with recorder.record(push) as perturbed:
            outputs = model(**inputs)
        after = layer_consistency_loss(perturbed.hidden_states, mask, args.consistency_layers)
        labels, positions = self._count(inputs)
        self._log_terms({"loss_lm": outputs.loss, "consistency_perturbed": after}, labels, positions)
        by_labels, by_positions = self._shares(model, labels, positions, num_items_in_batch)
        return by_labels * outputs.loss + args.alpha * by_positions * after


class PublishedTrainer(CrowTrainer):
    """The passes of the published code: forward and full backward for the attack, a perturbed and a clean pass."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, recorder, inputs = self.args, self.recorder, self.recorder.prepare(inputs)
        mask = recorder.chain_mask(inputs)
        with recorder.record() as clean:
            model(**inputs)
        clean.perturbed[0].retain_grad()
        layer_consistency_loss(clean.hidden_states, mask, args.consistency_layers).backward(retain_graph=True)
        model.zero_grad()
        push = partial(
            perturb_embeddings, gradient=clean.perturbed[0].grad, epsilon=args.epsilon, mode=args.epsilon_mode
        )
        with recorder.record(push) as perturbed:
            model(**inputs)
        after = layer_consistency_loss(perturbed.hidden_states, mask, args.consistency_layers)
        return model(**inputs).loss + args.alpha * after


class Stopwatch(TrainerCallback):
    """Records when each step ended. The differences include everything that the Trainer does."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


def bare_loop(setting: Setting, steps: int) -> list[float]:
    """Fine-tune without a Trainer, and return the times at which the steps ended."""
    model, batch = setting.model().train(), CrowDataCollator(pad_token_id=0)(list(setting.rows()))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, ends = torch.optim.AdamW(weights, lr=1e-5), []
    for _ in range(steps):
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return ends


def trained_by(trainer_type: type[Trainer], setting: Setting, steps: int, **settings) -> list[float]:
    """Fine-tune with a Trainer, and return the times at which the steps ended."""
    with tempfile.TemporaryDirectory() as folder:
        args = CrowConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=setting.batch,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            activation_checkpointing=setting.checkpointing,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        rows, collator = setting.rows(), CrowDataCollator(pad_token_id=0)
        trainer = trainer_type(setting.model(), args, train_dataset=rows, data_collator=collator)
        stopwatch = Stopwatch()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(stopwatch)
        trainer.train()
    return stopwatch.ends


PLAIN = "fine-tuning, transformers' Trainer"
STEPS: dict[str, Callable[[Setting, int], list[float]]] = {
    "fine-tuning, bare loop": bare_loop,
    PLAIN: partial(trained_by, Trainer),
    "fine-tuning, CrowTrainer with alpha 0": partial(trained_by, CrowTrainer, alpha=0.0),
    "CrowTrainer": partial(trained_by, CrowTrainer),
    "passes of the published code": partial(trained_by, PublishedTrainer),
    "perturbed pass alone (fast mode)": partial(trained_by, PerturbedOnlyTrainer),
}
# Plain fine-tuning costs 3 F per step, and 2 F with LoRA.
BOUNDS = {"CrowTrainer": (7 / 3, 5 / 2), "perturbed pass alone (fast mode)": (5 / 3, 4 / 2)}


def seconds_per_step(ends: list[float]) -> float:
    """Return the median without the first step, which allocates the memory of the others."""
    return statistics.median(after - before for before, after in zip(ends, ends[1:], strict=False))


def rounds_of(setting: Setting, names: list[str], args: Arguments) -> dict[str, list[float]]:
    """Return the seconds per step, by name and round."""
    seconds = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            seconds[name].append(seconds_per_step(STEPS[name](setting, args.steps)))
    return seconds


def ratio(seconds: dict[str, list[float]], name: str) -> str:
    """Format the ratio to plain fine-tuning: median over the rounds, minimum and maximum."""
    ratios = sorted(one / plain for one, plain in zip(seconds[name], seconds[PLAIN], strict=True))
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


def table(header: list[str], rows: list[list[str]]) -> None:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def time_table(args: Arguments) -> None:
    print(f"\nTime of a step, plain fine-tuning = 1; medians of {args.rounds} rounds [smallest, largest]\n")
    measured = [rounds_of(setting, list(STEPS), args) for setting in SETTINGS.values()]
    rows = [[name, *(ratio(seconds, name) for seconds in measured)] for name in STEPS]
    bounds = [
        ["bound of " + name, f"{full:.2f}", f"below {full:.2f}", f"{lora:.2f}"]
        for name, (full, lora) in BOUNDS.items()
    ]
    plain = ["seconds of plain fine-tuning", *(f"{statistics.median(seconds[PLAIN]):.2f}" for seconds in measured)]
    table(["step", *SETTINGS], [*rows, *bounds, plain])


def peak_bytes(train: Callable[[], object]) -> int:
    """Return the peak of the bytes that PyTorch allocates on the CPU in a training, without what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        train()
    held, peak = 0, 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def memory_table(args: Arguments) -> None:
    print("\nPeak memory of a training (weights, gradients, optimizer, activations), plain fine-tuning = 1\n")
    names = [PLAIN, "CrowTrainer", "passes of the published code", "perturbed pass alone (fast mode)"]
    settings = SETTINGS | {
        f"{name}, checkpointing": replace(setting, checkpointing=True) for name, setting in SETTINGS.items()
    }
    rows = []
    for title, setting in settings.items():
        peaks = {name: peak_bytes(partial(STEPS[name], setting, 2)) for name in names}
        shares = [f"{peaks[name] / peaks[PLAIN]:.2f}" for name in names[1:]]
        rows.append([title, f"{peaks[PLAIN] / 2**20:.0f}", *shares])
    table(["setting", "plain, MiB", *names[1:]], rows)


def scaling_table(args: Arguments) -> None:
    print("\nCrowTrainer at larger sizes, everything else as in the first setting\n")
    rows = []
    for dimension, sizes in SCALES.items():
        for size in sizes:
            seconds = rounds_of(replace(Setting(), **{dimension: size}), [PLAIN, "CrowTrainer"], args)
            plain = statistics.median(seconds[PLAIN])
            crow = statistics.median(seconds["CrowTrainer"])
            rows.append([f"{dimension} {size}", f"{plain:.3f}", f"{crow:.3f}", ratio(seconds, "CrowTrainer")])
    table(["setting", "plain, s", "CrowTrainer, s", "ratio"], rows)


def rank_table(args: Arguments) -> None:
    if "RANK" in os.environ:
        seconds = rounds_of(Setting(), [PLAIN, "CrowTrainer"], args)
        if os.environ["RANK"] == "0":
            print(json.dumps(seconds), flush=True)
        # The destructors of gloo process groups sometimes hang after all work is done.
        os._exit(0)
    print("\nCrowTrainer on several processes (DDP, gloo), each with the batch and threads of the first setting\n")
    rows = []
    for count in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        options = [f"--{name}={getattr(args, name)}" for name in ("rounds", "steps", "threads")]
        command = [*launch, __file__, "--tables", "ranks", *options]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds = json.loads(output.strip().splitlines()[-1])
        plain, crow = (statistics.median(seconds[name]) for name in (PLAIN, "CrowTrainer"))
        rows.append([str(count), f"{plain:.3f}", f"{crow:.3f}", ratio(seconds, "CrowTrainer")])
    table(["processes", "plain, s", "CrowTrainer, s", "ratio"], rows)


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "optimizer": ("_foreach", "aten::addcdiv", "aten::addcmul", "aten::lerp", "_fused_adam"),
}


def profile_table(args: Arguments) -> None:
    print("\nTime by kind of operator, % of the total time of all operators\n")
    rows = []
    for title, setting in SETTINGS.items():
        for name in (PLAIN, "CrowTrainer"):
            with profile(activities=[ProfilerActivity.CPU]) as record:
                STEPS[name](setting, args.steps)
            times = {event.key: event.self_cpu_time_total for event in record.key_averages()}
            total = sum(times.values())
            shares = [
                sum(spent for key, spent in times.items() if any(part in key for part in parts)) / total
                for parts in KINDS.values()
            ]
            rows.append([f"{title}: {name}", *(f"{100 * share:.0f}" for share in (*shares, 1 - sum(shares)))])
    table(["step", *KINDS, "other"], rows)


TABLES = {
    "time": time_table,
    "memory": memory_table,
    "scaling": scaling_table,
    "ranks": rank_table,
    "profile": profile_table,
}


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    disable_progress_bars()
    logging.set_verbosity_error()
    for name in args.tables:
        TABLES[name](args)
    print(
        f"\nPeak resident memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
    )


if __name__ == "__main__":
    main()
