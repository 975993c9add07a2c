"""Tests of checkpoints: a run that is stopped or killed resumes from the last complete one with identical results.

`pytest -m slow -s tests/training/test_checkpoints.py` kills fifty processes at random and prints what was lost.
"""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from crow_hf import CrowConfig, InvarianceConfig
from crow_hf.recipes.purification import purify
from crow_hf.training.checkpoints import checkpoint_to_resume
from helpers.checkpoints import (
    EPOCHS,
    KINDS,
    QUIET,
    ROWS,
    SAVING,
    STEPS,
    assert_same,
    build,
    command_line,
    outcome,
    steps_kept,
    train_and_kill_self,
    train_in_a_process,
)
from helpers.tiny import same_weights, tiny_llama, weights_of


pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")
# Processes of the forkserver start with all imports done, and share nothing with this process.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["crow_hf.cli.main", "crow_hf.recipes.purification", "transformers.models.llama", "transformers.models.gpt2"]
)


def test_every_step_can_be_resumed_from(run, tmp_path):
    """
    Fails if resuming reshuffles the rows at the end of an epoch, trains one step too many, or forgets values that are
    not logged yet.
    """
    kind, folder, whole = run
    assert [entry["step"] for entry in whole[1]] == [2, 4, 6]
    for step in range(1, STEPS + 1):
        resumed = build(kind, tmp_path / str(step))
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.state.global_step == STEPS
        assert_same(whole, outcome(resumed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_checkpoint_within_an_epoch_is_the_end(kind, tmp_path):
    """Resuming from the last checkpoint trains no further step. The Trainer itself would train one more."""
    whole = build(kind, tmp_path, max_steps=2)
    whole.train()
    resumed = build(kind, tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert_same(outcome(whole), outcome(resumed))


def test_two_runs_with_one_seed_are_bit_equal(run, tmp_path):
    kind, _, whole = run
    again = build(kind, tmp_path)
    again.train()
    assert_same(whole, outcome(again))
    other = build(kind, tmp_path / "other", seed=1)
    other.train()
    assert not same_weights(whole[0], weights_of(other.model))


@pytest.mark.parametrize("recipe", ["strong", "paper"])
def test_purify_resumes_as_if_never_stopped(recipe, tmp_path):
    """
    Fails if canaries and screening draw other random numbers, if the suspect contains canaries, or if the adapter
    starts elsewhere.
    """
    kind = InvarianceConfig if recipe == "strong" else CrowConfig
    # A finished run keeps no checkpoints unless it is told how many.
    settings = QUIET | SAVING | {"max_steps": 4, "per_device_train_batch_size": 4, "save_total_limit": 4}
    options = {"processing_class": ByT5Tokenizer(extra_ids=0), "merge": False}

    def purified(resume, **evidence):
        args = kind(str(tmp_path / "run"), **settings, **evidence)
        rows = Dataset.from_list(ROWS)
        return outcome(purify(tiny_llama(), rows, recipe, args, resume_from_checkpoint=resume, **options).trainer)

    few, all_of_it = {}, {}
    if recipe == "strong":
        settings |= {"num_views": 12, "num_canaries": 1, "num_written_rows": 2}
        few, all_of_it = ({"screen_rows": screen_rows} for screen_rows in (False, True))
    whole = purified(None, **few)
    assert_same(whole, purified(str(tmp_path / "run" / "checkpoint-2"), **all_of_it))
    assert_same(whole, purified(True, **few))


def states_of_a_kill(checkpoint, folder):
    """Yield every state of the checkpoint that a kill can leave: after each file and in the middle of each file."""
    files = sorted(
        (path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns
    )
    for count, torn in enumerate(files):
        for share in (None, 0, 0.5):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for path in files[:count]:
                shutil.copy2(path, folder / path.name)
            if share is not None:
                content = torn.read_bytes()
                (folder / torn.name).write_bytes(content[: int(share * len(content))])
            yield torn.name


def test_half_a_checkpoint_is_passed_over(run, tmp_path, caplog):
    """
    Fails if the newest checkpoint is used only because its number is the highest. The Trainer would end in a
    traceback.
    """
    kind, folder, whole = run
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    states = list(states_of_a_kill(folder / "checkpoint-5", tmp_path / "checkpoint-5"))
    assert len(states) >= 18 and states[-1] == "trainer_state.json"
    for _ in states_of_a_kill(folder / "checkpoint-5", tmp_path / "checkpoint-5"):
        assert checkpoint_to_resume(tmp_path, True) == str(tmp_path / "checkpoint-4")
    # safetensors leaves such a file, as large as the model, if it is killed.
    (tmp_path / "checkpoint-5" / ".tmpAbCdEf").touch()
    resumed = build(kind, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same(whole, outcome(resumed))
    assert steps_kept(tmp_path) == [[4, 5, 6], []] and not list(tmp_path.rglob(".tmp*"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("cut", [True, False])
def test_what_is_missing_is_named(run, cut, name, tmp_path):
    """
    Also checks files that the Trainer does without. It would silently start with a new optimizer or another seed.
    """
    kind, folder, _ = run
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(folder / "checkpoint-3", checkpoint)
    path = next(checkpoint.glob(name.replace("model", "*model")))
    if cut:
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    trainer = build(kind, tmp_path)
    for asked in (True, str(checkpoint)):
        with pytest.raises(ValueError, match=f"{path.name} is missing or truncated") as error:
            trainer.train(resume_from_checkpoint=asked)
        assert "checkpoint-3" in str(error.value)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("code-ran",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_pickles_of_others_are_refused(run, name, protocol, tmp_path, monkeypatch):
    """Fails if only torch's guard stands between a checkpoint and its code."""
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(run[1] / "checkpoint-3", checkpoint)
    assert checkpoint_to_resume(tmp_path, True) == str(checkpoint)
    if protocol is None:
        (checkpoint / name).write_bytes(pickle.dumps({"state": Code()}))
    else:
        torch.save({"state": Code()}, checkpoint / name, pickle_protocol=protocol)
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    record["files"] |= {name: (checkpoint / name).stat().st_size}
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))
    for asked in (True, str(checkpoint)):
        with pytest.raises(ValueError, match=rf"^{name} of .* (cannot be read|would run code \(\w+\.mkdir\))"):
            checkpoint_to_resume(tmp_path, asked)
    assert not (tmp_path / "code-ran").exists()


def test_the_last_is_that_of_the_most_steps(run, tmp_path):
    """Fails if checkpoints are sorted by name, where 10 comes before 9, or by time, which a copy changes."""
    _, folder, _ = run
    for step in (10, 9, 2):
        shutil.copytree(folder / "checkpoint-1", tmp_path / f"checkpoint-{step}", copy_function=shutil.copy)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint_to_resume(tmp_path, True) == str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(tmp_path, None) is checkpoint_to_resume(tmp_path, False) is None


def test_no_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"There is no checkpoint in .*\. Start without"):
        build("crow", tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="nothing-here is not a complete checkpoint"):
        build("crow", tmp_path).train(resume_from_checkpoint=str(tmp_path / "nothing-here"))


def test_a_checkpoint_that_is_written_over_is_not_whole(tmp_path):
    """
    A checkpoint with new weights and an old optimizer state is incomplete, although all files are there with the right
    sizes.
    """
    build("crow", tmp_path, max_steps=3).train()
    process = FORKSERVER.Process(target=train_and_kill_self, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert steps_kept(tmp_path) == [[1, 2], [3]]


def killed(kind, folder, resume, epochs, steps, seconds):
    """
    Start a process and kill it `seconds` after it did `steps` steps. Return the number of its steps, or `None` if it
    had ended.
    """
    progress = folder.with_name("progress")
    progress.unlink(missing_ok=True)
    process = FORKSERVER.Process(target=train_in_a_process, args=(kind, folder, resume, epochs))
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and (not progress.exists() or progress.stat().st_size <= steps):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    process.join()
    return progress.stat().st_size - 1 if process.exitcode == -signal.SIGKILL else None


def kill_twice_and_resume(kind, folder, whole, rng, step_seconds, epochs=EPOCHS):
    """Kill a run twice at random moments and check that resuming gives the same result. Return one line per kill."""
    lines, last = [], 0
    for number in range(2):
        begin = last
        # After a kill that followed the last checkpoint, no step is left.
        steps = rng.randrange(max(1, 3 * epochs - begin))
        done = killed(kind, folder, begin > 0, epochs, steps, rng.uniform(0, step_seconds))
        kept, half = steps_kept(folder)
        last = kept[-1] if kept else 0
        lost = None if done is None else begin + done - last
        lines.append({"kind": kind, "number": number, "kept": last, "half": half, "lost": lost})
        if not kept:
            # Resuming is refused, and the run starts again in a new folder.
            with pytest.raises(ValueError, match="There is no (complete )?checkpoint in"):
                checkpoint_to_resume(folder, True)
            folder = folder.with_name(f"anew{number}")
        if done is None:
            break
    trainer = build(kind, folder, num_train_epochs=epochs)
    trainer.train(resume_from_checkpoint=last > 0)
    assert_same(whole, outcome(trainer))
    return lines


def test_killed_at_random_moments(run, tmp_path):
    """A short version of the slow test. Checkpoints take most of the time, so many kills hit one."""
    kind, _, whole = run
    lines = kill_twice_and_resume(kind, tmp_path / "run", whole, random.Random(time.time_ns()), 0.1)
    assert all(line["lost"] in (None, 0, 1) for line in lines), lines


@pytest.mark.slow
def test_killed_fifty_times(tmp_path):
    """Fails if a run resumes from a partial checkpoint, or if a kill costs more than the current step."""
    seed, epochs = time.time_ns(), 3
    rng, table = random.Random(seed), [f"seed {seed}", ""]
    table.append("| trainer | killed in | times | checkpoint left | half-written left too | most steps lost |")
    table.append("|---|---|---:|---:|---:|---:|")
    for kind in KINDS:
        trainer = build(kind, tmp_path / kind, num_train_epochs=epochs)
        begin = time.monotonic()
        trainer.train()
        step_seconds, whole = (time.monotonic() - begin) / (3 * epochs), outcome(trainer)
        lines, number = [], 0
        while sum(line["lost"] is not None for line in lines) < 25:
            number += 1
            folder = tmp_path / f"{kind}{number}" / "run"
            folder.parent.mkdir()
            lines += kill_twice_and_resume(kind, folder, whole, rng, step_seconds, epochs)
            shutil.rmtree(folder.parent)
        for number, name in enumerate(("its first run", "the resumed run")):
            some = [line for line in lines if line["number"] == number and line["lost"] is not None]
            kept, half = (sum(bool(line[what]) for line in some) for what in ("kept", "half"))
            lost = max(line["lost"] for line in some)
            table.append(f"| {kind} | {name} | {len(some)} | {kept} | {half} | {lost} |")
            assert lost <= 1
    sys.stdout.write("\n".join(["", *table, ""]))


@pytest.mark.slow
def test_two_processes_tell_and_write_once(paths, tmp_path):
    """Fails if several ranks print the same line or write the same file."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    call = [*launcher, "-m", "crow_hf", *command_line("purify", paths, tmp_path / "run")]
    process = subprocess.run(
        call, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("The purified model is in") == 1
    assert steps_kept(tmp_path / "run") == [[1, 2, 3], []]
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["run"]["processes"] == 2
    assert load_file(tmp_path / "run" / "model.safetensors")
