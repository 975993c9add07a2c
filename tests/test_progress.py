"""Tests of the phases: a display hears of them, and without one transformers' bars have their names."""

from contextlib import contextmanager

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

from crow_hf import CrowConfig, CrowTrainer, progress
from crow_hf.progress import PhaseCallback, announce, duration, phase, restart_clock, seconds_by_phase, shown_on


class Heard:
    """A display that takes down what it hears."""

    def __init__(self):
        self.calls = []

    def announce(self, text, seconds):
        self.calls.append((text, dict(seconds)))

    def begin(self, name):
        self.calls.append(f"begin {name}")

    def end(self, completed):
        self.calls.append("end" if completed else "stop")


@pytest.fixture
def heard():
    display = Heard()
    with shown_on(display):
        yield display


@contextmanager
def bars_made():
    """List the arguments of every progress bar of transformers."""
    made = []

    def hook(factory, args, kwargs):
        made.append(kwargs)
        return factory(*args, **kwargs)

    previous = logging.set_tqdm_hook(hook)
    try:
        yield made
    finally:
        logging.set_tqdm_hook(previous)


def test_a_display_hears_of_phases_and_of_what_a_run_needs(heard):
    announce("It needs 2 GB.", {"Purifying": 60.0})
    with phase("Purifying"):
        pass
    assert heard.calls == [("It needs 2 GB.", {"Purifying": 60.0}), "begin Purifying", "end"]


def test_an_inner_phase_belongs_to_the_outer_one(heard):
    """Fails if the purification inside of a control is shown as the purification."""
    with phase("Training the control"), phase("Purifying"):
        pass
    assert heard.calls == ["begin Training the control", "end"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_stops_a_phase_and_the_next_one_can_begin(heard, error):
    with pytest.raises(error), phase("Screening the rows"):
        raise error
    with phase("Purifying"):
        pass
    assert heard.calls == ["begin Screening the rows", "stop", "begin Purifying", "end"]


def test_without_a_display_nothing_is_heard(heard):
    with shown_on(Heard()):
        pass
    with phase("Purifying"):
        announce("It needs 2 GB.", {})
    assert heard.calls == []


def small_trainer(tmp_path, tiny_llama, byte_tokenizer, rows, **changes):
    options = {"max_steps": 2, "use_cpu": True, "save_strategy": "no", "report_to": "none"} | changes
    callbacks = options.pop("callbacks", None)
    args = CrowConfig(str(tmp_path / "out"), **options)
    return CrowTrainer(tiny_llama(), args, rows, processing_class=byte_tokenizer, callbacks=callbacks)


def test_the_bar_of_the_training_has_the_name_of_the_phase_and_the_loss(
    tmp_path, tiny_llama, byte_tokenizer, rows, capfd
):
    """Fails if the bar of the canaries cannot be told from that of the purification."""
    trainer = small_trainer(tmp_path, tiny_llama, byte_tokenizer, rows)
    with bars_made() as made, phase("Implanting canaries"):
        trainer.train()
    # Saving has bars too.
    assert [(bar["desc"], bar["total"]) for bar in made if bar.get("unit") == "step"] == [("Implanting canaries", 2)]
    loss = trainer.state.log_history[0]["loss"]
    assert f"loss {loss:.3g}" in capfd.readouterr().err


def test_hidden_bars_of_transformers_hide_that_of_the_training(tmp_path, tiny_llama, byte_tokenizer, rows, capfd):
    logging.disable_progress_bar()
    try:
        small_trainer(tmp_path, tiny_llama, byte_tokenizer, rows).train()
    finally:
        logging.enable_progress_bar()
    assert "Training" not in capfd.readouterr().err


class OwnBar(ProgressCallback):
    """A caller's own progress bar."""


class Notebook(TrainerCallback):
    """Stands for the callback of notebooks, which is no `ProgressCallback`."""


def test_a_bar_of_the_callers_own_is_kept(tmp_path, tiny_llama, byte_tokenizer, rows):
    """Fails if a subclass that the caller passes is taken for the Trainer's own bar."""
    trainer = small_trainer(tmp_path, tiny_llama, byte_tokenizer, rows, callbacks=[OwnBar(), Notebook()])
    kinds = [type(each) for each in trainer.callback_handler.callbacks]
    assert {OwnBar, Notebook, PhaseCallback} <= set(kinds) and ProgressCallback not in kinds


@pytest.mark.parametrize("shown", [False, True])
def test_a_display_replaces_printed_log_lines(tmp_path, tiny_llama, byte_tokenizer, rows, shown):
    """With `disable_tqdm` the Trainer prints its log lines. A display shows the loss instead."""

    def kinds():
        trainer = small_trainer(tmp_path, tiny_llama, byte_tokenizer, rows, disable_tqdm=True)
        return {type(each) for each in trainer.callback_handler.callbacks}

    if shown:
        with shown_on(Heard()):
            assert PhaseCallback in kinds() and PrinterCallback not in kinds()
    else:
        assert PrinterCallback in kinds() and PhaseCallback not in kinds()


def test_the_time_of_each_phase_is_counted(monkeypatch):
    """Fails if a phase that comes twice counts once, if an inner phase counts too, or if an earlier run counts."""
    times = iter([0.0, 1.0, 10.0, 12.0, 20.0, 25.0, 30.0, 31.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    with phase("Looking"):
        pass
    restart_clock()
    with phase("Looking"), phase("Writing"):
        pass
    with phase("Purifying"):
        pass
    with pytest.raises(ZeroDivisionError), phase("Looking"):
        raise ZeroDivisionError
    assert seconds_by_phase() == {"Looking": 3.0, "Purifying": 5.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (12, "12 s"), (89, "89 s"), (180, "3 min"), (4800, "80 min"), (5460, "1 h 31 min")],
)
def test_durations_are_written_as_people_say_them(seconds, text):
    assert duration(seconds) == text
