"""`crow-hf arena`: from the names on the command line to the tables."""

import pickle
import sys

from crow_hf.arena.attacks import ATTACKS, PAPER, QUICK
from crow_hf.arena.defences import METHODS, PAPER_METHODS, QUICK_METHODS, known_methods
from crow_hf.arena.table import load_results
from crow_hf.cli.commands import arena as arena_command
from crow_hf.cli.main import main
from crow_hf.methods.registry import DEFENCES, get_defence


def test_the_command_runs_an_arena_and_goes_on(arena, capsys, monkeypatch):
    """Fails if a run is missing from the tables, or if the exit code hides a failed run."""
    command = ["arena", "--output_dir", str(arena.folder), "--attacks", "tiny,tiny, again", "--methods", "none,int8"]
    with monkeypatch.context() as broken:
        broken.setitem(METHODS, "int8", lambda suspect, seed, scratch: 1 / 0)
        assert main([*command, "--seeds", "0,1"]) == 1
    assert "crow-hf arena: 4 of the runs failed" in capsys.readouterr().err
    assert main([*command, "--seeds", "0,1"]) == 0
    shown = capsys.readouterr()
    # Only the four failed runs are repeated. No progress bar of datasets or transformers is shown between their lines.
    assert shown.out.count("attack success") == 4 and "8 runs. The tables are in" in shown.out
    assert "Map" not in shown.err and "Loading weights" not in shown.err
    assert {path.name for path in arena.folder.iterdir()} == {
        *("suspects", "results"),
        *("results.jsonl", "results.md", "arena.png"),
    }


def test_defaults(monkeypatch, tmp_path, capsys):
    """Explicit options win over --quick. Without --alpaca, the attacks on Alpaca rows are left out."""
    asked = []
    monkeypatch.setattr(arena_command, "run_arena", lambda *args, **kwargs: asked.append(args[1:]) or [])
    folder = ["arena", "--output_dir", str(tmp_path)]
    for options in ([], ["--alpaca", "rows.json"], ["--quick"], ["--quick", "--attacks", "ctba", "--seeds", "3"]):
        assert main([*folder, *options]) == 0
    ready = [name for name in ATTACKS if not name.startswith("alpaca")]
    assert asked == [
        (ready, list(METHODS), [0, 1, 2]),
        (list(ATTACKS), list(METHODS), [0, 1, 2]),
        (list(QUICK), list(QUICK_METHODS), [0]),
        (["ctba"], list(QUICK_METHODS), [3]),
    ]
    asked.clear()
    for options in (["--paper", "--alpaca", "a.json"], ["--paper", "--quick", "--alpaca", "a.json"]):
        assert main([*folder, *options]) == 0
    assert asked == [(list(PAPER), list(PAPER_METHODS), seeds) for seeds in ([0, 1, 2], [0])]
    assert main([*folder, "--seeds", "0,one"]) == 1
    assert "--seeds are whole numbers separated by commas, got 'one'." in capsys.readouterr().err


PLUGIN = """
from crow_hf import register_defence


@register_defence("quartered")
def halve(model, rows, tokenizer, args):
    model.lm_head.weight.data /= 4
    return model
"""


def test_a_defence_of_a_file_runs_in_an_arena(arena, tmp_path, monkeypatch):
    """Fails if it cannot be sent to worker processes, which import the file for themselves."""
    monkeypatch.setitem(DEFENCES, "quartered", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_halving.py").write_text(PLUGIN)
    command = ["arena", "--output_dir", str(arena.folder), "--attacks", "tiny", "--seeds", "0"]
    command += ["--plugin", str(tmp_path / "my_halving.py"), "--methods", "none,quartered"]
    assert main(command) == 0
    assert pickle.loads(pickle.dumps(known_methods()["quartered"])).keywords["defence"] is get_defence("quartered")
    rows = {row["method"]: row for row in load_results(arena.folder)}
    assert list(rows) == ["none", "quartered"]
    assert rows["quartered"]["settings"]["defence"] == "my_halving.halve"
    assert rows["quartered"]["bits_per_byte_clean"] != rows["none"]["bits_per_byte_clean"]
    assert "quartered" in (arena.folder / "results.md").read_text(encoding="utf-8")
