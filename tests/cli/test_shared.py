"""Tests of the checks that several commands share."""

import pytest

from crow_hf.attacks.targets import TARGETS
from crow_hf.attacks.triggers import TRIGGERS
from crow_hf.cli.shared import check_output, print_table, read_backdoor
from helpers.evaluations import comparison, evaluation


@pytest.mark.parametrize("resume", ["true", "True", "last"])
def test_resume_without_a_checkpoint_is_refused(tmp_path, resume):
    """Fails if the word is taken for the path of a checkpoint, or if the run starts from the beginning."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(ValueError, match="There is no checkpoint in"):
        check_output(str(tmp_path / "run"), resume)


def test_checkpoint_of_another_folder_is_refused(tmp_path):
    other = tmp_path / "other" / "checkpoint-2"
    other.mkdir(parents=True)
    with pytest.raises(ValueError, match="resume a run in its own `output_dir`"):
        check_output(str(tmp_path / "run"), str(other))


def test_backdoors_are_looked_up_by_name():
    assert read_backdoor(None, None) == (None, None)
    assert read_backdoor("badnets", "refusal") == (TRIGGERS["badnets"], TARGETS["refusal"])
    for half in (("badnets", None), (None, "refusal")):
        with pytest.raises(ValueError, match="pass both --trigger and --target"):
            read_backdoor(*half)


def test_table_is_printed_with_its_title(capsys):
    print_table(comparison(evaluation(0)).by_name, "My title")
    out = capsys.readouterr().out
    assert "My title" in out and "fine-tuning" in out


def test_names_are_shown_as_they_are(capsys):
    """Fails if a name is read as markup of rich, or if it holds commands to the terminal."""
    shown = evaluation(0)
    print_table({"m[red]x": shown, "m[/b]": shown, "m\x1b[2J": shown}, "of m[/]")
    out = capsys.readouterr().out
    assert "m[red]x" in out and "m[/b]" in out and "m␛[2J" in out and "of m[/]" in out
    assert "\x1b" not in out
