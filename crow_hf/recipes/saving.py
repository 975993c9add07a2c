"""What a recipe leaves behind: the purified model, its card and its report in one folder, and on the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..evidence.result import Comparison, Purification
from ..methods.crow.config import CrowConfig
from ..reporting.cost import size_of_weights
from ..reporting.html import REPORT_DATA, write_report
from ..reporting.model_card import build_model_card
from ..training.checkpoints import OUTPUT_WAS_USED, check_writable, checkpoint_to_resume, output_was_used, writing
from ..training.hub import create_repository, push_folder
from ..training.loading import is_quantized
from .run import RecipeRun


def prepare_output(args: CrowConfig, resume_from_checkpoint: str | bool | None) -> str | None:
    """
    Check the output folder and open the repository on the Hub before the work starts.

    Args:
        args (`CrowConfig`):
            The arguments of the run. With `push_to_hub`, its `hub_model_id` becomes the full name of the repository.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            As in [`CrowTrainer.train`].

    Returns:
        `str`: The checkpoint to resume from, or `None`.

    Raises:
        `ValueError`: If the folder holds the model, the checkpoints or the report of another run.
        `OSError`: If the folder cannot be written to, or the repository cannot be opened.
    """
    if (Path(args.output_dir) / REPORT_DATA).exists() and not resume_from_checkpoint:
        raise ValueError(f"{args.output_dir} holds the report of another run: choose another `output_dir`.")
    if output_was_used(args.output_dir) and not resume_from_checkpoint:
        raise ValueError(OUTPUT_WAS_USED.format(args.output_dir))
    check_writable(args.output_dir)
    checkpoint = checkpoint_to_resume(args.output_dir, resume_from_checkpoint)
    if args.push_to_hub and args.process_index == 0:
        args.hub_model_id = create_repository(args)
    return checkpoint


@contextmanager
def not_fatal(run: RecipeRun, what: str) -> Iterator[None]:
    """Record an error in a card or report as a failure of the trainer, so that it does not cost the purified model."""
    try:
        yield
    except Exception as error:
        trainer = run.trainer
        trainer.note_failure(
            f"There is no {what} in {trainer.args.output_dir} ({type(error).__name__}: {error}). The purified model "
            "is complete."
        )


def save_result(
    run: RecipeRun,
    purification: Purification,
    *,
    merge: bool,
    comparison: Comparison | None = None,
    card_fields: dict[str, Any],
) -> None:
    """
    Save the purified model with its card and its report, and push it if `args.push_to_hub` is set.

    Errors in the card, the report or the push are recorded as failures of the trainer, because the model is saved and
    the result is known.

    Args:
        run (`RecipeRun`):
            The run of the recipe.
        purification (`Purification`):
            The result of the run. Its model becomes the merged one.
        merge (`bool`):
            Whether to merge a fresh adapter into the weights. It stays an adapter on quantized weights, because
            rounding them again would lose most of what was learned.
        comparison (`Comparison`, *optional*):
            The evaluations, for the card.
        card_fields (`dict`):
            Further arguments of [`build_model_card`].

    Raises:
        `OSError`: If the model or its card cannot be written.
    """
    trainer = run.trainer
    args = trainer.args
    if merge and run.trains_fresh_adapter and isinstance(trainer.model, PeftModel) and not is_quantized(trainer.model):
        trainer.model = trainer.model.merge_and_unload(safe_merge=True)
        purification.model = trainer.model
    # The trainer does not push here: the card and the report are written first.
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return
    card = None
    with not_fatal(run, "model card"):
        card = build_model_card(trainer, purification=purification, comparison=comparison, **card_fields)
    with writing("README.md", args.output_dir, "the purified model is complete; free disk space before you push it"):
        trainer.create_model_card(card)
    if purification.report is not None:
        with not_fatal(run, "report"):
            purification.report["size"]["purified"] = size_of_weights(args.output_dir)
            write_report(args.output_dir, purification.report)
    if args.push_to_hub:
        try:
            # Not a `Future`, because the call blocks.
            commit: Any = push_folder(
                args.output_dir,
                args.hub_model_id,
                token=args.hub_token,
                private=args.hub_private_repo,
                revision=args.hub_revision,
            )
            purification.hub_url = commit.repo_url
        except OSError as error:
            trainer.note_failure(str(error))
