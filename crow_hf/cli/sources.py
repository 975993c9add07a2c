"""Reads options and names from source files, because importing the modules takes seconds: they import PyTorch."""

import ast
import dataclasses
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


PACKAGE = Path(__file__).parents[1]
# Without importing it.
TRANSFORMERS = Path(find_spec("transformers").origin).parent


@dataclass(frozen=True)
class Option:
    """
    An option of the command line, which is a field of a dataclass.

    Attributes:
        name (`str`):
            The name of the field.
        kind (`str`):
            The annotation of the field, such as `"float | None"`.
        default (`Any`):
            The default. `dataclasses.MISSING` if the option is needed, and `None` if the default is computed.
        help (`str`):
            One or two sentences.
        choices (`tuple[str, ...]`):
            The values that are possible. Empty if any value is.
    """

    name: str
    kind: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()


def options_of(arguments: type) -> list[Option]:
    """Return the options of a dataclass that has been imported."""
    return [
        Option(
            each.name,
            each.type.__name__ if isinstance(each.type, type) else str(each.type),
            each.default,
            each.metadata.get("help", ""),
            tuple(each.metadata.get("choices", ())),
        )
        for each in dataclasses.fields(arguments)
    ]


@cache
def options_in(path: Path, class_name: str) -> list[Option]:
    """Return the options of a dataclass in a source file, without those of its base classes."""
    found = []
    (definition,) = (each for each in _tree(path).body if isinstance(each, ast.ClassDef) and each.name == class_name)
    for node in definition.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if not isinstance(node.value, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.value.keywords}
        if "init" in given:
            # It is computed.
            continue
        metadata: Any = given["metadata"]
        # Not all of it is literal. Some choices are computed.
        described = dict(zip(map(_value, metadata.keys), metadata.values, strict=True))
        kind = ast.unparse(node.annotation)
        found.append(
            Option(
                node.target.id,
                kind,
                _value(given.get("default")) if given.keys() & {"default", "default_factory"} else dataclasses.MISSING,
                _value(described.get("help")) or "",
                tuple(_value(described.get("choices")) or _members(kind)),
            )
        )
    return found


def names_in(path: Path, name: str) -> list[str]:
    """Return the keys of a dictionary, or the items of a tuple, that a source file assigns to a name."""
    value = _assigned(path, name)
    return [_value(each) for each in (value.keys if isinstance(value, ast.Dict) else value.elts)]


def values_in(path: Path, name: str) -> Any:
    """Return the value that a source file assigns to a name."""
    return ast.literal_eval(_assigned(path, name))


def _assigned(path: Path, name: str) -> Any:
    node: Any
    for node in _tree(path).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value
    raise LookupError(f"{path} assigns no {name}.")


def _members(kind: str) -> list[str]:
    """Return the values of the enumeration of transformers that an annotation names, such as `SaveStrategy | str`."""
    for module in ("trainer_utils.py", "training_args.py"):
        for node in _tree(TRANSFORMERS / module).body:
            if isinstance(node, ast.ClassDef) and node.name == kind.removesuffix(" | str"):
                return [_value(each.value) for each in node.body if isinstance(each, ast.Assign)]
    return []


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _value(node: ast.expr | None) -> Any:
    """Return the value of a literal, and `None` for an expression."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
