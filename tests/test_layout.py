"""The layout of the package: which module belongs to which room, and what it may import.

CONTRIBUTING.md has the table of the rooms. A module imports from its own room and from the rooms above it in that
table.
"""

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import crow_hf


ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500


def module_name(path: Path) -> str:
    """Return `"crow_hf.a.b"` for `crow_hf/a/b.py` and `"crow_hf.a"` for `crow_hf/a/__init__.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / "crow_hf").rglob("*.py"))}
# The package itself holds the version and the public names, and every module may read them there.
PACKAGE = {"crow_hf", "crow_hf.__main__"}
IN_ROOMS = sorted(MODULES.keys() - PACKAGE)


def rooms() -> list[str]:
    """Return the rooms in the order of the table in CONTRIBUTING.md: `["models", "data", ...]`."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `crow_hf/(\w+)(?:/|\.py)` \|", text, re.MULTILINE)


def room_of(module: str) -> str:
    return module.split(".")[1]


def resolved(module: str, name: str) -> str:
    """Return the module in which `from module import name` finds the name."""
    if f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    if module == "crow_hf" and name in crow_hf._HOME_OF:
        return f"crow_hf.{crow_hf._HOME_OF[name]}"
    return module


def imports_of(tree: ast.Module, package: str) -> set[str]:
    """
    Return the modules of `crow_hf` that a file imports anywhere, also inside functions and under `TYPE_CHECKING`.

    Args:
        tree (`ast.Module`):
            The parsed file.
        package (`str`):
            The package that relative imports of the file start from.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {resolved(module, alias.name) for alias in node.names}
    return {name for name in found if name.split(".")[0] == "crow_hf"}


@cache
def imports_of_module(module: str) -> set[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return imports_of(ast.parse(path.read_text(encoding="utf-8")), package) - {module}


@cache
def modules_in_tests() -> set[str]:
    """Return the modules that a test file imports, or names in a string."""
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found |= imports_of(ast.parse(text), "tests") | set(re.findall(r"crow_hf(?:\.\w+)+", text))
    return found


def test_every_module_belongs_to_a_room():
    """Fails if the table lacks a folder or a module, or has a room that is gone."""
    assert len(set(rooms())) == len(rooms())
    assert {room_of(module) for module in IN_ROOMS} == set(rooms())


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("import crow_hf.data.rows", {"crow_hf.data.rows"}),
        ("def f():\n    from ..data.rows import render", {"crow_hf.data.rows"}),
        ("if TYPE_CHECKING:\n    from ..data import rows", {"crow_hf.data.rows"}),
        ("from .objective import crow_terms", {"crow_hf.methods.objective"}),
        ("from .. import __version__", {"crow_hf"}),
        ("from .. import purify", {"crow_hf.recipes.purification"}),
        ("import torch\nfrom transformers import Trainer", set()),
    ],
)
def test_imports_are_found(code, imported):
    """The tests below see every form of import, also inside functions and under `TYPE_CHECKING`."""
    assert imports_of(ast.parse(code), "crow_hf.methods") == imported


@pytest.mark.parametrize("module", IN_ROOMS)
def test_a_module_imports_only_from_its_room_and_those_above_it(module):
    """Fails if a model knows about training, a method about attacks, or anything about the command line."""
    order = rooms()
    below = order[order.index(room_of(module)) + 1 :]
    wrong = {name for name in imports_of_module(module) - PACKAGE if room_of(name) in below}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_no_modules_import_each_other():
    """Fails if a chain of imports leads back to its first module, also through imports inside functions."""
    done, path = set(), []

    def follow(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for imported in sorted(imports_of_module(module) & set(IN_ROOMS)):
            follow(imported)
        done.add(path.pop())

    for module in IN_ROOMS:
        follow(module)


@pytest.mark.parametrize("module", [module for module in IN_ROOMS if room_of(module) == "models"])
def test_models_import_only_their_siblings(module):
    """The Hub accepts only `from .sibling import name` in the code of a model, and no folders."""
    assert MODULES[module].parent == ROOT / "crow_hf" / "models"
    assert {name.rpartition(".")[0] for name in imports_of_module(module)} <= {"crow_hf.models"}


def test_no_module_bears_the_name_of_a_public_function():
    """Importing such a module could put it in the place of the function. The commands are named after functions."""
    functions = {name for name in crow_hf.__all__ if inspect.isfunction(getattr(crow_hf, name))}
    assert "purify" in functions
    modules = {name for name in MODULES if not name.startswith("crow_hf.cli.commands.")}
    assert {name for name in modules if name.rpartition(".")[2] in functions} == set()


@pytest.mark.parametrize("module", [module for module in IN_ROOMS if room_of(module) != "models"])
def test_no_module_is_too_long(module):
    """A module of more than 500 lines is split by what changes together. The Hub needs one file for each model."""
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines"


@pytest.mark.parametrize("module", [module for module in IN_ROOMS if MODULES[module].name != "__init__.py"])
def test_every_module_is_tested(module):
    """Fails if a module has no test file at the mirrored path and no test imports or names it."""
    path = MODULES[module].relative_to(ROOT / "crow_hf")
    mirrored = ROOT / "tests" / path.parent / f"test_{path.name}"
    assert mirrored.is_file() or module in modules_in_tests(), f"write {mirrored.relative_to(ROOT)}"
