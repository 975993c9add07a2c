"""The tasks of lm-evaluation-harness, in which the utility of language models is mostly published."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import yaml
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from ..progress import phase
from ..training.recorder import context_length
from ..training.saves import one_line
from .generation import inference_mode


# What reads the data of a task of one's own. Others download, or read more than text and numbers.
READERS = ("json", "csv", "parquet", "text")
# Draws for the errors of metrics that are no means, and the seed of these draws.
DRAWS, SEED = 1_000, 1234


class TaskScore(NamedTuple):
    """
    A metric of a task.

    Attributes:
        task (`str`), metric (`str`):
            Their names, as lm-evaluation-harness has them. A metric of filtered answers has the name of the filter.
        value (`float`), error (`float`, *optional*):
            The metric and its standard error. `None` if the metric has none.
        rows (`int`):
            The number of rows.
    """

    task: str
    metric: str
    value: float
    error: float | None
    rows: int


@phase("Reading the tasks")
def load_tasks(names: Sequence[str], folder: str | Path | None = None) -> dict[str, Any]:
    """
    Find tasks of lm-evaluation-harness and read their data.

    Args:
        names (`Sequence[str]`):
            Names of tasks, groups or tags.
        folder (`str` or `Path`, *optional*):
            A folder of tasks of one's own, the `include_path` of lm-evaluation-harness. The tasks are then those of
            the folder. Nothing of it is run: a task that needs code is refused. Without a folder, the tasks are those
            that come with lm-evaluation-harness, with their code.

    Returns:
        `dict[str, Any]`: The tasks, for [`evaluate_tasks`].

    Raises:
        `ImportError`: If lm-evaluation-harness is not installed.
        `ValueError`: If there is no such task, its data cannot be read, or a task of the folder needs code.
    """
    try:
        from lm_eval.api import metrics, registry
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f'Tasks need lm-evaluation-harness ({error}): pip install "crow-hf[lm-eval]".') from error
    assert metrics.__name__  # Importing it fills the registry.
    if folder is not None:
        check_task_folder(Path(folder), registry.metric_registry)
    with _harness(logging.ERROR):
        manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
        if unknown := [name for name in names if name not in manager.all_tasks]:
            known = f"It has {', '.join(manager.all_tasks) or 'none'}." if folder else "`lm-eval ls tasks` lists them."
            raise ValueError(f"There is no task {unknown[0]} in {folder or 'lm-evaluation-harness'}. {known}")
        try:
            loaded: dict[str, Any] = manager.load(list(names))
        except Exception as error:
            raise ValueError(f"The tasks {', '.join(names)} cannot be read ({one_line(error)}).") from error
    for task in loaded["tasks"].values():
        # As `simple_evaluate` of lm-evaluation-harness, which also runs programs to describe the machine.
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


@phase("Running the tasks")
def evaluate_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 32,
) -> list[TaskScore]:
    """
    Run tasks of lm-evaluation-harness on a model that is loaded, without a chat template.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        tasks (`dict[str, Any]`):
            The result of [`load_tasks`].
        limit (`int`, *optional*):
            The number of rows of each task. Defaults to all of them.
        batch_size (`int`, *optional*, defaults to 32):
            Number of rows per batch.

    Returns:
        `list[TaskScore]`: The metrics of each task and of each group.

    Raises:
        `ValueError`: If a task fails on the model.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    with inference_mode(model):
        try:
            with _harness(logging.ERROR):
                adapter = HFLM(
                    pretrained=model,
                    backend="causal",
                    # It gets a pad token.
                    tokenizer=deepcopy(tokenizer),
                    # Without a start token, what a tokenizer adds is an end token, and ends the prompt.
                    add_bos_token=None if tokenizer.bos_token_id is not None else False,
                    batch_size=batch_size,
                    max_length=context_length(model),
                )
            set_seed(SEED)
            with _harness(logging.WARNING):
                found = evaluate(adapter, task_dict=tasks, limit=limit, bootstrap_iters=DRAWS, log_samples=False)
        except Exception as error:
            raise ValueError(
                f"The tasks {', '.join(tasks['tasks'])} fail on the model ({one_line(error)})."
            ) from error
    scores = []
    for task, results in (found["results"] | found.get("groups", {})).items():
        for key, value in results.items():
            metric, _, filtered_by = key.partition(",")
            if not filtered_by or metric.endswith("_stderr"):
                continue
            name = metric if filtered_by == "none" else f"{metric}, {filtered_by}"
            # It is "N/A" if the metric has none.
            spread = results.get(f"{metric}_stderr,{filtered_by}")
            known = float(spread) if isinstance(spread, (int, float)) else None
            scores.append(TaskScore(task, name, float(value), known, int(results["sample_len"])))
    return scores


def check_task_folder(folder: Path, metrics: Collection[str]) -> None:
    """
    Refuse a folder of tasks that could run code or read other files than text.

    Their Python functions and metrics of one's own are code, and data can come in formats that are. Templates are code
    too, but they are rendered in a sandbox.

    Args:
        folder (`Path`):
            The folder.
        metrics (`Collection[str]`):
            The names of the metrics that come with lm-evaluation-harness.

    Raises:
        `ValueError`: If there is no task in the folder, or one that is refused.
    """
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise ValueError(f"There is no task in {folder}: it needs a .yaml file of each.")
    for file in files:
        _check_file(file, folder.resolve(), metrics, set())


def _check_file(file: Path, folder: Path, metrics: Collection[str], seen: set[Path]) -> None:
    file = file.resolve()
    if not file.is_relative_to(folder):
        raise ValueError(f"The tasks in {folder} lead to {file}, outside of the folder. Put that file itself there.")
    if file in seen:
        return
    seen.add(file)
    try:
        text = file.read_text(encoding="utf-8")
        if tag := next((each for each in _tags(yaml.compose(text)) if each.startswith("!")), None):
            raise ValueError(
                f"{file} has the tag {tag}, which runs code. Write the task without it, or run it with "
                "lm-evaluation-harness itself."
            )
        held = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as a task ({one_line(error)}).") from error
    for mapping in _mappings(held):
        included = mapping.get("include") or []
        for each in [included] if isinstance(included, str) else included:
            _check_file(file.parent / str(each), folder, metrics, seen)
        if (reader := mapping.get("dataset_path")) is not None and reader not in READERS:
            raise ValueError(f"{file} reads its data with {reader!r}: `dataset_path` must be {', '.join(READERS)}.")
        if "use_prompt" in mapping:
            raise ValueError(f"{file} has `use_prompt`, which reads other files: write the prompt as `doc_to_text`.")
        metric = mapping.get("metric")
        if mapping.get("hf_evaluate") or (metric is not None and metric not in metrics):
            raise ValueError(f"{file} has the metric {metric!r}, which is code: use one of lm-evaluation-harness.")


def _tags(node: Any) -> Iterator[str]:
    """The tags of a tree of YAML. A node that contains itself is visited once."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += [each for pair in node.value for each in pair]


def _mappings(value: Any, depth: int = 0) -> Iterator[dict]:
    if depth > 20:
        raise ValueError("A task is nested too deeply.")
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _mappings(each, depth + 1)


@contextmanager
def _harness(level: int) -> Iterator[None]:
    """Let lm-evaluation-harness render templates in a sandbox, show its bars as ours, and log from a level on."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    import lm_eval.utils

    sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters = lm_eval.utils.env.filters
    logger = logging.getLogger("lm_eval")
    with ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(level)
        stack.enter_context(patch.object(lm_eval.utils, "env", sandbox))
        for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
            stack.enter_context(patch.object(module, "tqdm", transformers_logging.tqdm))
        yield
