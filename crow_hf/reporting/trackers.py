"""What trackers, such as TensorBoard, get of a purification: beside the curves of its training, its result."""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from ..methods.crow.trainer import CrowTrainer
from ..training.saves import one_line
from .bom import BOM
from .provenance import CARD
from .record import Record
from .report_file import REPORT_DATA, REPORT_PAGE


logger = logging.get_logger(__name__)

# The verdict, the final table and the canaries stand in the card and in the report.
_FILES = (CARD, REPORT_PAGE, REPORT_DATA, BOM)
_ARTIFACT = "purification"
_RETENTION = ("answer_kl", "text_kl", "text_bits_ratio")


class Tracker:
    """
    A callback of the Trainer that reports to a tracker.

    An error of the tracker does not end the run. It is remembered, and the tracker gets nothing more.

    Args:
        callback (`TrainerCallback`):
            One of those of `transformers.integrations`.
    """

    def __init__(self, callback: Any) -> None:
        self.callback, self.error = callback, ""

    @property
    def name(self) -> str:
        return type(self.callback).__name__.removesuffix("Callback")

    def __getattr__(self, event: str) -> Callable[..., None]:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda *args, **kwargs: self.attempt(getattr(self.callback, event), *args, **kwargs)

    def attempt(self, action: Callable, *args: Any, **kwargs: Any) -> None:
        """Do something, unless the tracker has failed."""
        if self.error:
            return
        try:
            action(*args, **kwargs)
        except Exception as error:
            self.error = one_line(error)
            logger.warning(f"{self.name} failed, and gets nothing more of this run ({self.error}).")


def prepare_trackers(trainer: CrowTrainer) -> None:
    """Guard the trackers of a trainer, see [`Tracker`], and name its run, by which [`send_result`] finds it again."""
    args, handler = trainer.args, trainer.callback_handler
    args.run_name = args.run_name or f"{Path(args.output_dir).absolute().name}-{datetime.now():%Y%m%d-%H%M%S}"
    kinds = tuple(get_reporting_integration_callbacks(args.report_to))
    handler.callbacks = [Tracker(each) if isinstance(each, kinds) else each for each in handler.callbacks]


def send_result(trainer: CrowTrainer, record: Record) -> None:
    """
    Send the result of a purification to the trackers: its numbers, see [`final_scores`], and its card, its report and
    its bill of materials as files. TensorBoard keeps no files, so it gets the card as a text.

    An error becomes a failure of the trainer.

    Args:
        trainer (`CrowTrainer`):
            The trainer, whose output folder holds the files.
        record (`dict`):
            The content of `report.json`.
    """
    scores = final_scores(record)
    files = [path for name in _FILES if (path := Path(trainer.args.output_dir, name)).exists()]
    for tracker in [each for each in trainer.callback_handler.callbacks if isinstance(each, Tracker)]:
        tracker.attempt(_SENDERS.get(tracker.name, _send_numbers), tracker.callback, trainer, scores, files)
        if tracker.error:
            trainer.note_failure(f"{tracker.name} lacks the result of this run ({tracker.error}).")


def final_scores(record: Record) -> dict[str, float]:
    """
    Return the numbers of a report that a tracker can compare between runs.

    Args:
        record (`dict`):
            The content of `report.json`.

    Returns:
        `dict[str, float]`: By name, such as `"eval_purified/attack_success"`: attack success and right answers of each
        model, retention, and the success of the worst canary. What was not measured is left out. Trainer writes
        `eval_` as `eval/`.
    """
    scores: dict[str, float] = {}
    for role, evaluation in (record["evaluations"] or {}).items():
        found = {
            "attack_success": (evaluation["triggered"] or {}).get("target"),
            "right_answers": evaluation["clean"]["exact_match"],
        }
        scores |= {f"eval_{role}/{name}": share["rate"] for name, share in found.items() if share is not None}
    kept = record["retention"] or {}
    scores |= {f"eval_purified/{name}": kept[name] for name in _RETENTION if kept.get(name) is not None}
    canaries = [canary["after"]["rate"] for canary in record["canaries"] if canary["after"]]
    return scores | ({"eval_purified/canary_success": max(canaries)} if canaries else {})


def _send_numbers(callback: Any, trainer: CrowTrainer, logs: dict[str, Any], files: list[Path]) -> None:
    callback.on_log(trainer.args, trainer.state, trainer.control, logs=logs, model=trainer.model)


def _send_to_tensorboard(callback: Any, trainer: CrowTrainer, scores: dict[str, float], files: list[Path]) -> None:
    cards = [ModelCard.load(file).text for file in files if file.name == CARD]
    _send_numbers(callback, trainer, scores | {"eval_purified/card": "\n".join(cards)}, files)


def _send_to_wandb(callback: Any, trainer: CrowTrainer, scores: dict[str, float], files: list[Path]) -> None:
    import wandb

    _send_numbers(callback, trainer, scores, files)
    # The run stays open until the process ends.
    artifact = wandb.Artifact(f"{_ARTIFACT}-{wandb.run.id}", type=_ARTIFACT)
    for file in files:
        artifact.add_file(str(file))
    wandb.run.log_artifact(artifact)


def _send_to_mlflow(callback: Any, trainer: CrowTrainer, scores: dict[str, float], files: list[Path]) -> None:
    import mlflow

    # The run has ended with the training, unless it is one of the user's own.
    ended = mlflow.last_active_run() if mlflow.active_run() is None else None
    with nullcontext() if ended is None else mlflow.start_run(run_id=ended.info.run_id):
        _send_numbers(callback, trainer, scores, files)
        for file in files:
            mlflow.log_artifact(str(file))


def _send_to_trackio(callback: Any, trainer: CrowTrainer, scores: dict[str, float], files: list[Path]) -> None:
    import trackio

    # The run has ended with the training. This goes on with it by its name.
    _send_numbers(callback, trainer, scores, files)
    artifact = trackio.Artifact(f"{_ARTIFACT}-{trainer.args.run_name}", type=_ARTIFACT)
    for file in files:
        artifact.add_file(file)
    trackio.log_artifact(artifact)
    trackio.finish()


_SENDERS: dict[str, Callable[..., None]] = {
    "TensorBoard": _send_to_tensorboard,
    "Wandb": _send_to_wandb,
    "MLflow": _send_to_mlflow,
    "Trackio": _send_to_trackio,
}
