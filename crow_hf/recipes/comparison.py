"""`compare_defences()`: a purification beside its controls, all measured in the same way."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..attacks.targets import BaseTarget
from ..attacks.triggers import BaseTrigger
from ..data.rows import render
from ..evaluation.harness import Evaluation, evaluate_model
from ..evaluation.retention import RetentionReference
from ..evidence.result import Comparison
from ..evidence.snapshot import SnapshotRows, snapshot
from ..files import own_claims, temporary_folder
from ..methods.crow.config import CrowConfig, scratch_config
from ..methods.invariance.config import with_learning_rate
from ..methods.registry import get_defence
from ..progress import LOOKING, phase, restart_clock
from ..reporting.record import record_of
from ..training.checkpoints import check_writable
from ..training.loading import is_quantized, move
from ..training.quantization import quantized
from .forecast import announce_forecast
from .holdout import reference_of
from .presets import control_config
from .purification import check_base, check_sharding, describe_for_card, draw_rows
from .rehearsal import check_recipe, merge_before, rehearse
from .run import CONTROL, LOOKING_AGAIN, RecipeRun, default_adapter, run_recipe
from .saving import look_at_quantized, look_at_saved, not_fatal, prepare_output, save_model, save_result, try_quantized


logger = logging.get_logger(__name__)


@own_claims()
def compare_defences(
    load_model: Callable[[], PreTrainedModel | PeftModel],
    args: CrowConfig,
    train_dataset: Dataset,
    test_dataset: Dataset,
    trigger: BaseTrigger | None = None,
    target: BaseTarget | None = None,
    *,
    recipe: str = "strong",
    processing_class: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None = None,
    merge: bool = True,
    max_rows: int | None = None,
    resume_from_checkpoint: str | bool | None = None,
    card_fields: dict[str, Any] | None = None,
    text: Sequence[str] | Dataset | None = None,
    defences: Sequence[str] = (),
    quantization: str | None = None,
    **evaluation: Any,
) -> Comparison:
    """
    Purify a suspect, and measure it beside two controls: the suspect as it is, and plain fine-tuning.

    The purified model, its card and a report with all evaluations are written to `args.output_dir`, as [`purify`]
    does. The control is not saved.

    Args:
        load_model (`Callable`):
            Returns a fresh copy of the suspect, ready to be trained, at every call.
        args (`CrowConfig`):
            The arguments of the recipe, see [`recipe_config`].
        train_dataset (`Dataset`):
            The clean rows.
        test_dataset (`Dataset`):
            Other clean rows, to measure on. A warning counts the prompts that are also among the clean rows.
        trigger (`BaseTrigger`, *optional*):
            A known trigger, see [`evaluate_model`].
        target (`BaseTarget`, *optional*):
            The target of that trigger, see [`evaluate_model`].
        recipe (`str`, *optional*, defaults to `"strong"`):
            See [`purify`].
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        peft_config (`PeftConfig`, *optional*):
            Train a fresh adapter of this kind, in the purification and in the control.
        merge (`bool`, *optional*, defaults to `True`):
            See [`purify`].
        max_rows (`int`, *optional*):
            See [`purify`].
        resume_from_checkpoint (`str` or `bool`, *optional*):
            Resumes the purification, see [`purify`].
        card_fields (`dict`, *optional*):
            See [`purify`].
        text (`Sequence[str]` or `Dataset`, *optional*):
            Running text, to measure what the control and the purified model forget, see [`purify`].
        defences (`Sequence[str]`, *optional*):
            Names of defences to measure too, see [`register_defence`]. They get a fresh suspect, the clean rows, and
            the arguments of the control.
        quantization (`str`, *optional*):
            See [`purify`].
        **evaluation:
            Further arguments of [`evaluate_model`].

    Returns:
        [`Comparison`]

    Raises:
        `ValueError`: In a run of several processes, if the output folder holds another run, and for every input that
            cannot be purified or purified with.
    """
    # Prepare
    restart_clock()
    if args.world_size > 1:
        raise ValueError(
            "Defences are compared in one process: purify with several processes, and measure with one afterwards."
        )
    if not isinstance(train_dataset, Dataset):
        raise ValueError(
            f"`train_dataset` must be a datasets.Dataset, got {type(train_dataset).__name__}, because the "
            "purification and the control train on the same rows."
        )
    check_recipe(recipe, args)
    check_sharding(recipe, args, peft_config)
    quantized(quantization)
    own_defences = {each: get_defence(each) for each in defences}
    rows = draw_rows(train_dataset, recipe, max_rows, args.seed)
    _warn_of_shared_prompts(rows, test_dataset, processing_class)
    checkpoint = prepare_output(args, resume_from_checkpoint)
    shown = SnapshotRows.first_of(test_dataset, processing_class, trigger, target, evaluation.get("seed", 0))

    def measure(model: PreTrainedModel | PeftModel, reference: RetentionReference | None = None) -> Evaluation:
        return evaluate_model(
            model, processing_class, test_dataset, trigger, target, reference=reference, **evaluation
        )

    # Look
    suspect = move(load_model(), args.device)
    check_base(suspect, peft_config, merge)
    check_writable(args.output_dir, suspect)
    name = suspect.name_or_path
    try_quantized(name, args, quantization)
    suspect, args = merge_before(suspect, peft_config), with_learning_rate(args, suspect)
    adapter = peft_config or default_adapter(recipe, suspect, args)
    merges = merge and adapter is not None and not is_quantized(suspect)
    rehearse(suspect, rows, args, processing_class, adapter, merges)
    announce_forecast(suspect, rows, args, processing_class, adapter, num_test_rows=len(test_dataset))
    with phase(LOOKING):
        suspect_scores = measure(suspect)
        snapshots = {"suspect": snapshot(suspect, shown, args)}
        batch_size = evaluation.get("batch_size", 32)
        reference = reference_of(suspect, processing_class, shown.rows, text, args.seed, batch_size)
    del suspect

    def fine_tuning_args(folder: str) -> CrowConfig:
        return scratch_config(control_config(args, len(rows)), folder)

    # Run the caller's own defences, which are the most likely to fail
    others = {}
    for each, defence in own_defences.items():
        with temporary_folder() as folder, phase(f"Measuring {each}"):
            model = move(load_model(), args.device)
            model = move(defence(model, rows, processing_class, fine_tuning_args(folder)), args.device)
            others[each] = measure(model, reference)
            del model

    # Train the control, on the same weights. Without the consistency loss, the published recipes are plain
    # fine-tuning.
    with temporary_folder() as folder, phase(CONTROL):
        control_args = fine_tuning_args(folder)
        control_recipe = "guide" if recipe == "strong" else recipe
        loaded = load_model()
        control = run_recipe(
            loaded,
            rows,
            control_recipe,
            control_args,
            processing_class=processing_class,
            peft_config=peft_config or default_adapter(recipe, loaded, args),
        )
        del loaded
        control_model = _in_loaded_precision(control.trainer)
        control_scores = measure(control_model, reference)
        snapshots["control"] = snapshot(control_model, shown, args)
        del control, control_model

    # Implant, train
    run = RecipeRun(load_model(), rows, recipe, args, processing_class, peft_config, merge=merge)
    run.prepare()
    run.implant_canaries()
    run.train(checkpoint)
    run.stay_within_budget(reference, batch_size)
    save_model(run, name)

    # Look, report
    purification, purified = run.result(), _in_loaded_precision(run.trainer)
    with phase(LOOKING_AGAIN), run.in_quick_precision():
        purified_scores = measure(purified, reference)
    purification.retention = purified_scores.retention
    comparison = Comparison(suspect_scores, control_scores, purified_scores, others, purification)
    with not_fatal(run, "report"):
        with run.in_quick_precision():
            snapshots["purified"] = snapshot(purified, shown, args)
            purification.last_look = look_at_saved(run, shown, snapshots["purified"])
        with not_fatal(run, f"measurement in {quantization}"):
            comparison.others |= look_at_quantized(
                run, purification, quantization, lambda model: measure(model, reference)
            )
        purification.snapshots = snapshots
        datasets: dict[str, Any] = {"train_dataset": rows, "test_dataset": test_dataset}
        purification.report = record_of(purification, shown, model_name=name, comparison=comparison, **datasets)
    fields = describe_for_card(name, peft_config, merge, max_rows) | (card_fields or {})
    save_result(run, purification, comparison=comparison, card_fields=fields)
    return comparison


def _warn_of_shared_prompts(rows: Dataset, test_dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    test_prompts = {render(row, tokenizer).prompt for row in test_dataset}
    if shared := sum(render(row, tokenizer).prompt in test_prompts for row in rows):
        logger.warning(
            f"{shared} prompts of the clean rows are also test prompts: the model learns what it is tested on."
        )


def _in_loaded_precision(trainer: Any) -> PreTrainedModel | PeftModel:
    """
    Return the trained model without mixed precision, because every model is measured in the precision it was loaded
    in.
    """
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
