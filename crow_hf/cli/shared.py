"""What several commands share: checks of their arguments, and printing."""

from pathlib import Path

from rich.console import Console

from ..attacks.judges import get_judge
from ..attacks.targets import BaseTarget, get_target
from ..attacks.triggers import BaseTrigger, get_trigger
from ..data.visible import printable
from ..evaluation.harness import Evaluation
from ..evaluation.tasks import TaskScore
from ..files import claim, is_unused
from ..recipes.saving import own_checkpoint
from ..reporting.tables import comparison_table, task_table
from ..training.checkpoints import check_writable


def check_output(output_dir: str, resume: str | None = None) -> str | None:
    """
    Check the output folder of a command, and keep other runs out of it.

    Args:
        output_dir (`str`):
            The folder. It must be new or empty, unless a run in it is resumed.
        resume (`str`, *optional*):
            The argument `--resume_from_checkpoint`: a checkpoint, or `true` for the last complete one.

    Returns:
        `str`: The checkpoint to resume from, or `None`.

    Raises:
        `ValueError`: If another run writes to the folder, if it is not empty, or if the checkpoint is incomplete or
            belongs to another folder.
        `OSError`: If the folder cannot be written to.
    """
    folder = Path(output_dir)
    check_writable(output_dir)
    claim(folder)
    if not is_unused(folder) and not resume:
        raise ValueError(f"{output_dir} is not empty: choose another --output_dir, or empty it.")
    return own_checkpoint(output_dir, True if resume in ("True", "true", "last") else resume)


def check_new_file(path: str | None, option: str = "output") -> None:
    """Refuse an output file that exists. `None` stands for no output."""
    if path is not None and Path(path).exists():
        raise ValueError(f"{path} exists: choose another --{option}, or delete it.")


def read_backdoor(
    trigger: str | None, target: str | None, judge: str | None = None, question: str | None = None
) -> tuple[BaseTrigger | None, BaseTarget | None]:
    """
    Look up the trigger of a known backdoor, and its target or the judge that decides instead.

    Raises:
        `ValueError`: If only one of them is passed, if both a target and a judge are, or if the judge cannot be used.
    """
    if target is not None and judge is not None:
        raise ValueError("The target or a judge decides whether an attack succeeded: pass --target or --judge.")
    if question is not None and judge is None:
        raise ValueError("A question is for a model that judges: pass --judge too.")
    if (trigger is None) != (target is None and judge is None):
        raise ValueError(
            "A backdoor has a trigger and a target: pass both --trigger and --target (or --judge), or neither."
        )
    if trigger is None:
        return None, None
    return get_trigger(trigger), get_target(target) if judge is None else get_judge(judge, question)


def print_table(evaluations: dict[str, Evaluation], title: str | None = None) -> None:
    """Print a table with one column per model. Their names are no markup of rich."""
    shown = {printable(name): evaluation for name, evaluation in evaluations.items()}
    Console(markup=False, emoji=False).print(comparison_table(shown, title and printable(title)))


def print_task_table(tasks: dict[str, list[TaskScore]]) -> None:
    """Print a table of the scores of tasks, with one column per model."""
    shown = {printable(name): scores for name, scores in tasks.items()}
    Console(markup=False, emoji=False).print(task_table(shown))
