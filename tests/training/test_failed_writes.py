"""Tests of failed writes and pushes: full and read-only disks, and a Hub that refuses."""

import os
import resource
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from datasets import Dataset
from huggingface_hub import constants, hf_api
from transformers import ByT5Tokenizer

from crow_hf import InvarianceConfig, load_causal_lm
from crow_hf.cli.main import main
from crow_hf.recipes.purification import purify
from crow_hf.training.checkpoints import check_writable
from crow_hf.training.hub import push_folder
from helpers.checkpoints import QUIET, ROWS, assert_same, build, command_line, last_sentence, outcome, steps_kept
from helpers.loopback_hub import TOKEN, LoopbackHub
from helpers.tiny import same_weights, tiny_llama, weights_of


pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@contextmanager
def no_file_above(size):
    """Make every write beyond `size` bytes of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_cannot_be_written_costs_nothing_else(tmp_path):
    """Training continues if there is no space for a checkpoint. The optimizer state is twice as large as the model."""
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
    """Checks the error, which safetensors raises as its own type, and that no partial model is left in the folder."""
    trainer = build("crow", tmp_path, max_steps=2)
    trainer.train()
    with (
        no_file_above(10_000),
        pytest.raises(OSError, match="The model could not be written to .*: free some space") as error,
    ):
        trainer.save_model()
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.safetensors"))
    resumed = build("crow", tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert_same(outcome(trainer), outcome(resumed))


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of a given size in bytes, where that is allowed."""
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
    """
    Training goes on if only half a checkpoint fits. The error of torch does not mention the disk, only an unexpected
    position.
    """
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
    """The model is still saved, and the exit code reports the failed checkpoints."""
    limit = 1.5 * (paths / "model" / "model.safetensors").stat().st_size
    with no_file_above(int(limit)):
        assert main(command_line("purify", paths, tmp_path / "run")) == 1
    sentence = last_sentence(capsys, "purify")
    assert "the purified model is complete in" in sentence and "checkpoint-1 could not be written" in sentence
    assert "(and 2 more, see above)" in sentence
    before, after = (weights_of(load_causal_lm(folder)) for folder in (paths / "model", tmp_path / "run"))
    assert not same_weights(before, after)


def test_no_room_for_the_model_shows_before_the_work(paths, small_disk, capsys, monkeypatch):
    monkeypatch.setattr(
        "crow_hf.recipes.purification.RecipeRun", lambda *args, **kwargs: pytest.fail("The work began.")
    )
    disk = small_disk((paths / "model" / "model.safetensors").stat().st_size // 2)
    assert main(command_line("purify", paths, disk / "run")) == 1
    assert "has too little free space for the model: it needs" in last_sentence(capsys, "purify")
    assert list(disk.iterdir()) == []


def test_room_is_that_of_what_is_saved(tmp_path, monkeypatch):
    """Only the adapter counts for a `PeftModel`, whatever the size of its base model."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 20_000))
    adapter = build("invariance", tmp_path).model
    check_writable(tmp_path / "not" / "there", adapter)
    with pytest.raises(OSError, match="has too little free space for the model: it needs 0.1 MB and 0.0 MB are free"):
        check_writable(tmp_path / "not" / "there", tiny_llama(num_hidden_layers=10))


@pytest.mark.parametrize("command", ["purify", "implant"])
def test_read_only_folder_is_refused_before_the_work(command, paths, tmp_path, small_disk, capsys, monkeypatch):
    """Fails if a read-only folder is noticed only after work has been done."""
    monkeypatch.setattr(f"crow_hf.cli.commands.{command}.load_rows", lambda *args: pytest.fail("The work began."))
    if os.getuid():
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o555)
    else:
        folder = small_disk(10**6, "ro")
    assert main(command_line(command, paths, folder / "run")) == 1
    assert "is not writable. Choose another `--output_dir`" in last_sentence(capsys, command)
    with pytest.raises(OSError, match="is not writable"):
        build("crow", folder / "run")
    args = InvarianceConfig(str(folder / "run"), **QUIET)
    with pytest.raises(OSError, match="is not writable"):
        purify(tiny_llama(), Dataset.from_list(ROWS), args=args, processing_class=ByT5Tokenizer(extra_ids=0))


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, for this process."""
    with LoopbackHub() as hub:
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        # The tests run offline, but this Hub is on this machine.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def test_a_failed_push_in_the_background_is_told(hub, tmp_path):
    """Fails if nobody asks for the result of a push in the background and its error is lost."""
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
    """The partial file that safetensors writes next to the old weights is not pushed."""
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
