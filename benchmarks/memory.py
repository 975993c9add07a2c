"""How much memory does a purification need? Checks the formulas of docs/purify-on-several-gpus.md on a small model.

    python benchmarks/memory.py

It runs one step of a small Llama in float32 on the CPU and counts the bytes of tensors: weights, the frozen suspect,
gradients, Adam's moments after the step, and the peak of the activations that autograd saves for the backward pass,
without parameters.
"""

import argparse
from collections import Counter
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from crow_hf import CoconutTokenizer, CrowConfig, CrowTrainer, InvarianceConfig, InvarianceTrainer


ROWS, LENGTH, HIDDEN, LAYERS = 4, 256, 256, 8


class Activations:
    """Counts the bytes of storages that autograd saves, now and at the peak. Shared storages count once."""

    def __init__(self, model: nn.Module):
        self.now = self.peak = 0
        self._uses = Counter()
        self._weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(self, tensor: torch.Tensor) -> "Kept":
        return Kept(self, tensor)

    def count(self, tensor: torch.Tensor, uses: int) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self._weights:
            return
        before = self._uses[place]
        self._uses[place] += uses
        self.now += storage.nbytes() * ((before + uses > 0) - (before > 0))
        self.peak = max(self.peak, self.now)


class Kept:
    """A tensor saved by autograd. It is counted until autograd releases it."""

    def __init__(self, activations: Activations, tensor: torch.Tensor):
        self.activations, self.tensor = activations, tensor
        activations.count(tensor, 1)

    def __del__(self):
        self.activations.count(self.tensor, -1)


class Gradients(TrainerCallback):
    """Counts the bytes of the gradients before the optimizer step."""

    found = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = size(weight.grad for weight in model.parameters() if weight.grad is not None)


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(method: str, lora: bool, checkpointing: bool) -> dict[str, int]:
    """Run one step, and return the bytes of each part."""
    tokenizer = CoconutTokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Prompts of short words, because decoys are made from words. Long answers are cut at `max_length`.
    rows = Dataset.from_dict({"prompt": ["x " * (LENGTH // 8)] * ROWS, "completion": ["y " * LENGTH] * ROWS})
    peft_config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    with TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "max_steps": 1,
            "warmup_steps": 0,
            "max_length": LENGTH,
            "per_device_train_batch_size": ROWS,
            "activation_checkpointing": checkpointing,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        kind, config = (InvarianceTrainer, InvarianceConfig) if method == "Invariance" else (CrowTrainer, CrowConfig)
        if method == "Invariance":
            settings["num_views"] = ROWS
        trainer = kind(model, config(**settings), rows, processing_class=tokenizer, peft_config=peft_config)
        gradients, activations = Gradients(), Activations(trainer.model)
        trainer.add_callback(gradients)
        with torch.autograd.graph.saved_tensors_hooks(activations.keep, lambda kept: kept.tensor):
            trainer.train()
    suspect = getattr(trainer, "_suspect", None)
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    return {
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "trained": sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad),
        "weights": size(trainer.model.parameters()),
        "gradients": gradients.found,
        "moments": size(moments),
        "suspect": size(suspect.parameters()) if suspect is not None else 0,
        "activations": activations.peak,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    one_state = ROWS * LENGTH * HIDDEN * 4
    print(
        f"Hidden size {HIDDEN}, {LAYERS} layers, {ROWS} rows of {LENGTH} tokens. "
        "MiB, with the result of the formula in brackets.\n"
    )
    print(
        "| method | adapter | checkpointing | weights | gradients | Adam | suspect | activations "
        "| in layers' outputs |"
    )
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method in ("CROW", "Invariance"):
        for lora, checkpointing in ((False, False), (False, True), (True, False), (True, True)):
            found = measure(method, lora, checkpointing)
            every, trained = found["parameters"], found["trained"]
            wanted = [4 * every, 4 * trained, 8 * trained, 4 * every if method == "Invariance" and not lora else 0]
            parts = [found[name] for name in ("weights", "gradients", "moments", "suspect")]
            cells = [f"{part / 2**20:.1f} ({value / 2**20:.1f})" for part, value in zip(parts, wanted, strict=True)]
            activations = found["activations"]
            cells += [f"{activations / 2**20:.1f}", f"{activations / one_state / LAYERS:.1f}"]
            names = [method, "LoRA" if lora else "none", "yes" if checkpointing else "no"]
            print(f"| {' | '.join([*names, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
