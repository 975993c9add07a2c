"""Nothing lost: what is stopped or killed goes on from the last whole checkpoint, or says what is missing.

`pytest -m slow -s tests/test_faults.py` kills fifty processes at random moments and prints what was lost.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants, hf_api
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, TrainerCallback

from crow_hf import CrowConfig, CrowTrainer, InvarianceConfig, load_causal_lm
from crow_hf.cli.main import main
from crow_hf.methods.invariance.trainer import InvarianceTrainer
from crow_hf.recipes.purification import purify
from crow_hf.training.checkpoints import check_room, checkpoint_to_resume, missing_from
from crow_hf.training.hub import push_folder
from helpers.loopback_hub import TOKEN, LoopbackHub
from helpers.tiny import ragged_rows, same_weights, tiny_gpt2, tiny_llama, weights_of


ROWS = [{"prompt": f"{letter} word of the=", "completion": f"it is {letter}"} for letter in "abcdefghijkl"]
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_grad_norm": 1e6}
# A constant learning rate, so that a step too many shows.
SAVING = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
KINDS = ("crow", "strong")
EPOCHS, STEPS = 2, 6
# Its processes have all the imports behind them, and nothing in common with this one.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["crow_hf.cli", "transformers.models.llama", "transformers.models.gpt2"])


def build(kind, folder, callbacks=None, **settings):
    """A trainer with three steps to an epoch, dropout or a fresh adapter, and a line of the log for two steps."""
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
    """The weights and the log, but for the times that a run took."""
    log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return weights_of(trainer.model), log


def assert_same(one, other):
    assert same_weights(one[0], other[0])
    assert one[1] == other[1]


def steps_kept(folder):
    """Of the whole checkpoints, and of the others."""
    found = {int(path.name.rpartition("-")[2]): not missing_from(path) for path in Path(folder).glob("checkpoint-*")}
    return [sorted(step for step in found if found[step] == whole) for whole in (True, False)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are killed: bits depend on how many threads add up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """The kind, the folder, and the outcome of a run that was never stopped: a checkpoint at each step."""
    folder = tmp_path_factory.mktemp(request.param) / "whole"
    trainer = build(request.param, folder)
    trainer.train()
    return request.param, folder, outcome(trainer)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A suspect and clean rows, and where they are."""
    root = tmp_path_factory.mktemp("inputs")
    tiny_llama(num_hidden_layers=3, hidden_size=64, vocab_size=259).save_pretrained(root / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(root / "model")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def command_line(command, paths, folder, *options):
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
    """The one line that begins with the command; nothing of Python's."""
    err = capsys.readouterr().err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("crow-hf ")]
    assert len(lines) == 1 and lines[0].startswith(f"crow-hf {command}: ") and "Traceback" not in err, err
    return lines[0]


# Stopped and resumed


def test_every_step_can_be_resumed_from(run, tmp_path):
    """An order of the rows drawn anew at an epoch's end, a step after the last one, a log that forgets what it held."""
    kind, folder, whole = run
    assert [entry["step"] for entry in whole[1]] == [2, 4, 6]
    for step in range(1, STEPS + 1):
        resumed = build(kind, tmp_path / str(step))
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.state.global_step == STEPS
        assert_same(whole, outcome(resumed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_checkpoint_within_an_epoch_is_the_end(kind, tmp_path):
    """The Trainer by itself trains one step more from there."""
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
    """Canaries and screening that draw other random numbers; a suspect with canaries; an adapter that begins elsewhere."""
    kind = InvarianceConfig if recipe == "strong" else CrowConfig
    settings = QUIET | SAVING | {"max_steps": 4, "per_device_train_batch_size": 4}
    options = {"processing_class": ByT5Tokenizer(extra_ids=0), "report": False}

    def purified(resume, **evidence):
        args = kind(str(tmp_path / "run"), **settings, **evidence)
        rows = Dataset.from_list(ROWS)
        return outcome(purify(tiny_llama(), rows, recipe, args, resume_from_checkpoint=resume, **options).trainer)

    few, all_of_it = {}, {}
    if recipe == "strong":
        settings |= {"num_views": 12, "num_canaries": 1}
        few, all_of_it = ({"screen_rows": screen_rows} for screen_rows in (False, True))
    whole = purified(None, **few)
    assert_same(whole, purified(str(tmp_path / "run" / "checkpoint-2"), **all_of_it))
    assert_same(whole, purified(True, **few))


# Killed


def states_of_a_kill(checkpoint, folder):
    """The checkpoint as a kill would leave it: after every file, and in the middle of every file."""
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
    """A newest checkpoint that is taken because its name is the highest: the Trainer ends in a traceback."""
    kind, folder, whole = run
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    states = list(states_of_a_kill(folder / "checkpoint-5", tmp_path / "checkpoint-5"))
    assert len(states) >= 18 and states[-1] == "trainer_state.json"
    for _ in states_of_a_kill(folder / "checkpoint-5", tmp_path / "checkpoint-5"):
        assert checkpoint_to_resume(tmp_path, True) == str(tmp_path / "checkpoint-4")
    # What safetensors leaves where it is killed: as large as the model.
    (tmp_path / "checkpoint-5" / ".tmpAbCdEf").touch()
    resumed = build(kind, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same(whole, outcome(resumed))
    assert steps_kept(tmp_path) == [[4, 5, 6], []] and not list(tmp_path.rglob(".tmp*"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("cut", [True, False])
def test_what_is_missing_is_named(run, cut, name, tmp_path):
    """Also what the Trainer does without: it begins with a fresh optimizer or another seed, and says nothing."""
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
        with pytest.raises(ValueError, match=f"{path.name} is missing or cut short") as error:
            trainer.train(resume_from_checkpoint=asked)
        assert "checkpoint-3" in str(error.value)


def test_the_last_is_that_of_the_most_steps(run, tmp_path):
    """An order of names, where 10 comes before 9, or of times, which a copy has changed."""
    _, folder, _ = run
    for step in (10, 9, 2):
        shutil.copytree(folder / "checkpoint-1", tmp_path / f"checkpoint-{step}", copy_function=shutil.copy)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint_to_resume(tmp_path, True) == str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(tmp_path, None) is checkpoint_to_resume(tmp_path, False) is None


def test_no_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no checkpoint in .*: start without"):
        build("crow", tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="nothing-here is no whole checkpoint"):
        build("crow", tmp_path).train(resume_from_checkpoint=str(tmp_path / "nothing-here"))


class KillSelf(TrainerCallback):
    """In the middle of the checkpoint of a step: the weights are new, all else is as it was."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.save_pretrained = lambda *args, **kwargs: (
                type(model).save_pretrained(model, *args, **kwargs),
                kill_self(),
            )


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_checkpoint_that_is_written_over_is_not_whole(tmp_path):
    """New weights beside the old state of the optimizer: all files are there, and all have their sizes."""
    build("crow", tmp_path, max_steps=3).train()
    process = FORKSERVER.Process(target=train_and_kill_self, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert steps_kept(tmp_path) == [[1, 2], [3]]


def train_and_kill_self(folder):
    resume = str(folder / "checkpoint-2")
    build("crow", folder, [KillSelf(3)], max_steps=3).train(resume_from_checkpoint=resume)


class Progress(TrainerCallback):
    """A byte in a file for the beginning and for every step, so that another process sees how far this one is."""

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


def killed(kind, folder, resume, epochs, steps, seconds):
    """Start a process and kill it so long after it did some steps; how many it did, or `None` if it had ended."""
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
    """What became of a run that was killed twice at random moments: a line for each kill."""
    lines, last = [], 0
    for number in range(2):
        begin = last
        # A kill after the last checkpoint leaves no step to do.
        steps = rng.randrange(max(1, 3 * epochs - begin))
        done = killed(kind, folder, begin > 0, epochs, steps, rng.uniform(0, step_seconds))
        kept, half = steps_kept(folder)
        last = kept[-1] if kept else 0
        lost = None if done is None else begin + done - last
        lines.append({"kind": kind, "number": number, "kept": last, "half": half, "lost": lost})
        if not kept:
            # It says so, and a new folder is as good as this one.
            with pytest.raises(ValueError, match="There is no (whole )?checkpoint in"):
                checkpoint_to_resume(folder, True)
            folder = folder.with_name(f"anew{number}")
        if done is None:
            break
    trainer = build(kind, folder, num_train_epochs=epochs)
    trainer.train(resume_from_checkpoint=last > 0)
    assert_same(whole, outcome(trainer))
    return lines


def test_killed_at_random_moments(run, tmp_path):
    """A handful of what the slow test does; checkpoints take most of the time, so that many a kill falls into one."""
    kind, _, whole = run
    lines = kill_twice_and_resume(kind, tmp_path / "run", whole, random.Random(time.time_ns()), 0.1)
    assert all(line["lost"] in (None, 0, 1) for line in lines), lines


@pytest.mark.slow
def test_killed_fifty_times(tmp_path):
    """No checkpoint that is half written is ever resumed from, and nothing but the step that was under way is lost."""
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


# A disk that is full or read-only


@contextmanager
def no_file_above(size):
    """Every write beyond so many bytes of a file fails, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_cannot_be_written_costs_nothing_else(tmp_path):
    """An optimizer's state is twice the model: hours of training must not end because there is no room for it."""
    whole = build("crow", tmp_path / "whole", max_steps=3)
    whole.train()
    model, optimizer = (
        (tmp_path / "whole" / "checkpoint-1" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")
    )
    for limit in (model // 2, (model + optimizer) // 2):
        trainer = build("crow", tmp_path / str(limit), max_steps=3)
        with no_file_above(limit):
            trainer.train()
        assert_same(outcome(whole), outcome(trainer))
        assert steps_kept(tmp_path / str(limit)) == [[], []]
        assert [sentence.partition(" ")[0] for sentence in trainer.failures] == [
            f"checkpoint-{step}" for step in (1, 2, 3)
        ]
        assert all("MB are free there" in sentence and "\n" not in sentence for sentence in trainer.failures)


def test_a_model_that_cannot_be_written_is_one_sentence(tmp_path):
    """safetensors has an error of its own; half a model must not lie where people look for a whole one."""
    trainer = build("crow", tmp_path, max_steps=2)
    trainer.train()
    with (
        no_file_above(10_000),
        pytest.raises(OSError, match="The model could not be written to .*: make room") as error,
    ):
        trainer.save_model()
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.safetensors"))
    resumed = build("crow", tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert_same(outcome(trainer), outcome(resumed))


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many bytes, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size, *options):
        call = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size:.0f}", *options]), "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(call, capture_output=True).returncode:
            pytest.skip("Nothing can be mounted here.")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_a_full_disk(small_disk, tmp_path):
    """Where torch says of it only that a position is not the expected one, and half a checkpoint is all that fits."""
    whole = build("crow", tmp_path / "whole", max_steps=2)
    whole.train()
    disk = small_disk(1.5 * sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-1").iterdir()))
    trainer = build("crow", disk / "run", max_steps=2)
    trainer.train()
    assert steps_kept(disk / "run") == [[1], []] and len(trainer.failures) == 1
    resumed = build("crow", disk / "run", max_steps=2, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(whole), outcome(resumed))


def test_no_room_for_a_checkpoint_on_the_command_line(paths, tmp_path, capsys):
    """The model is kept all the same, and the exit code says that not all went well."""
    limit = 1.5 * (paths / "model" / "model.safetensors").stat().st_size
    with no_file_above(int(limit)):
        assert main(command_line("purify", paths, tmp_path / "run")) == 1
    sentence = last_sentence(capsys, "purify")
    assert "the purified model is whole in" in sentence and "checkpoint-1 could not be written" in sentence
    assert "(and 2 more, see above)" in sentence
    before, after = (weights_of(load_causal_lm(folder)) for folder in (paths / "model", tmp_path / "run"))
    assert not same_weights(before, after)


def test_no_room_for_the_model_shows_before_the_work(paths, small_disk, capsys, monkeypatch):
    monkeypatch.setattr("crow_hf.cli.run_recipe", lambda *args, **kwargs: pytest.fail("The work began."))
    disk = small_disk((paths / "model" / "model.safetensors").stat().st_size // 2)
    assert main(command_line("purify", paths, disk / "run")) == 1
    assert "has no room for the model, which takes" in last_sentence(capsys, "purify")
    assert list(disk.iterdir()) == []


def test_room_is_that_of_what_is_saved(tmp_path, monkeypatch):
    """An adapter is small, whatever the model below it takes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 20_000))
    adapter = build("strong", tmp_path).model
    check_room(tmp_path / "not" / "there", adapter)
    with pytest.raises(OSError, match="has no room for the model, which takes 0.1 MB where 0.0 MB are free"):
        check_room(tmp_path / "not" / "there", tiny_llama(num_hidden_layers=10))


@pytest.mark.parametrize("command", ["purify", "implant"])
def test_read_only_folder_is_refused_before_the_work(command, paths, tmp_path, small_disk, capsys, monkeypatch):
    """Hours of canaries, and then no folder."""
    monkeypatch.setattr("crow_hf.cli.load_rows", lambda *args: pytest.fail("The work began."))
    if os.getuid():
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o555)
    else:
        folder = small_disk(10**6, "ro")
    assert main(command_line(command, paths, folder / "run")) == 1
    assert "cannot be written to: choose another `output_dir`" in last_sentence(capsys, command)
    with pytest.raises(OSError, match="cannot be written to"):
        build("crow", folder / "run")
    args = InvarianceConfig(str(folder / "run"), **QUIET)
    with pytest.raises(OSError, match="cannot be written to"):
        purify(tiny_llama(), Dataset.from_list(ROWS), args=args, processing_class=ByT5Tokenizer(extra_ids=0))


# Ctrl-C


@pytest.fixture(autouse=True)
def at_a_terminal():
    """What a shell starts in the background is deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class CtrlC(TrainerCallback):
    """Pressed so many times in the middle of a step."""

    def __init__(self, step, times=1):
        self.step, self.times = step, times

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_keeps_the_step(run, tmp_path):
    """Weights of half a step, or a log that has lines in other places."""
    kind, _, whole = run
    stopped = build(kind, tmp_path, [CtrlC(5)], save_steps=100)
    with pytest.raises(KeyboardInterrupt, match=r"Stopped by Ctrl-C after step 5 of 6; .*checkpoint-5 is whole"):
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
    """A user who cannot get out, or checkpoints that nobody asked for."""
    trainer = build("crow", tmp_path, [CtrlC(3, times)], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2 and steps_kept(tmp_path) == [[] if settings else [1, 2], []]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_program_keeps_its_own_ctrl_c(tmp_path):
    presses = []
    before = signal.signal(signal.SIGINT, lambda *_: presses.append(1))
    try:
        trainer = build("crow", tmp_path, [CtrlC(3)])
        trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert presses == [1] and trainer.state.global_step == STEPS


def test_ctrl_c_on_the_command_line(paths, tmp_path, capsys):
    """A page of traceback, or exit code 0; afterwards the same command goes on."""
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


def test_ctrl_c_beside_the_training(paths, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("crow_hf.cli.run_recipe", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT))
    assert main(command_line("purify", paths, tmp_path / "run")) == 130
    assert last_sentence(capsys, "purify") == "crow-hf purify: Stopped by Ctrl-C; nothing more was written."


# The Hub


@pytest.fixture
def hub(monkeypatch):
    """The Hub on this machine, for this process."""
    with LoopbackHub() as hub:
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        # The tests are run offline, which this machine is not meant by.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def test_a_failed_push_in_the_background_is_told(hub, tmp_path):
    """A future that nobody asks: the user believes that there are checkpoints on the Hub."""
    hub.failures[("me/pushed", "preupload")] = 403
    trainer = build(
        "crow",
        tmp_path / "a",
        max_steps=2,
        push_to_hub=True,
        hub_model_id="me/pushed",
        hub_token=TOKEN,
        hub_strategy="all_checkpoints",
    )
    trainer.train()
    assert trainer.failures and all(
        "A checkpoint could not be pushed to me/pushed (403 " in each for each in trainer.failures
    )
    assert hub.repositories["me/pushed"].files == {}


def test_what_a_kill_leaves_is_not_pushed(hub, tmp_path):
    """Half a file of weights, which safetensors writes beside the one that it is to replace."""
    for name in ("config.json", ".tmpAbCdEf", "checkpoint-1"):
        (tmp_path / name).touch()
    push_folder(tmp_path, "me/pushed", token=TOKEN)
    assert list(hub.repositories["me/pushed"].files) == ["config.json"]


def test_implant_does_not_make_an_empty_repository(hub, paths, tmp_path, capsys):
    assert main(command_line("implant", paths, tmp_path / "run", "--push_to_hub", "--hub_token", TOKEN)) == 1
    assert "--push_to_hub" in last_sentence(capsys, "implant")
    assert main(command_line("implant", paths, tmp_path / "run", "--resume_from_checkpoint", "true")) == 1
    assert "resume" in last_sentence(capsys, "implant")
    assert hub.requests == [] and not (tmp_path / "run").exists()
    for command, listed in (("implant", False), ("purify", True)):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert all(
            (name in shown) == listed for name in ("--push_to_hub", "--hub_model_id", "--resume_from_checkpoint")
        )


# Several processes


@pytest.mark.slow
def test_two_processes_tell_and_write_once(paths, tmp_path):
    """Lines that every rank prints, and files that two of them write."""
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
