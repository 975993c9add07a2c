"""Says what a run is doing, by name, to whoever shows it.

Code says what it does with [`phase`], and how far it is with the progress bars of transformers, which
`transformers.logging.disable_progress_bar` hides. The command line shows both in a [`Display`] of its own.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The name of the phase before a training. Recipes have it, and measurements outside of them.
LOOKING = "Looking at the suspect"


class Display(Protocol):
    """Shows the phases of a run. Its progress bars come from a hook, see `transformers.logging.set_tqdm_hook`."""

    def announce(self, text: str, seconds: Mapping[str, float]) -> None:
        """Show what the run will need, and take note of the phases to come and about how long each takes."""

    def begin(self, name: str) -> None:
        """Show that a phase begins."""

    def end(self, completed: bool) -> None:
        """Show that the phase has ended. An error ends a phase that is not completed."""


_display: Display | None = None
_phase: str | None = None
_seconds: dict[str, float] = {}


@contextmanager
def shown_on(display: Display) -> Iterator[None]:
    """Show the phases of the `with` block on a display."""
    global _display
    _display = display
    try:
        yield
    finally:
        _display = None


def is_shown() -> bool:
    """Whether a display shows the run."""
    return _display is not None


@contextmanager
def phase(name: str) -> Iterator[None]:
    """
    Name what the `with` block does, such as `"Purifying"`. A phase inside another one belongs to the outer one.

    Args:
        name (`str`):
            The name, which begins a sentence.
    """
    global _phase
    if _phase is not None:
        yield
        return
    _phase, completed, began = name, False, time.perf_counter()
    if _display is not None:
        _display.begin(name)
    try:
        yield
        completed = True
    finally:
        _phase = None
        _seconds[name] = _seconds.get(name, 0.0) + time.perf_counter() - began
        if _display is not None:
            _display.end(completed)


def restart_clock() -> None:
    """Forget how long the phases of earlier runs took."""
    _seconds.clear()


def seconds_by_phase() -> dict[str, float]:
    """Return how many seconds each phase took since the clock was restarted."""
    return dict(_seconds)


def duration(seconds: float) -> str:
    """Write a duration as people say it: `"12 s"`, `"3 min"`, `"1 h 20 min"`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def announce(text: str, seconds: Mapping[str, float]) -> None:
    """
    Say what a run will need before it starts. Without a display this is a log line of level info.

    Args:
        text (`str`):
            Memory, disk, time and device, in sentences.
        seconds (`Mapping[str, float]`):
            The phases to come in their order, and about how long each takes.
    """
    if _display is None:
        logger.info(text)
    else:
        _display.announce(text, seconds)


class PhaseCallback(ProgressCallback):
    """The Trainer's progress bar with the name of the phase and the loss. A display shows no other log lines."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            name = _phase or "Training"
            self.training_bar = logging.tqdm(total=state.max_steps, desc=name, unit="step", dynamic_ncols=True)
        self.current_step = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3g}")
        super().on_log(args, state, control, logs, **kwargs)


def name_progress_bar(trainer: Trainer) -> None:
    """Give a trainer a progress bar with the name of the phase. A notebook keeps its own, and so does a caller."""
    replaced = (ProgressCallback,) if _display is None else (ProgressCallback, PrinterCallback)
    for callback in [each for each in trainer.callback_handler.callbacks if type(each) in replaced]:
        trainer.remove_callback(callback)
        trainer.add_callback(PhaseCallback())
