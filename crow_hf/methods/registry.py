"""Defences of one's own, by name. [`compare_defences`] and the arena measure them beside the recipes."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .crow.config import CrowConfig


# A defence maps a fresh copy of the suspect, the clean rows, the tokenizer and the arguments of plain fine-tuning to
# the model that is measured. It may change the copy. The arguments hold the seed, the device, a folder for temporary
# files, and the steps and the learning rate of the control.
Defence = Callable[
    [PreTrainedModel | PeftModel, Dataset, PreTrainedTokenizerBase, CrowConfig], PreTrainedModel | PeftModel
]

DEFENCES: dict[str, Defence] = {}
# The names of the models that every comparison has.
_TAKEN = ("suspect", "control", "purified", "no defence", "fine-tuning", "CROW", "Invariance")


def register_defence(name: str) -> Callable[[Defence], Defence]:
    """
    Return a decorator that registers a function as a defence. It replaces one of the same name.

    Args:
        name (`str`):
            The name in tables, and in the arguments of [`compare_defences`] and of the arena.

    Raises:
        `ValueError`: If the name is blank, has a comma, or belongs to a model that every comparison has.

    Example:

    ```python
    >>> from crow_hf import register_defence


    >>> @register_defence("nothing at all")
    ... def nothing(model, rows, tokenizer, args):
    ...     return model
    ```
    """
    if not name.strip() or "," in name or name in _TAKEN:
        raise ValueError(f"{name!r} cannot be the name of a defence: choose another one, without a comma.")

    def register(defence: Defence) -> Defence:
        DEFENCES[name] = defence
        return defence

    return register


def get_defence(name: str) -> Defence:
    """
    Return the registered defence with this name.

    Raises:
        `ValueError`: If there is none.
    """
    if name not in DEFENCES:
        known = ", ".join(map(repr, DEFENCES)) or "none is registered"
        raise ValueError(f"There is no defence {name!r} ({known}): register it with `register_defence`.")
    return DEFENCES[name]


def load_defences(path: str) -> None:
    """
    Run a Python file that registers defences. Other processes of the same run can import it too.

    Args:
        path (`str`):
            The file.

    Raises:
        `ValueError`: If there is no such file, if it fails, or if Python would import another module by its name.
    """
    file = Path(path).resolve()
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"{path} is not a Python file: pass one that registers defences.")
    # At the end, so that no file beside it takes the place of another module.
    sys.path.append(str(file.parent))
    try:
        found = find_spec(file.stem) if file.stem.isidentifier() else None
        is_taken = found is None or found.origin is None or Path(found.origin).resolve() != file
        if not is_taken:
            import_module(file.stem)
    except Exception as error:
        raise ValueError(f"{path} cannot be run ({type(error).__name__}: {error}).") from error
    if is_taken:
        raise ValueError(
            f"{path} cannot be imported as {file.stem!r}, which is no name or that of another module: rename the file."
        )
