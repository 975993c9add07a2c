"""How much memory and time does a step of Invariance take, relative to a step of plain fine-tuning?

    python benchmarks/invariance_cost.py

Both train a small Llama on the same four rows. Each row has a prompt of 192 tokens and an answer of 64. Invariance
trains on three views of each row, which are longer by their decoys, after one pass (the teacher) and two passes with
gradients (the adversary) of the frozen suspect.

Memory is the peak of the bytes that PyTorch allocates for weights, suspect, gradients, Adam and activations. The work
is the number of floating-point operations in matrix products. Time is CPU time, or the elapsed time on a GPU with
`--device cuda`; the steps of a round run in one process, and the table shows medians over the rounds.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from step_cost import peak_bytes
from torch.utils.flop_counter import FlopCounterMode
from transformers import ByT5Tokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from crow_hf import CrowConfig, CrowTrainer, InvarianceConfig, InvarianceTrainer
from crow_hf.methods.invariance import objective, trainer


ROWS, PROMPT, ANSWER = 4, 192, 64
PARTS = ["teacher", "adversary", "model forward", "backward, optimizer"]


@dataclass
class Arguments:
    """What to measure, and how often."""

    tables: list[str] = field(
        default_factory=lambda: ["memory", "work", "time"], metadata={"help": "memory, work, time."}
    )
    vocabularies: list[int] = field(default_factory=lambda: [260, 49_152, 262_144], metadata={"help": "Sizes."})
    hidden: int = field(default=256, metadata={"help": "Hidden size."})
    layers: int = field(default=4, metadata={"help": "Number of layers."})
    rounds: int = field(default=3, metadata={"help": "Number of rounds. The tables show medians over them."})
    steps: int = field(default=4, metadata={"help": "Number of steps per round. The first one does not count."})
    threads: int = field(default=1, metadata={"help": "Number of PyTorch threads."})
    label_weight: float = field(default=0.0, metadata={"help": "Share of the rows' own answers in the target."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda.", "choices": ["cpu", "cuda"]})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16."})


class Stopwatch(TrainerCallback):
    """Measures each step, and the parts of a step of Invariance, by a clock: in seconds or in operations."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.spent, self.steps = now, {}, []

    def timed(self, name, function, *args, **kwargs):
        start = self.now()
        result = function(*args, **kwargs)
        self.spent[name] = self.spent.get(name, 0.0) + self.now() - start
        return result

    def on_step_begin(self, *args, **kwargs):
        self.spent, self.start = {}, self.now()

    def on_step_end(self, *args, **kwargs):
        self.steps.append(self.spent | {"step": self.now() - self.start})


def elapsed(device: str) -> float:
    if device == "cpu":
        # The time of all threads of this process. Other programs may use the machine meanwhile.
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def train(
    method: str, vocabulary: int, lora: bool, args: Arguments, steps: int, now: Callable[[], float] | None = None
) -> list[dict[str, float]]:
    """Train, and return what each step and its parts took by the clock."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            tie_word_embeddings=True,
            bos_token_id=None,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    # The answer ends with a token of its own.
    rows = Dataset.from_list([{"prompt": "words " * (PROMPT // 6), "completion": "y" * (ANSWER - 1)}] * ROWS)
    settings = {
        "max_steps": steps,
        "max_length": 2 * (PROMPT + ANSWER),
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-5,
        "use_cpu": args.device == "cpu",
        "bf16": args.bf16,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if method == "Invariance":
        kind, config = InvarianceTrainer, InvarianceConfig
        settings |= {"num_views": ROWS * steps, "label_weight": args.label_weight}
    else:
        kind, config, settings = CrowTrainer, CrowConfig, settings | {"alpha": 0.0}
    peft_config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    with tempfile.TemporaryDirectory() as folder:
        run = kind(
            model,
            config(folder, **settings),
            rows,
            processing_class=ByT5Tokenizer(extra_ids=0),
            peft_config=peft_config,
        )
        watch = Stopwatch(now or partial(elapsed, args.device))
        run.remove_callback(PrinterCallback)
        run.add_callback(watch)
        parts = [(objective, "away_from_teacher"), (trainer, "invariance_terms")]
        patches = [patch.object(home, name, partial(watch.timed, name, getattr(home, name))) for home, name in parts]
        for each in patches:
            each.start()
        if method == "Invariance":
            run._suspect_forward = partial(watch.timed, "suspect", run._suspect_forward)
        try:
            run.train()
        finally:
            for each in patches:
                each.stop()
    return watch.steps


def peak(method: str, vocabulary: int, lora: bool, args: Arguments) -> int:
    """Return the peak of the bytes in tensors during two steps."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        train(method, vocabulary, lora, args, 2)
        return torch.cuda.max_memory_allocated()
    return peak_bytes(partial(train, method, vocabulary, lora, args, 2))


def print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(names: list[str]) -> None:
    print_row(names)
    print_row(["---"] * 2 + ["---:"] * (len(names) - 2))


def memory_table(args: Arguments) -> None:
    print(f"\nPeak memory of a training, MiB. {args}\n")
    print_header(["vocabulary", "weights", "plain", "Invariance", "ratio"])
    for vocabulary in args.vocabularies:
        for lora in (False, True):
            plain, invariance = (peak(method, vocabulary, lora, args) for method in ("plain", "Invariance"))
            cells = [f"{plain / 2**20:.0f}", f"{invariance / 2**20:.0f}", f"{invariance / plain:.2f}"]
            print_row([f"{vocabulary:,}", "LoRA" if lora else "full", *cells])


def work_table(args: Arguments) -> None:
    print(f"\nBillions of operations in a step, and the shares of its parts. {args}\n")
    print_header(["vocabulary", "weights", "plain", "Invariance", "ratio", *PARTS])
    for vocabulary in args.vocabularies:
        for lora in (False, True):
            found = {}
            for method in ("plain", "Invariance"):
                with FlopCounterMode(display=False) as counter:
                    found[method] = train(method, vocabulary, lora, args, 1, counter.get_total_flops)
            plain, invariance = (median(found[method], "step") for method in ("plain", "Invariance"))
            cells = [f"{plain / 1e9:.1f}", f"{invariance / 1e9:.1f}", f"{invariance / plain:.2f}"]
            print_row([f"{vocabulary:,}", "LoRA" if lora else "full", *cells, *shares(found["Invariance"])])


def time_table(args: Arguments) -> None:
    print(f"\nSeconds of a step, and the shares of its parts. {args}\n")
    print_header(["vocabulary", "weights", "plain", "Invariance", "ratio", *PARTS])
    for vocabulary in args.vocabularies:
        for lora in (False, True):
            plain, invariance, ratios = [], [], []
            for _ in range(args.rounds):
                one = train("plain", vocabulary, lora, args, args.steps)[1:]
                other = train("Invariance", vocabulary, lora, args, args.steps)[1:]
                plain, invariance = plain + one, invariance + other
                ratios.append(median(other, "step") / median(one, "step"))
            cells = [f"{median(plain, 'step'):.2f}", f"{median(invariance, 'step'):.2f}"]
            cells += [f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"]
            print_row([f"{vocabulary:,}", "LoRA" if lora else "full", *cells, *shares(invariance)])


def shares(steps: list[dict[str, float]]) -> list[str]:
    """Return the shares of the parts of a step of Invariance."""
    step, terms, adversary = (median(steps, name) for name in ("step", "invariance_terms", "away_from_teacher"))
    # Two of the suspect's three forward passes belong to the adversary.
    teacher = median(steps, "suspect") / 3
    parts = [teacher, adversary, terms - teacher - adversary, step - terms]
    return [f"{100 * part / step:.0f} %" for part in parts]


def median(steps: list[dict[str, float]], name: str) -> float:
    return statistics.median(step[name] for step in steps)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    disable_progress_bars()
    logging.set_verbosity_error()
    for name in args.tables:
        {"memory": memory_table, "work": work_table, "time": time_table}[name](args)


if __name__ == "__main__":
    main()
