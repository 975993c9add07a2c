"""Tests of `crow-hf verify` on the folder of a real run."""

import shutil

from helpers.command_line import assert_one_sentence, run


def test_it_finds_what_changed(finished, tmp_path, capsys):
    assert run("verify", "--folder", finished) == 0
    same = capsys.readouterr().out
    assert same.endswith(" files are as they were written.\n") and "changed" not in same
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "config.json").write_text("{}")
    (folder / "\x1b[2Jmore").write_text("")
    assert run("verify", "--folder", folder) == 1
    out = capsys.readouterr().out
    assert "changed config.json\n" in out and "added   " in out and "\x1b" not in out


def test_a_folder_without_hashes_is_an_error(tmp_path, capsys):
    assert run("verify", "--folder", tmp_path) == 2
    assert_one_sentence(capsys.readouterr().err, "verify")
