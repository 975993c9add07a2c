"""Tests of Ctrl-C during training, in Python and on the command line."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from crow_hf import load_causal_lm
from crow_hf.cli.main import main
from helpers.checkpoints import STEPS, assert_same, build, command_line, last_sentence, outcome, steps_kept


pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.fixture(autouse=True)
def at_a_terminal():
    """Restore Python's handler. A shell makes its background processes ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class CtrlC(TrainerCallback):
    """Presses Ctrl-C `times` times in the middle of a step, or sends another signal."""

    def __init__(self, step, times=1, signum=signal.SIGINT):
        self.step, self.times, self.signum = step, times, signum

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.signum)


def test_ctrl_c_keeps_the_step(run, tmp_path):
    """Fails if Ctrl-C leaves the weights of half a step, or if the log has other lines after resuming."""
    kind, _, whole = run
    stopped = build(kind, tmp_path, [CtrlC(5)], save_steps=100)
    with pytest.raises(KeyboardInterrupt, match=r"Stopped by Ctrl-C after step 5 of 6\. .*checkpoint-5 is complete"):
        stopped.train()
    assert steps_kept(tmp_path) == [[5], []]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = build(kind, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same(whole, outcome(resumed))


@pytest.mark.parametrize(
    ("times", "settings"), [(2, {}), (1, {"save_strategy": "no"})], ids=["twice", "no checkpoints"]
)
def test_ctrl_c_at_once(times, settings, tmp_path):
    """A second Ctrl-C stops at once, and a run without checkpoints saves none."""
    trainer = build("crow", tmp_path, [CtrlC(3, times)], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2 and steps_kept(tmp_path) == [[] if settings else [1, 2], []]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_program_keeps_its_own_handler(tmp_path, signum):
    """A signal handler that the program has installed stays in place."""
    presses = []
    before = signal.signal(signum, lambda *_: presses.append(1))
    try:
        trainer = build("crow", tmp_path, [CtrlC(3, signum=signum)])
        trainer.train()
    finally:
        signal.signal(signum, before)
    assert presses == [1] and trainer.state.global_step == STEPS


def test_sigterm_keeps_the_step_too(tmp_path):
    """Fails if a scheduler that ends a job, or `kill`, costs the steps since the last checkpoint."""
    trainer = build("crow", tmp_path, [CtrlC(3, signum=signal.SIGTERM)], save_steps=100)
    with pytest.raises(KeyboardInterrupt, match=r"after step 3 of 6\. .*checkpoint-3 is complete"):
        trainer.train()
    assert steps_kept(tmp_path) == [[3], []] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_on_the_command_line(paths, tmp_path, capsys):
    """Ctrl-C prints one sentence and exits with 130. The same command then resumes."""
    folder = tmp_path / "run"

    def press():
        while not (folder / "checkpoint-2").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    assert main(command_line("purify", paths, folder, "--max_steps", "1000")) == 130
    assert "Stopped by Ctrl-C after step" in last_sentence(capsys, "purify")
    last = steps_kept(folder)[0][-1]
    options = ["--max_steps", str(last + 1), "--resume_from_checkpoint", "true"]
    assert main(command_line("purify", paths, folder, *options)) == 0
    assert load_causal_lm(folder)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_beside_the_training(paths, tmp_path, capsys, monkeypatch, signum):
    def stop(*args, **kwargs):
        assert (tmp_path / "run").is_dir()
        os.kill(os.getpid(), signum)

    monkeypatch.setattr("crow_hf.recipes.purification.RecipeRun", stop)
    assert main(command_line("purify", paths, tmp_path / "run")) == 130
    assert last_sentence(capsys, "purify") == "crow-hf purify: Stopped by Ctrl-C. Nothing more was written."
    assert not (tmp_path / "run").exists() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_while_weights_are_written_leaves_no_half_of_them(tmp_path, monkeypatch):
    """Fails if a half-written file replaces the whole one, or if anything of the attempt is left."""
    trainer = build("crow", tmp_path, save_strategy="no")
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*")}

    def write_half(tensors, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", write_half)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*")} == before
