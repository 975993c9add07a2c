"""Tests of `crow-hf verify` on the folder of a real run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crow_hf.reporting.checksums import write_checksums
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


def test_commands_that_read_files_import_no_transformers(finished):
    """Fails if `verify` or `gate` needs seconds to import what trains models."""
    script = (
        "import sys; from crow_hf.cli.main import main; folder = sys.argv[1]; "
        "codes = main(['verify', '--folder', folder]), main(['gate', '--report', folder, '--min_rows', '1']); "
        "print(codes, sorted({'torch', 'transformers', 'datasets', 'peft'} & sys.modules.keys()))"
    )
    process = subprocess.run([sys.executable, "-c", script, str(finished)], capture_output=True, text=True)
    assert process.stdout.splitlines()[-1] == "(0, 0) []", process.stdout + process.stderr


def test_a_folder_without_hashes_is_an_error(tmp_path, capsys):
    assert run("verify", "--folder", tmp_path) == 2
    assert_one_sentence(capsys.readouterr().err, "verify")


@pytest.mark.slow
def test_the_signature_of_the_guide(finished, tmp_path):
    """Fails if the commands of the guide do not run, or if they accept a changed file. They use a real key."""
    pytest.importorskip("model_signing")
    guide = (Path(__file__).parents[3] / "docs" / "decide.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:openssl|model_signing) .*$", guide, re.MULTILINE)
    shutil.copytree(finished, tmp_path / "purified")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def succeeds(command):
        return subprocess.run(command.split(), cwd=tmp_path, env=environment, capture_output=True).returncode == 0

    assert [command.split()[1] for command in commands] == ["ecparam", "ec", "sign", "verify"]
    assert all(map(succeeds, commands)) and run("verify", "--folder", tmp_path / "purified") == 0
    # Whoever edits a file edits its hash, too.
    (tmp_path / "purified" / "config.json").write_text("{}")
    write_checksums(tmp_path / "purified")
    assert run("verify", "--folder", tmp_path / "purified") == 0 and not succeeds(commands[-1])
