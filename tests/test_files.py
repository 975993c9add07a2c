"""Files are written whole or not at all, and one run at a time writes to a folder."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from crow_hf.files import (
    _free,
    check_regular,
    claim,
    flush,
    is_unused,
    leads_outside,
    own_claims,
    temporary_folder,
    whole_files,
    write_text,
)


def test_file_is_written_whole_or_not_at_all(tmp_path):
    """A lone surrogate fails half-way: the old file must stay."""
    path = tmp_path / "results.json"
    write_text(path, "old é")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 100_000 + "\ud800")
    assert path.read_text(encoding="utf-8") == "old é"


def test_files_are_moved_once_they_are_whole_and_flushed(tmp_path, monkeypatch):
    """Fails if a loss of power can leave a name without its content, or weights beside files that are missing."""
    done = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: done.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
    )
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(("move", Path(new).name)), replace(old, new)))
    with whole_files(tmp_path / "m") as folder:
        for name in ("model.safetensors", "tokenizer.json", "templates/a.jinja"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        assert not any(path.is_file() for path in (tmp_path / "m").iterdir())
    kinds = [kind for kind, _ in done]
    assert kinds == ["flush"] * 3 + ["move"] * 3 + ["flush"]
    assert done[5] == ("move", "model.safetensors") and done[6] == ("flush", str(tmp_path / "m"))
    files = {path.relative_to(tmp_path / "m").as_posix() for path in (tmp_path / "m").rglob("*") if path.is_file()}
    assert files == {"model.safetensors", "tokenizer.json", "templates/a.jinja"}


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_files(tmp_path) as folder:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_claim_leaves_no_litter(tmp_path):
    """Fails if a lock, or a folder that was made for it alone, is left, or if a folder with files is removed."""
    with own_claims():
        claim(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir() and is_unused(tmp_path / "a" / "b")
        # As a recipe within a command does.
        with own_claims():
            claim(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    with own_claims():
        claim(tmp_path)
        (tmp_path / "model").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and not is_unused(tmp_path)


def test_of_the_processes_of_a_run_the_first_claims_the_folder(tmp_path, monkeypatch):
    """Fails if a run in several processes keeps itself out."""
    with own_claims(), ThreadPoolExecutor() as pool:
        claim(tmp_path)
        with pytest.raises(ValueError, match="Another run is writing"):
            pool.submit(claim, tmp_path).result()
        monkeypatch.setenv("RANK", "1")
        pool.submit(claim, tmp_path).result()


def test_what_a_killed_run_left_unfinished_is_no_use(tmp_path):
    (tmp_path / ".unfinished-abc").mkdir()
    (tmp_path / ".lock").touch()
    assert is_unused(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert not is_unused(tmp_path)


@pytest.mark.parametrize("name", ["nt", "posix"])
def test_windows_flushes_what_may_be_written_and_removes_what_is_closed(name, tmp_path, monkeypatch):
    """Fails if Windows refuses to flush a file, or if a lock that is free can be claimed before it is removed."""
    flags = []
    opened = lambda path, flag: (flags.append(flag), os.open(path, flag))[1]  # noqa: E731
    monkeypatch.setattr("crow_hf.files.os", SimpleNamespace(**vars(os) | {"name": name, "open": opened}))
    lock, was_there = tmp_path / ".lock", []
    lock.touch()
    flush(lock)
    assert flags == [os.O_RDWR if name == "nt" else os.O_RDONLY]
    _free(SimpleNamespace(lock_file=str(lock), release=lambda: was_there.append(lock.exists())), [])
    assert was_there[0] is (name == "nt") and not lock.exists()


def test_links_of_a_snapshot_lead_to_its_blobs(tmp_path):
    """Fails if a model in a subfolder of a repository is refused, or if a link to another repository is followed."""
    folder = tmp_path / "models--me--a" / "snapshots" / "abc" / "sub"
    folder.mkdir(parents=True)
    for blobs, is_outside in ((tmp_path / "models--me--a" / "blobs", False), (tmp_path / "blobs", True)):
        blobs.mkdir()
        (blobs / "1").touch()
        for place in (folder, folder.parent):
            (place / blobs.parent.name).symlink_to(blobs / "1")
            assert leads_outside(place / blobs.parent.name, place) is is_outside


def test_a_full_disk_of_temporary_files_is_named(tmp_path, monkeypatch):
    """Fails if the model is blamed, whose files were written there."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    full = ValueError("The model could not be saved (No space left on device)")
    with pytest.raises(ValueError) as told, temporary_folder():
        raise full
    assert told.value is full
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=f"temporary files, {tmp_path}, is full: .*TMPDIR"), temporary_folder():
        raise full
    with pytest.raises(ValueError, match="other"), temporary_folder():
        raise ValueError("other")
    assert not list(tmp_path.iterdir())


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="is a pipe or a device"):
            check_regular(path)
    check_regular(tmp_path)
    check_regular(tmp_path / "missing")
