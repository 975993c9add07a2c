"""Rows, arguments and trainers of Invariance."""

from datasets import Dataset
from peft import LoraConfig
from transformers import ByT5Tokenizer

from crow_hf.methods.invariance.config import InvarianceConfig
from crow_hf.methods.invariance.trainer import InvarianceTrainer


SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}


# Ragged prompts and answers, so that no mean of means is right by chance.
ROWS = Dataset.from_dict(
    {
        "prompt": [f"{letter} " + "word of " * (number % 3) + "the=" for number, letter in enumerate("abcdefghijkl")],
        "completion": ["yes", "no, never", "a", "perhaps not"] * 3,
    }
)


def invariance_args(tmp_path, **kwargs):
    """An InvarianceConfig for the tests, as `crow_args` makes a CrowConfig."""
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
    return LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | kwargs))


def invariance_trainer(tmp_path, model, peft_config=None, rows=ROWS, tokenizer=None, **kwargs):
    tokenizer = tokenizer or ByT5Tokenizer(extra_ids=0)
    return InvarianceTrainer(model, invariance_args(tmp_path, **kwargs), rows, tokenizer, peft_config)
