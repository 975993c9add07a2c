"""What a recipe leaves behind: the purified model, its card and its report in one folder, and on the Hub."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from ..evaluation.harness import Evaluation
from ..evidence.canaries import canary_success
from ..evidence.last_look import LastLook, look_again
from ..evidence.result import Comparison, Purification
from ..evidence.snapshot import Snapshot, SnapshotRows
from ..files import claim
from ..methods.crow.config import CrowConfig, loading_kwargs
from ..progress import phase
from ..reporting.bom import write_bom
from ..reporting.checksums import write_checksums
from ..reporting.cost import size_of_weights
from ..reporting.html import REPORT_DATA, write_report
from ..reporting.model_card import build_model_card
from ..reporting.provenance import checksums_of_model
from ..reporting.trackers import send_result
from ..training.checkpoints import (
    OUTPUT_WAS_USED,
    check_writable,
    checkpoint_to_resume,
    output_was_used,
    remove_checkpoints,
)
from ..training.hub import create_repository, push_folder
from ..training.loading import is_quantized, load_causal_lm, move
from ..training.quantization import quantized
from ..training.recorder import base_model_of
from ..training.saves import cast_as_loaded, copy_side_files, hub_options, one_line, stored_dtype
from ..training.sharding import will_shard
from .run import RecipeRun


logger = logging.get_logger(__name__)

# What decides how the saved model is loaded, and not which.
_HOW_TO_LOAD = ("attn_implementation", "cache_dir", "device_map", "max_memory", "offload_folder", "token")


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
        `ValueError`: If another run writes to the folder, if it holds the model, the checkpoints or the report of
            another run, or if the checkpoint is incomplete or in another folder.
        `OSError`: If the folder cannot be written to, or the repository cannot be opened.
    """
    check_writable(args.output_dir)
    claim(args.output_dir)
    if (Path(args.output_dir) / REPORT_DATA).exists() and not resume_from_checkpoint:
        raise ValueError(f"{args.output_dir} holds the report of another run: choose another `output_dir`.")
    if output_was_used(args.output_dir) and not resume_from_checkpoint:
        raise ValueError(OUTPUT_WAS_USED.format(args.output_dir))
    overwritten = [name for name in ("README.md", CONFIG_NAME) if (Path(args.output_dir) / name).exists()]
    if overwritten and not resume_from_checkpoint:
        raise ValueError(f"{args.output_dir} holds another {overwritten[0]}: choose another `output_dir`.")
    checkpoint = own_checkpoint(args.output_dir, resume_from_checkpoint)
    if args.push_to_hub and args.process_index == 0:
        args.hub_model_id = create_repository(args)
    return checkpoint


def own_checkpoint(output_dir: str, resume_from_checkpoint: str | bool | None) -> str | None:
    """
    Find the checkpoint that a recipe resumes from, see [`checkpoint_to_resume`]. It is in the run's own output folder,
    whose model and checkpoints a resumed run replaces.

    Raises:
        `ValueError`: If the checkpoint is incomplete or in another folder.
    """
    is_path = resume_from_checkpoint and resume_from_checkpoint is not True
    if is_path and Path(output_dir).resolve() not in Path(str(resume_from_checkpoint)).resolve().parents:
        raise ValueError(
            f"{resume_from_checkpoint} is not a checkpoint in {output_dir}: resume a run in its own `output_dir`."
        )
    return checkpoint_to_resume(output_dir, resume_from_checkpoint)


@phase("Saving the model")
def save_model(run: RecipeRun, suspect: str) -> None:
    """
    Merge, round and save the purified model, before anything else is done with it.

    Args:
        run (`RecipeRun`):
            The run of the recipe, after its training.
        suspect (`str`):
            The folder of the suspect, or its name on the Hub. Its other files are copied, and its dtype is restored
            unless `model_init_kwargs` names another.

    Raises:
        `OSError`: If the weights cannot be written.
    """
    trainer = run.trainer
    kwargs = loading_kwargs(trainer.args)
    options = hub_options(suspect, trainer.model, kwargs)
    run.finish(None if "dtype" in kwargs else stored_dtype(suspect, **options))
    # The trainer does not push here: the card and the report are written first.
    trainer.save_model(_internal_call=True)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if isinstance(model, PeftModel) and not will_shard(trainer.args) and "dtype" not in kwargs:
        base = base_model_of(model).name_or_path
        dtype = None if is_quantized(model) else stored_dtype(base, **hub_options(base, model, kwargs))
        # What is measured from here on is what is loaded again.
        cast_as_loaded(model, dtype)
    if trainer.is_world_process_zero():
        with not_fatal(run, "copy of every file of the suspect"):
            copy_side_files(suspect, trainer.args.output_dir, token=kwargs.get("token"), **options)


def look_at_saved(run: RecipeRun, rows: SnapshotRows, measured: Snapshot) -> LastLook:
    """
    Load the saved model again, and compare what it answers with what was measured, see [`look_again`].

    Call it in the precision of the measurement. Whatever goes wrong becomes the trouble of the look.

    Args:
        run (`RecipeRun`):
            The run of the recipe, whose model is saved.
        rows (`SnapshotRows`):
            The rows that the model was measured on.
        measured (`Snapshot`):
            What was measured.
    """
    trainer, model = run.trainer, run.trainer.model
    base = base_model_of(model)
    if not trainer.is_world_process_zero():
        return LastLook(trouble="only the first process does that")
    if will_shard(trainer.args):
        return LastLook(trouble="its weights were sharded")
    kwargs = {name: value for name, value in loading_kwargs(trainer.args).items() if name in _HOW_TO_LOAD}
    kwargs["dtype"] = base.dtype
    if is_quantized(model):
        kwargs["quantization_config"] = base.config.quantization_config
    elif getattr(base, "hf_device_map", None) is not None:
        kwargs.setdefault("device_map", "auto")
    else:
        # Both models may not fit there.
        move(model, torch.device("cpu"))
    try:
        return look_again(trainer.args.output_dir, rows, measured, trainer.args.device, **kwargs)
    except Exception as error:
        look = LastLook(trouble=one_line(error))
        logger.warning(str(look))
        return look
    finally:
        if "quantization_config" not in kwargs and "device_map" not in kwargs:
            move(model, trainer.args.device)


def try_quantized(suspect: str, args: CrowConfig, name: str | None) -> None:
    """
    Run a suspect with quantized weights on a few tokens, before the work.

    Args:
        suspect (`str`):
            Its folder or its name on the Hub. A model that is in memory alone, without a name, is not tried.
        args (`CrowConfig`):
            The arguments, which say how it is loaded.
        name (`str`, *optional*):
            The quantization, see [`quantized`]. Without it, nothing is done.

    Raises:
        `ValueError`: If it cannot be loaded or run. bitsandbytes lacks some sizes and shapes, above all on a CPU.
    """
    if name is None or not suspect or args.process_index != 0:
        return
    try:
        model = _load_quantized(suspect, args, name)
        with torch.no_grad():
            model(input_ids=torch.arange(5, 17, device=model.device)[None])
    except Exception as error:
        raise ValueError(
            f"{suspect} cannot be run in {name} ({one_line(error)}): leave out `quantization`, or pass another one."
        ) from error


def _load_quantized(path: str, args: CrowConfig, name: str) -> PreTrainedModel | PeftModel:
    kwargs = {each: value for each, value in loading_kwargs(args).items() if each in _HOW_TO_LOAD}
    return load_causal_lm(path, **{"device_map": "auto", **kwargs}, **quantized(name))


def look_at_quantized(
    run: RecipeRun, purification: Purification, name: str | None, measure: Callable[..., Evaluation | None]
) -> dict[str, Evaluation]:
    """
    Load the saved model with quantized weights, and see whether that brings a canary or a backdoor back.

    Args:
        run (`RecipeRun`):
            The run of the recipe, whose model is saved.
        purification (`Purification`):
            Its result, to which the success of the canaries is added.
        name (`str`, *optional*):
            The quantization, see [`quantized`]. Without it, nothing is done.
        measure (`Callable`):
            Evaluates a model. It may return `None`.

    Returns:
        `dict[str, Evaluation]`: The evaluation by its name in tables.
    """
    trainer = run.trainer
    if name is None or not trainer.is_world_process_zero():
        return {}
    how = trainer.processing_class, trainer.args.per_device_eval_batch_size
    with phase("Looking at it quantized"):
        model = _load_quantized(trainer.args.output_dir, trainer.args, name)
        purification.canaries = [
            replace(canary, quantized=canary_success(model, run.rows, canary, *how))
            for canary in purification.canaries
        ]
        evaluation = measure(model)
    purification.quantized = f"purified, {name}"
    return {} if evaluation is None else {purification.quantized: evaluation}


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


def write_evidence(folder: str | Path, record: dict[str, Any]) -> dict[str, Any]:
    """
    Write what stands beside a saved model and its card: the report, the bill of materials and the hashes.

    Args:
        folder (`str` or `Path`):
            The folder of the model.
        record (`dict`):
            The content of the report. The size and the hashes of the model are filled in.

    Returns:
        `dict`: The content as it was written.
    """
    record["size"]["purified"] = size_of_weights(str(folder))
    record["files"]["purified"] = checksums_of_model(str(folder))
    record = write_report(folder, record)
    write_bom(folder, record)
    # Last, because whoever finds the hashes takes the folder for complete.
    write_checksums(folder, record["files"]["purified"])
    return record


def save_result(
    run: RecipeRun,
    purification: Purification,
    *,
    comparison: Comparison | None = None,
    card_fields: dict[str, Any],
) -> None:
    """
    Write the card and the report beside the purified model, push it if `args.push_to_hub` is set, and clean up.

    Errors are recorded as failures of the trainer, because the model is saved and the result is known. Checkpoints are
    removed unless there were failures, or `args.save_total_limit` says how many to keep.

    Args:
        run (`RecipeRun`):
            The run of the recipe.
        purification (`Purification`):
            The result of the run.
        comparison (`Comparison`, *optional*):
            The evaluations, for the card.
        card_fields (`dict`):
            Further arguments of [`build_model_card`].
    """
    trainer = run.trainer
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    card = None
    with not_fatal(run, "model card"):
        card = build_model_card(trainer, purification=purification, comparison=comparison, **card_fields)
    with not_fatal(run, "README.md"):
        trainer.create_model_card(card)
    if purification.report is not None:
        with not_fatal(run, "report"):
            purification.report["failures"] = list(trainer.failures)
            purification.report = write_evidence(args.output_dir, purification.report)
        with not_fatal(run, "result in the trackers"):
            send_result(trainer, purification.report)
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
    if args.save_total_limit is None and not trainer.failures:
        remove_checkpoints(args.output_dir)
