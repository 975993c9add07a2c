"""Checkpoints that are whole or not taken for one, and what is said where something cannot be written."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Of a checkpoint: the size of every other file, and what the log holds back until its next line.
CHECKPOINT_RECORD = "checkpoint.json"
OUTPUT_WAS_USED = (
    "{} holds a model or the checkpoints of another run: choose another `output_dir`, or go on with that run by "
    "resume_from_checkpoint=True."
)
# What a disk that is full or read-only looks like to Python, to torch.save and to safetensors.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def output_was_used(output_dir: str | Path) -> bool:
    """Whether a folder holds a model or checkpoints, which no new run may overwrite."""
    return any(any(Path(output_dir).glob(pattern)) for pattern in (f"{PREFIX_CHECKPOINT_DIR}-*", "*.safetensors"))


def missing_from(checkpoint: str | Path) -> list[str]:
    """
    The files of a checkpoint that are missing or cut short; none if it is whole.

    The Trainer writes `trainer_state.json` last, so where that one is whole, nothing was being written any more.
    """
    checkpoint, read = Path(checkpoint), {}
    for name in (TRAINER_STATE_NAME, CHECKPOINT_RECORD):
        try:
            read[name] = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return [name]
    sizes = read[CHECKPOINT_RECORD]["files"]
    return [name for name, size in sizes.items() if _size_of(checkpoint / name) != size]


def checkpoint_to_resume(output_dir: str | Path, asked: str | bool | None) -> str | None:
    """
    The checkpoint that a run goes on from.

    Args:
        output_dir (`str` or `Path`):
            Of the run.
        asked (`str` or `bool`, *optional*):
            A checkpoint, or `True` for the last one that is whole: those that are not are passed over with a warning.

    Returns:
        `str`: The checkpoint, or `None` if none was asked for.

    Raises:
        `ValueError`: If it is not whole, or none is. The sentence says what is missing.
    """
    if not asked:
        return None
    if asked is not True:
        if missing := missing_from(asked):
            raise ValueError(
                f"{asked} is no whole checkpoint ({_list(missing)}): pass another one, or True for the last whole one."
            )
        return str(asked)
    steps = {path: path.name.rpartition("-")[2] for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    checkpoints = sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]))
    broken = []
    for checkpoint in reversed(checkpoints):
        missing = missing_from(checkpoint)
        if not missing:
            if broken:
                logger.warning(f"Resuming from {checkpoint.name}, the last whole one: {'; '.join(broken)}.")
            return str(checkpoint)
        broken.append(f"{checkpoint.name} is not whole ({_list(missing)})")
    if not broken:
        raise ValueError(f"There is no checkpoint in {output_dir}: start without `resume_from_checkpoint`.")
    raise ValueError(
        f"There is no whole checkpoint in {output_dir}: {'; '.join(broken)}. Remove it and start without "
        "`resume_from_checkpoint`."
    )


def check_room(output_dir: str | Path, model: PreTrainedModel | PeftModel | None = None) -> None:
    """
    Look whether a folder, which need not be there yet, can be written to, and has room for a model.

    Raises:
        `OSError`: If not.
    """
    folder = _existing(output_dir)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{output_dir} cannot be written to: choose another `output_dir`.")
    if model is None:
        return
    saved = [each for each in model.parameters() if each.requires_grad or not isinstance(model, PeftModel)]
    needed, free = sum(each.numel() * each.element_size() for each in saved), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{output_dir} has no room for the model, which takes {_in_mb(needed)} where {_in_mb(free)} are free: make "
            "room, or choose another `output_dir`."
        )


@contextmanager
def writing(what: str, folder: str | Path, remedy: str) -> Iterator[None]:
    """Say in one sentence what could not be written, why, and what to do."""
    try:
        yield
    except WRITE_ERRORS as error:
        raise OSError(f"{what} could not be written to {folder} ({_why(error, folder)}): {remedy}.") from error


class StopAtCtrlC(TrainerCallback):
    """
    On Ctrl-C, finish the step, keep a checkpoint of it and stop; a second Ctrl-C stops at once.

    Ctrl-C is left alone where a run keeps no checkpoints, where it has several processes, which would not stop at the
    same step, and where the program does something of its own at Ctrl-C.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """For the time of a training; at its end, `KeyboardInterrupt` if it was stopped."""
        self.asked, args = False, trainer.args
        watched = (
            args.save_strategy != "no"
            and args.world_size == 1
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if not watched:
            yield
            return
        signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.asked:
            state = trainer.state
            checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            kept = "its checkpoint could not be written" if missing_from(checkpoint) else f"{checkpoint} is whole"
            raise KeyboardInterrupt(
                f"Stopped by Ctrl-C after step {state.global_step} of {state.max_steps}; {kept}: go on with "
                "resume_from_checkpoint=True."
            )

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.warning("Stopping after this step and keeping a checkpoint of it; Ctrl-C again stops at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


class CheckpointMixin:
    """
    What a trainer saves while it trains: checkpoints that say of themselves whether they are whole, from which a run
    goes on as if it had never been stopped.

    Attributes:
        failures (`list[str]`):
            What could not be written or pushed while the training went on, one sentence each.
    """

    failures: list[str]

    def note_failure(self, sentence: str) -> None:
        """Tell of something that went wrong beside the training, and remember it."""
        logger.error(sentence)
        self.failures.append(sentence)

    def _run_epoch(self, **kwargs: Any) -> None:
        # The Trainer counts the steps after a step only: from the last checkpoint it would train one too many.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in [`~transformers.Trainer`], but what cannot be written neither ends the training nor lies about."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            if self.args.should_save:
                # New files beside those of an earlier run would look whole, and what a kill left of one takes room.
                shutil.rmtree(folder, ignore_errors=True)
            # Or what another process writes there already would go with it.
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        except WRITE_ERRORS as error:
            sentence = f"{folder.name} could not be written to {folder.parent} ({_why(error, folder.parent)})"
            if self.args.world_size > 1:
                # The other processes wait for this one in the middle of saving.
                raise OSError(f"{sentence}: make room, and go on from the checkpoint before it.") from error
            shutil.rmtree(folder, ignore_errors=True)
            self.note_failure(f"{sentence} and was removed; the training went on without it.")

    def _save_rng_state(self, output_dir: str) -> None:
        """As in [`~transformers.Trainer`], and the checkpoint's record: only `trainer_state.json` comes after it."""
        super()._save_rng_state(output_dir)
        loss = self.accelerator.gather(self._tr_loss).mean().item()
        # Everybody's files are there.
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        folder = Path(output_dir)
        written = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in written}
        held_back = {"loss": loss, "last_step": self._globalstep_last_logged, "terms": self._logged["train"]}
        (folder / CHECKPOINT_RECORD).write_text(json.dumps({"files": files, "log": held_back}), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str) -> None:
        """As in [`~transformers.Trainer`], and what the log holds back: its next line is a mean over all steps."""
        super()._load_rng_state(checkpoint)
        held_back = json.loads(Path(checkpoint, CHECKPOINT_RECORD).read_text(encoding="utf-8"))["log"]
        self._tr_loss += held_back["loss"]
        self._globalstep_last_logged = held_back["last_step"]
        for name, steps in held_back["terms"].items():
            self._logged["train"][name].update({int(step): sums for step, sums in steps.items()})


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _list(missing: list[str]) -> str:
    return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing or cut short"


def _why(error: BaseException, folder: str | Path) -> str:
    """The reason, and the free space beside it, because torch does not say that a disk is full."""
    error = error.__cause__ or error
    told = str(error).strip().splitlines() or [type(error).__name__]
    return f"{told[0].rstrip('.:')}; {_in_mb(shutil.disk_usage(_existing(folder)).free)} are free there"


def _existing(folder: str | Path) -> Path:
    folder = Path(folder).absolute()
    return folder if folder.exists() else _existing(folder.parent)


def _in_mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
