"""Tests of the terminal of a run: live lines, plain lines, time left, warnings and what is hidden."""

import io
import logging as std_logging
import sys
import warnings

import datasets
import pytest
from rich.console import Console
from transformers.utils import logging

from crow_hf import CrowConfig, CrowTrainer
from crow_hf.cli import display as module
from crow_hf.cli.display import watched
from crow_hf.progress import announce, phase


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def console(live):
    return Console(file=io.StringIO(), force_terminal=live, width=100, color_system=None, highlight=False)


def shown(console):
    return console.file.getvalue()


def test_plain_lines_say_when_a_phase_begins_and_ends(clock):
    out = console(live=False)
    with watched("purify", console=out), phase("Screening the rows"):
        clock.now += 12
    assert shown(out).splitlines() == ["Screening the rows ...", "Screening the rows: done in 12 s"]


def test_an_error_ends_a_phase_and_passes(clock):
    out = console(live=False)
    with pytest.raises(ValueError), watched("purify", console=out), phase("Purifying"):
        raise ValueError
    assert shown(out).splitlines()[-1] == "Purifying: stopped after 0 s"


def test_plain_lines_come_now_and_then_and_have_no_control_characters(clock):
    """Fails if each step prints a line, or if a long phase prints none."""
    out = console(live=False)
    with watched("purify", console=out), phase("Purifying"):
        with logging.tqdm(total=100, desc="Of \x1b[2J a file", unit="step") as bar:
            for _ in range(100):
                clock.now += 1
                bar.set_postfix_str("loss 0.25")
                bar.update()
    between = shown(out).splitlines()[1:-1]
    assert between == [f"Purifying: Of ␛[2J a file  {step}/100 steps  loss 0.25" for step in (30, 60, 90)]
    assert shown(out).replace("\n", "").isprintable()


def test_time_left_follows_the_plan_and_the_speed_so_far(clock):
    """
    The plan expects 10 s and 100 s. The first phase takes 30 s, so all may take 130 s instead of 110 s, and the second
    one 100 s * 130 / 110 = 118 s.
    """
    out = console(live=False)
    with watched("purify", console=out):
        announce("It takes about 2 min.", {"Screening the rows": 10.0, "Skipped": 50.0, "Purifying": 100.0})
        with phase("Screening the rows"):
            clock.now += 30
        with phase("Purifying"):
            with logging.tqdm(total=10, desc="Writing answers", unit="prompt") as bar:
                clock.now += 30
                bar.update(5)
            with logging.tqdm(total=100, desc="Purifying", unit="step") as bar:
                clock.now += 40
                bar.update(20)
    lines = shown(out).splitlines()
    assert lines[0] == "It takes about 2 min."
    # 118 s less the 30 s so far, and 80 steps of 2 s.
    assert "Purifying: Writing answers  5/10 prompts, about 88 s left in all" in lines
    assert "Purifying: 20/100 steps, about 3 min left in all" in lines


def test_a_live_line_shows_the_phase_its_bar_and_all_phases(clock):
    out = console(live=True)
    with watched("purify", console=out):
        announce("It takes about 2 min.", {"Purifying": 100.0, "Looking again": 20.0})
        with phase("Purifying"):
            bar = logging.tqdm(total=100, desc="Purifying", unit="step")
            clock.now += 50
            bar.set_postfix_str("loss 0.25")
            bar.update(50)
    text = shown(out)
    line = [line.rstrip() for line in text.splitlines() if "loss 0.25" in line][-1]
    assert line.endswith("50 s  50/100 steps  loss 0.25") and "Purifying" in line and "━━━━━" in line
    assert "about 70 s left" in text and "In all" in text
    # The last frame is erased, and one line stays.
    assert text.rstrip().endswith("Purifying                 done in 50 s")


def test_a_live_phase_prints_log_lines_above_itself(clock, capsys):
    """Fails if a log line goes to the terminal past the display, which breaks the live lines."""
    out = console(live=True)
    with watched("purify", console=out), phase("Purifying"):
        std_logging.getLogger("crow_hf.somewhere").warning("Pass `max_rows=0` to use all of them.")
        logging.get_logger("transformers.somewhere").warning("A \x1b[2J title")
        warnings.warn("of \x1b[2J Python", stacklevel=1)
        sys.stdout.write("printed\n")
    text = shown(out)
    assert "Warning: Pass `--max_rows 0` to use all of them." in text
    assert "Warning: A ␛[2J title" in text and "Warning: of ␛[2J Python" in text and "\x1b[2J" not in text
    assert "printed" in text
    assert capsys.readouterr() == ("", "")


def test_a_warning_that_repeats_is_printed_once(capsys):
    """Fails if each layer with 8-bit weights prints the same line in each pass: 25,000 lines in two minutes."""
    with watched("evaluate", console=console(live=False)):
        for number in (1, 1, 2):
            std_logging.getLogger("bitsandbytes.somewhere").warning("inputs of layer %d will be cast", number)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"Warning: inputs of layer {number} will be cast" for number in (1, 2)]


@pytest.mark.parametrize("verbose", [False, True])
def test_log_lines_of_the_training_are_only_for_the_verbose(
    tmp_path, tiny_llama, byte_tokenizer, rows, verbose, capsys
):
    """Fails if a default run prints hundreds of dictionaries."""
    args = CrowConfig(str(tmp_path / "out"), max_steps=2, use_cpu=True, save_strategy="no")
    out = console(live=False)
    with watched("purify", verbose, console=out):
        trainer = CrowTrainer(tiny_llama(), args, rows, processing_class=byte_tokenizer)
        with phase("Purifying"):
            trainer.train()
    assert shown(out).count("{'loss'") == (2 if verbose else 0)
    assert "{'loss'" not in "".join(capsys.readouterr())
    assert "loss" in trainer.state.log_history[0]


def test_between_two_phases_a_terminal_shows_ordinary_bars(clock, capsys):
    """Fails if the loading of a large model shows nothing. Without a terminal it would print control characters."""
    for live in (True, False):
        with watched("purify", console=console(live)):
            list(logging.tqdm([1, 2], desc="Loading weights"))
        assert ("Loading weights" in capsys.readouterr().err) == live


def test_bars_that_are_off_stay_off(clock):
    """Fails if the bars of the steps inside an arena, which turns them off, are shown."""
    out = console(live=False)
    logging.disable_progress_bar()
    try:
        with watched("arena", console=out), phase("Running the arena"):
            with logging.tqdm(total=2, desc="Writing answers", unit="prompt") as bar:
                clock.now += 100
                bar.update()
    finally:
        logging.enable_progress_bar()
    assert shown(out).splitlines() == ["Running the arena ...", "Running the arena: done in 2 min"]


def test_everything_is_as_before_afterwards(capsys):
    """Fails if a call of `main` from Python changes the log lines and bars of its process."""
    library = std_logging.getLogger("transformers")
    before = library.handlers, library.propagate, list(std_logging.root.handlers), sys.stderr
    were_disabled = datasets.are_progress_bars_disabled()
    for live in (True, False):
        with watched("purify", verbose=True, console=console(live)), phase("Purifying"):
            pass
    assert (library.handlers, library.propagate, list(std_logging.root.handlers), sys.stderr) == before
    assert datasets.are_progress_bars_disabled() == were_disabled
    assert std_logging.getLogger("crow_hf").level == std_logging.NOTSET
    assert logging.set_tqdm_hook(None) is None


def test_only_the_first_process_shows_something(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with watched("purify"), phase("Purifying"):
            pass
        assert ("Purifying" in capsys.readouterr().err) == (rank == "0")


def test_forced_colours_do_not_put_control_characters_into_files(monkeypatch, capsys):
    """Many CI systems set this."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with watched("purify"), phase("Purifying"):
        pass
    assert capsys.readouterr().err.splitlines()[0] == "Purifying ..."
