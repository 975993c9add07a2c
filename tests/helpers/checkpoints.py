"""Trainers that save checkpoints, callbacks that kill or watch them, and command lines for such runs."""

import os
import signal
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import ByT5Tokenizer, TrainerCallback

from crow_hf import CrowConfig, CrowTrainer, InvarianceConfig
from crow_hf.methods.invariance.trainer import InvarianceTrainer
from crow_hf.training.checkpoints import incomplete_files
from helpers.tiny import ragged_rows, same_weights, tiny_gpt2, tiny_llama, weights_of


ROWS = [{"prompt": f"{letter} word of the=", "completion": f"it is {letter}"} for letter in "abcdefghijkl"]
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_grad_norm": 1e6}
# The learning rate is constant, so that a superfluous step changes the weights.
SAVING = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
KINDS = ("crow", "invariance")
EPOCHS, STEPS = 2, 6


def build(kind, folder, callbacks=None, **settings):
    """A trainer with three steps per epoch, dropout or a new adapter, and a log line every two steps."""
    settings = QUIET | SAVING | {"num_train_epochs": EPOCHS, "logging_steps": 2} | settings
    if kind == "crow":
        settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        args = CrowConfig(str(folder), **settings)
        return CrowTrainer(tiny_gpt2(0.2), args, Dataset.from_list(ragged_rows(12)), callbacks=callbacks)
    settings |= {"per_device_train_batch_size": 4, "num_views": 12, "keep": 0.3, "warmup_steps": 0, "alpha": 1.0}
    args = InvarianceConfig(str(folder), **settings)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    rows, tokenizer = Dataset.from_list(ROWS), ByT5Tokenizer(extra_ids=0)
    return InvarianceTrainer(tiny_llama(), args, rows, tokenizer, lora, callbacks=callbacks)


def outcome(trainer):
    """The weights and the log, without the run times."""
    log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return weights_of(trainer.model), log


def assert_same(one, other):
    """Check that two outcomes are bit-identical."""
    assert same_weights(one[0], other[0])
    assert one[1] == other[1]


def steps_kept(folder):
    """The steps of the complete and of the incomplete checkpoints in a folder."""
    found = {
        int(path.name.rpartition("-")[2]): not incomplete_files(path) for path in Path(folder).glob("checkpoint-*")
    }
    return [sorted(step for step in found if found[step] == whole) for whole in (True, False)]


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


class KillSelf(TrainerCallback):
    """Kills the process in the middle of a checkpoint: the weights are new, all other files are old."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.save_pretrained = lambda *args, **kwargs: (
                type(model).save_pretrained(model, *args, **kwargs),
                kill_self(),
            )


def train_and_kill_self(folder):
    resume = str(folder / "checkpoint-2")
    build("crow", folder, [KillSelf(3)], max_steps=3).train(resume_from_checkpoint=resume)


class Progress(TrainerCallback):
    """Appends a byte to a file at the start and after every step, so that another process can follow the training."""

    def __init__(self, path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        with open(self.path, "ab") as file:
            file.write(b".")

    on_step_end = on_train_begin


def train_in_a_process(kind, folder, resume, epochs):
    torch.set_num_threads(1)
    trainer = build(kind, folder, [Progress(folder.with_name("progress"))], num_train_epochs=epochs)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()


def command_line(command, paths, folder, *options):
    """The arguments of a short run of a command."""
    argv = [
        command,
        "--model",
        paths / "model",
        "--dataset",
        paths / "rows.jsonl",
        "--output_dir",
        folder,
        "--use_cpu",
    ]
    argv += ["--max_steps", 3, "--save_steps", 1, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3]
    argv += ["--recipe", "guide"] if command == "purify" and "--recipe" not in options else []
    return [str(word) for word in [*argv, *options]]


def last_sentence(capsys, command):
    """The only line that begins with the command. Fails if there is a traceback."""
    err = capsys.readouterr().err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("crow-hf ")]
    assert len(lines) == 1 and lines[0].startswith(f"crow-hf {command}: ") and "Traceback" not in err, err
    return lines[0]
