"""Tests of the registry of defences."""

import sys

import pytest

from crow_hf.methods import registry
from crow_hf.methods.registry import get_defence, load_defences, register_defence


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(registry, "DEFENCES", {})
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_registered_defence_has_its_name():
    """The function stays what it is. One of the same name replaces it, as a cell of a notebook that is run again."""

    @register_defence("mine")
    def first(*arguments):
        return 1

    assert get_defence("mine") is first and first() == 1
    second = register_defence("mine")(lambda *arguments: 2)
    assert get_defence("mine") is second


@pytest.mark.parametrize("name", ["", " ", "a,b", "control", "fine-tuning", "CROW"])
def test_names_that_tables_cannot_show_are_refused(name):
    with pytest.raises(ValueError, match="cannot be the name of a defence"):
        register_defence(name)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'mine' \\(none is registered\\)"):
        get_defence("mine")
    register_defence("yours")(lambda *arguments: None)
    with pytest.raises(ValueError, match="'mine' \\('yours'\\)"):
        get_defence("mine")


def test_a_file_registers_its_defences(tmp_path):
    file = tmp_path / "my_defence_of_a_file.py"
    file.write_text("from crow_hf import register_defence\nregister_defence('of a file')(lambda *arguments: 3)\n")
    load_defences(str(file))
    assert get_defence("of a file")() == 3


@pytest.mark.parametrize(
    ("name", "text"), [("broken_syntax.py", "def"), ("broken_import.py", "import no_such_module")]
)
def test_files_that_cannot_be_run_are_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} cannot be run"):
        load_defences(str(tmp_path / name))


def test_files_beside_a_plugin_take_the_place_of_no_module(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "colorsys.py").write_text("ours = True\n")
    file = tmp_path / "my_defence_beside_others.py"
    file.write_text("import colorsys\nassert not hasattr(colorsys, 'ours')\n")
    load_defences(str(file))
    # As a cell of a notebook that is run again.
    load_defences(str(file))


@pytest.mark.parametrize("name", ["datasets.py", "colorsys.py", "sys.py", "my.defence.py", "my-defence.py"])
def test_files_that_python_does_not_import_by_their_name_are_refused(tmp_path, name):
    """Fails if another module is imported instead, without a word."""
    (tmp_path / name).write_text("from crow_hf import register_defence\nregister_defence('mine')(print)\n")
    with pytest.raises(ValueError, match=f"{name} cannot be imported as .*: rename the file"):
        load_defences(str(tmp_path / name))


@pytest.mark.parametrize("name", ["missing.py", "rows.jsonl"])
def test_only_python_files_are_run(tmp_path, name):
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="is not a Python file"):
        load_defences(str(tmp_path / name))
