"""Write models and checkpoints whole, resume from checkpoints, and explain failed writes."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from ..files import flush, whole_files, write_text
from .foreign import drop_foreign_settings
from .saves import check_saved, lost_tensors, one_line, rehearse_save, saved_tensors, with_own_storage, write_weights
from .sharding import will_shard


logger = logging.get_logger(__name__)

# A file in each checkpoint with the sizes of all other files, and the values that the log has not yet averaged.
CHECKPOINT_RECORD = "checkpoint.json"
OUTPUT_WAS_USED = (
    "{} already holds a model or the checkpoints of another run. Choose another `output_dir`, or continue that run "
    "with resume_from_checkpoint=True."
)
# What the Trainer reads of a checkpoint, apart from safetensors and JSON.
_PICKLES = (".bin", ".pt", ".pth")
# Integers by their bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The errors that Python, torch.save and safetensors raise on a full or read-only disk.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def output_was_used(output_dir: str | Path) -> bool:
    """Whether a folder already holds a model or checkpoints, which a new run must not overwrite."""
    return any(any(Path(output_dir).glob(pattern)) for pattern in (f"{PREFIX_CHECKPOINT_DIR}-*", "*.safetensors"))


def incomplete_files(checkpoint: str | Path) -> list[str]:
    """
    List the files of a checkpoint that are missing or truncated. The list is empty if the checkpoint is complete.

    The Trainer writes `trainer_state.json` last. If that file is complete, all others have been written.
    """
    checkpoint, contents = Path(checkpoint), {}
    for name in (TRAINER_STATE_NAME, CHECKPOINT_RECORD):
        try:
            contents[name] = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return [name]
    sizes = contents[CHECKPOINT_RECORD]["files"]
    return [name for name, size in sizes.items() if _size_of(checkpoint / name) != size]


def checkpoint_to_resume(output_dir: str | Path, resume_from_checkpoint: str | bool | None) -> str | None:
    """
    Find the checkpoint that a run resumes from.

    Args:
        output_dir (`str` or `Path`):
            The run's output folder.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            A checkpoint, or `True` for the last complete checkpoint in `output_dir`. Incomplete checkpoints are
            skipped with a warning.

    Returns:
        `str`: The checkpoint, or `None` if none was requested.

    Raises:
        `ValueError`: If the checkpoint is incomplete or could run code, or no complete one exists. The message names
            the missing files.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is not True:
        if incomplete := incomplete_files(resume_from_checkpoint):
            raise ValueError(
                f"{resume_from_checkpoint} is not a complete checkpoint ({_describe(incomplete)}). Pass another "
                "checkpoint, or True for the last complete one."
            )
        _check_pickles(Path(resume_from_checkpoint))
        return str(resume_from_checkpoint)
    steps = {path: path.name.rpartition("-")[2] for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    checkpoints = sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]))
    skipped: list[str] = []
    for checkpoint in reversed(checkpoints):
        incomplete = incomplete_files(checkpoint)
        if not incomplete:
            if skipped:
                logger.warning(f"Resuming from {checkpoint.name}, the last complete checkpoint: {'; '.join(skipped)}.")
            _check_pickles(checkpoint)
            return str(checkpoint)
        skipped.append(f"{checkpoint.name} is not complete ({_describe(incomplete)})")
    if not skipped:
        raise ValueError(f"There is no checkpoint in {output_dir}. Start without `resume_from_checkpoint`.")
    raise ValueError(
        f"There is no complete checkpoint in {output_dir}: {'; '.join(skipped)}. Delete it and start without "
        "`resume_from_checkpoint`."
    )


def _check_pickles(checkpoint: Path) -> None:
    """Refuse a checkpoint whose pickles name anything but numbers, which reading them would run."""
    for file in sorted(checkpoint.rglob("*")):
        # DeepSpeed reads its own folders, and trusts them.
        if file.suffix not in _PICKLES or file.parent.name.startswith("global_step"):
            continue
        try:
            with safe_globals():
                unsafe = sorted(get_unsafe_globals_in_checkpoint(file))
        except Exception as error:
            raise ValueError(
                f"{file.name} of {checkpoint} cannot be read ({one_line(error)}): pass another checkpoint, or start "
                "anew."
            ) from error
        if unsafe:
            raise ValueError(
                f"{file.name} of {checkpoint} would run code ({', '.join(unsafe[:3])}), so this run did not write it. "
                "Start anew."
            )


def remove_checkpoints(output_dir: str | Path) -> None:
    """Remove the checkpoints of a finished run. They can be several times as large as its model."""
    for checkpoint in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (checkpoint / TRAINER_STATE_NAME).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)


def check_writable(output_dir: str | Path, model: PreTrainedModel | PeftModel | None = None) -> None:
    """
    Check that a folder can be written to, and that its disk has enough free space for a model.

    Args:
        output_dir (`str` or `Path`):
            The folder. It need not exist yet.
        model (`PreTrainedModel` or `PeftModel`, *optional*):
            The model to be saved there. Only the adapter counts for a `PeftModel`.

    Raises:
        `OSError`: If the folder is not writable or the disk has too little free space.
    """
    folder = existing(output_dir)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{output_dir} is not writable. Choose another `output_dir`.")
    if model is None:
        return
    saved = [each for each in model.parameters() if each.requires_grad or not isinstance(model, PeftModel)]
    needed, free = sum(each.numel() * each.element_size() for each in saved), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{output_dir} has too little free space for the model: it needs {_in_mb(needed)} and {_in_mb(free)} are "
            "free. Free some space, or choose another `output_dir`."
        )


@contextmanager
def writing(what: str, folder: str | Path, remedy: str) -> Iterator[None]:
    """
    Turn a failed write into one error that says what could not be written, why, and what to do.

    Args:
        what (`str`):
            Name of the object to be written, such as `"The model"`.
        folder (`str` or `Path`):
            The folder it is written to.
        remedy (`str`):
            What the user can do, as the end of a sentence.

    Raises:
        `OSError`: If the block raises one of `WRITE_ERRORS`.
    """
    try:
        yield
    except WRITE_ERRORS as error:
        raise OSError(f"{what} could not be written to {folder} ({_reason(error, folder)}): {remedy}.") from error


def check_adapter_name(model: nn.Module) -> None:
    """
    Check that the adapter that is trained has the name under which a checkpoint holds it.

    Raises:
        `ValueError`: If it has another name, or if several adapters are active.
    """
    if isinstance(model, PeftModel) and model.active_adapters != ["default"]:
        raise ValueError(
            f"The active adapter is {', '.join(map(repr, model.active_adapters)) or 'none'}, but a checkpoint can "
            "only hold one that is named 'default': save it, and load it with `load_causal_lm`."
        )


class StopAtCtrlC(TrainerCallback):
    """
    On Ctrl-C, finish the current step, save a checkpoint and stop. A second Ctrl-C stops at once. The same goes for
    SIGTERM, which `kill` and schedulers send.

    The callback handles neither if the run saves no checkpoints, or if it has several processes (they would stop at
    different steps). A signal for which the program has installed a handler of its own is left to it.
    """

    def __init__(self) -> None:
        self.was_pressed = False
        # The handlers before, by their signals.
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """Handle Ctrl-C while `trainer` trains in the `with` block, and raise `KeyboardInterrupt` after a stop."""
        self.was_pressed, args = False, trainer.args
        watched = (
            args.save_strategy != "no"
            and args.world_size == 1
            and threading.current_thread() is threading.main_thread()
        )
        before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)} if watched else {}
        self._before = {
            each: handler
            for each, handler in before.items()
            if handler is signal.default_int_handler or (each, handler) == (signal.SIGTERM, signal.SIG_DFL)
        }
        for each in self._before:
            signal.signal(each, self._on_ctrl_c)
        try:
            yield
        finally:
            self._restore()
        if self.was_pressed:
            state = trainer.state
            checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            outcome = (
                "Its checkpoint could not be written" if incomplete_files(checkpoint) else f"{checkpoint} is complete"
            )
            raise KeyboardInterrupt(
                f"Stopped by Ctrl-C after step {state.global_step} of {state.max_steps}. {outcome}. Continue with "
                "resume_from_checkpoint=True."
            )

    def _on_ctrl_c(self, *_: Any) -> None:
        self.was_pressed = True
        self._restore()
        logger.warning("Saving a checkpoint after this step, then stopping. Press Ctrl-C again to stop at once.")

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.was_pressed:
            control.should_save = control.should_training_stop = True


class CheckpointMixin(Trainer):
    """
    Make a trainer save checkpoints that record whether they are complete, and resume from them exactly.

    A resumed run gives the same weights and the same log as a run that was never stopped.

    Attributes:
        failures (`list[str]`):
            What could not be written or pushed during training, one sentence each.
    """

    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase | None
    failures: list[str]
    # mode -> term -> step -> [sum over the tokens, number of tokens]
    _logged: dict[str, dict[str, dict[int, list[float]]]]

    def note_failure(self, sentence: str) -> None:
        """Log a failure that does not stop training, and add it to `failures`."""
        logger.error(sentence)
        self.failures.append(sentence)

    def check_optimizer(self) -> None:
        """
        Build the data loader, the optimizer and the scheduler, and check that they would change the model.

        Raises:
            `ValueError`: If the arguments ask for what is not installed or does not exist, or if no step is made.
        """
        loader = self.get_train_dataloader()
        *_, max_steps = self.set_initial_training_values(self.args, loader)
        try:
            self.create_optimizer_and_scheduler(max_steps)
            if self.args.use_liger_kernel:
                apply_liger_kernel(self.model, self.args.liger_kernel_config)
        except Exception as error:
            raise ValueError(
                f"The optimizer, its schedule or its kernels cannot be made ({one_line(error)}): change `optim`, "
                "`lr_scheduler_type` or their arguments, or install what they need."
            ) from error
        factors = getattr(self.lr_scheduler, "lr_lambdas", [lambda step: 1.0])
        if not self.args.learning_rate or not any(factor(step) for factor in factors for step in range(max_steps)):
            raise ValueError(
                f"The learning rate is 0 in each of the {max_steps} steps, so the model would not change: raise "
                "`learning_rate`, or set fewer `warmup_steps` or more steps."
            )

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """As in [`~transformers.Trainer`], but a run without an optimizer step is an error."""
        values = super().set_initial_training_values(args, dataloader)
        *_, steps_in_epoch, max_steps = values
        if not steps_in_epoch or max_steps < 1:
            raise ValueError(
                "These arguments make no optimizer step, so the model would not change: set more `max_steps` or "
                "`num_train_epochs`, a smaller batch size, or `dataloader_drop_last` to False."
            )
        return values

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As in [`~transformers.Trainer`], but what cannot be saved, or was not changed, is an error."""
        drop_foreign_settings(self.model, self.processing_class)
        rehearse_save(self.model, self.processing_class)
        before = None if will_shard(self.args) else _fingerprint(self.model)
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if not self.state.global_step or (before is not None and before == _fingerprint(self.model)):
            raise ValueError(
                f"The training of {self.state.global_step} steps changed no weight, so this is still the suspect: "
                "raise the learning rate, and train in bfloat16 or float32."
            )
        return result

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in [`~transformers.Trainer`], but all weights are written even if another file cannot be."""
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        folder, model = output_dir or self.args.output_dir, self.model
        if isinstance(model, PeftModel):
            tensors = get_peft_model_state_dict(model, state_dict, save_embedding_layers=False)
        else:
            tensors = saved_tensors(model, state_dict)
            state_dict = with_own_storage(tensors)
        with whole_files(folder) as unfinished:
            try:
                super()._save(str(unfinished), state_dict)
            except Exception as error:
                if lost_tensors(unfinished, model, tensors):
                    write_weights(unfinished, model, tensors)
                self.note_failure(
                    f"Not every file of the model could be written to {folder} ({one_line(error)}). Its weights are "
                    "whole."
                )
            check_saved(unfinished, model, tensors)
            # Nothing reads this pickle, and it should not lie next to a model that people are to trust. The card is
            # that of PEFT, which names the folder of the base model.
            for name in (TRAINING_ARGS_NAME, "README.md"):
                (unfinished / name).unlink(missing_ok=True)
            names = {file.name for file in unfinished.iterdir()}
        prefix = "adapter_model" if isinstance(model, PeftModel) else "model"
        for file in Path(folder).glob(f"{prefix}*.safetensors*"):
            # A part of an earlier model in more parts.
            if file.name not in names:
                file.unlink()

    def _run_epoch(self, **kwargs: Any) -> None:
        # The Trainer checks the number of steps only after a step. Resumed from the last checkpoint, it would train
        # one step too many.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in [`~transformers.Trainer`], but a failed write neither ends training nor leaves files behind."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            if self.args.should_save:
                # Files of an earlier run could make a partial checkpoint look complete. A killed run may have left
                # partial files that take up space.
                shutil.rmtree(folder, ignore_errors=True)
            # Without a barrier, files that another process has already written would be deleted too.
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        except WRITE_ERRORS as error:
            sentence = f"{folder.name} could not be written to {folder.parent} ({_reason(error, folder.parent)})"
            if self.args.world_size > 1:
                # The other processes are waiting for this one in the middle of saving.
                raise OSError(f"{sentence}. Free some space and resume from the previous checkpoint.") from error
            shutil.rmtree(folder, ignore_errors=True)
            self.note_failure(f"{sentence} and was removed. Training continued without it.")

    def _save_rng_state(self, output_dir: str) -> None:
        """As in [`~transformers.Trainer`], then write the checkpoint's record. Only `trainer_state.json` follows."""
        super()._save_rng_state(output_dir)
        loss = self.accelerator.gather(self._tr_loss).mean().item()
        # All processes have written their files.
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        folder = Path(output_dir)
        written = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in written}
        for path in written:
            flush(path)
        unlogged = {"loss": loss, "last_step": self._globalstep_last_logged, "terms": self._logged["train"]}
        write_text(folder / CHECKPOINT_RECORD, json.dumps({"files": files, "log": unlogged}))

    def _load_rng_state(self, checkpoint: str) -> None:
        """As in [`~transformers.Trainer`], then restore the values that the next log line averages over."""
        super()._load_rng_state(checkpoint)
        unlogged = json.loads(Path(checkpoint, CHECKPOINT_RECORD).read_text(encoding="utf-8"))["log"]
        self._tr_loss += unlogged["loss"]
        self._globalstep_last_logged = unlogged["last_step"]
        for name, steps in unlogged["terms"].items():
            self._logged["train"][name].update({int(step): sums for step, sums in steps.items()})


def _fingerprint(model: nn.Module) -> list[int]:
    """
    Two numbers for each trainable tensor: the sums of its bits, weighted by the numbers of their rows and columns.

    Any change of a single value changes both. Changes of several values that cancel out in both sums are missed.
    """
    found: list[int] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            bits = torch.atleast_2d(parameter.detach()).flatten(1).view(_INTEGERS[parameter.element_size()])
            # In parts, because a sum first makes a copy in int64.
            parts = bits.split(4096)
            rows, columns = torch.cat([part.sum(1) for part in parts]), sum(part.sum(0) for part in parts)
            for sums in (rows, columns):
                found.append(int((sums * torch.arange(1, len(sums) + 1, device=bits.device)).sum()))
    return found


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _describe(incomplete: list[str]) -> str:
    return f"{', '.join(incomplete)} {'is' if len(incomplete) == 1 else 'are'} missing or truncated"


def _reason(error: BaseException, folder: str | Path) -> str:
    """The error's first line and the free disk space, because torch does not say that a disk is full."""
    error = error.__cause__ or error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].rstrip('.:')}; {_in_mb(shutil.disk_usage(existing(folder)).free)} are free there"


def existing(folder: str | Path) -> Path:
    """The folder, or its closest parent that exists."""
    folder = Path(folder).absolute()
    return folder if folder.exists() else existing(folder.parent)


def _in_mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
