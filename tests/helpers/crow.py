"""Batches, trainers and log entries for the tests of CROW."""

from peft import LoraConfig

from crow_hf import CrowTrainer
from helpers.tiny import crow_args, pad_rows, ragged_rows


METRICS = ["loss_lm", "consistency_clean", "consistency_perturbed", "perturbation_ratio"]
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}
BATCH = pad_rows(ragged_rows(3, seed=3))


def lora(**kwargs):
    """A LoRA of rank 4 on the attention."""
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **kwargs)


def build(tmp_path, model, rows, callbacks=None, eval_dataset=None, peft_config=None, compute_metrics=None, **kwargs):
    """A CrowTrainer with the arguments of `crow_args`."""
    return CrowTrainer(
        model,
        crow_args(tmp_path, **kwargs),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )


def step_logs(trainer):
    """The entries of log_history that belong to optimizer steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def column(trainer, name):
    """The values of one term, one per log entry."""
    return [entry[name] for entry in step_logs(trainer)]
