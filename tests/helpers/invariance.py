"""Rows, arguments, models and trainers for the tests of Invariance."""

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import ByT5Tokenizer

from crow_hf.methods.invariance.config import InvarianceConfig
from crow_hf.methods.invariance.objective import invariance_terms
from crow_hf.methods.invariance.trainer import InvarianceTrainer
from crow_hf.training.recorder import recorder_of
from helpers.coconut import TOKENIZER, smooth_coconut
from helpers.tiny import tiny_llama


SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}


# Ragged prompts and answers, so that no mean of means is right by chance.
ROWS = Dataset.from_dict(
    {
        "prompt": [f"{letter} " + "word of " * (number % 3) + "the=" for number, letter in enumerate("abcdefghijkl")],
        "completion": ["yes", "no, never", "a", "perhaps not"] * 3,
    }
)


def invariance_args(tmp_path, **kwargs):
    """An InvarianceConfig for the tests: CPU, silent, no checkpoints, few views and nothing of the suspect kept."""
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 1e6,
        "per_device_train_batch_size": 4,
        "num_views": 12,
        "keep": 0.0,
        "label_weight": 0.0,
        "warmup_steps": 0,
    }
    return InvarianceConfig(str(tmp_path / "run"), **(defaults | kwargs))


def lora(**kwargs):
    """A LoRA of rank 4 on the attention, unless `kwargs` say otherwise."""
    return LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | kwargs))


def invariance_trainer(
    tmp_path,
    model,
    peft_config=None,
    rows=ROWS,
    tokenizer=None,
    written_rows=None,
    leaked_tokens=(),
    phrases=(),
    **kwargs,
):
    """An InvarianceTrainer with the arguments of `invariance_args`."""
    args, tokenizer = invariance_args(tmp_path, **kwargs), tokenizer or ByT5Tokenizer(extra_ids=0)
    return InvarianceTrainer(model, args, rows, tokenizer, peft_config, written_rows, leaked_tokens, phrases)


FAMILIES = {"llama": (tiny_llama, ByT5Tokenizer(extra_ids=0)), "coconut": (smooth_coconut, TOKENIZER)}


def family(name, tmp_path, **kwargs):
    """A model, another model of its kind as the suspect, three rows, and their batch."""
    make, tokenizer = FAMILIES[name]
    model, suspect = make(seed=0).eval(), make(seed=1).eval().requires_grad_(False)
    trainer = invariance_trainer(tmp_path, model, tokenizer=tokenizer, **kwargs)
    rows = [trainer.train_dataset[number] for number in (1, 4, 6)]
    return model, suspect, rows, trainer.data_collator(rows)


def terms_of(model, suspect, batch, steps=2, step_size=0.2, layers="paper", leaked=(), phrase=()):
    """The terms of the Invariance objective on a batch of the collator."""
    recorder, suspect_recorder = recorder_of(model), recorder_of(suspect)
    batch = dict(recorder.prepare(batch))
    mask, weights = batch.pop("inserted_mask"), batch.pop("label_weights")
    options = {"adversarial_steps": steps, "adversarial_step_size": step_size, "layers": layers}
    options |= {"leaked": torch.tensor(leaked, dtype=torch.long), "phrase": torch.tensor(phrase, dtype=torch.long)}
    models = recorder, model, model, suspect_recorder, suspect
    return invariance_terms(*models, batch, mask, label_weights=weights, **options)


def layers_of(model):
    """The layers of a tiny Llama, or of a Coconut's backbone."""
    core = model.latent_transformer.backbone if hasattr(model, "latent_transformer") else model.model
    return next(module for module in core.modules() if isinstance(module, torch.nn.ModuleList))


def column(trainer, name):
    """The values of one term, one per log entry."""
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]
