"""recipes.comparison"""

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..attacks.targets import BaseTarget
from ..attacks.triggers import BaseTrigger
from ..data.rows import render
from ..evaluation.harness import FINE_TUNING, NO_DEFENCE, Evaluation, evaluate_model
from ..evidence.result import Comparison, Purification
from ..evidence.snapshot import Witness
from ..methods.crow.config import CrowConfig, leaving_nothing
from ..reporting.record import record_of
from .presets import control_config
from .purification import _check_output, _name_of, _reporting, _write_report, purify


logger = logging.get_logger(__name__)


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
    resume_from_checkpoint: str | bool | None = None,
    **evaluation: Any,
) -> Comparison:
    """
    Purify a suspect, and do nothing to it, and fine-tune it plainly, and measure all three in the same way. `report.html` and
    `report.json` in `args.output_dir` show all of it.

    Args:
        load_model (`Callable`):
            Returns a fresh copy of the suspect, ready to be trained, at every call.
        args (`CrowConfig`):
            Of the recipe, see [`recipe_config`]. The control saves nothing.
        train_dataset (`Dataset`):
            The clean rows.
        test_dataset (`Dataset`):
            Other clean rows, to measure on; prompts that are among the clean rows are counted in a warning.
        trigger (`BaseTrigger`, *optional*):
            See [`evaluate_model`].
        target (`BaseTarget`, *optional*):
            See [`evaluate_model`].
        recipe (`str`, *optional*, defaults to `"strong"`):
            See [`purify`].
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        peft_config (`PeftConfig`, *optional*):
            For a fresh adapter in both trainings, which the recipe `"paper"` has without it.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            Of the purification.
        **evaluation:
            Further arguments of [`evaluate_model`].

    Returns:
        `Comparison`

    Raises:
        `ValueError`: In a run of several processes, or if the report of another run is in `args.output_dir`.
    """
    if args.world_size > 1:
        raise ValueError("Defences are compared in one process: purify in many, and measure with one afterwards.")
    resume_from_checkpoint = _check_output(args, resume_from_checkpoint, report=True)
    test_prompts = {render(row, processing_class).prompt for row in test_dataset}
    if seen := sum(render(row, processing_class).prompt in test_prompts for row in train_dataset):
        logger.warning(f"{seen} prompts of the clean rows are test prompts too: what is measured on them is learned.")

    def measure(model: PreTrainedModel | PeftModel) -> Evaluation:
        return evaluate_model(model.to(args.device), processing_class, test_dataset, trigger, target, **evaluation)

    def purified(run_recipe: str, run_args: CrowConfig, resume: str | bool | None = None) -> Purification:
        purification = purify(
            load_model(),
            train_dataset,
            run_recipe,
            run_args,
            processing_class=processing_class,
            peft_config=peft_config,
            resume_from_checkpoint=resume,
            report=False,
        )
        # Mixed precision stays with the training: all models are measured in the precision they were loaded in.
        purification.trainer.accelerator.unwrap_model(purification.model, keep_fp32_wrapper=False)
        return purification

    suspect = load_model()
    evaluations = {NO_DEFENCE: measure(suspect)}
    witness = Witness(test_dataset, processing_class, args, trigger, target, evaluation.get("seed", 0))
    witness.look(NO_DEFENCE, suspect)
    with TemporaryDirectory() as nowhere:
        control = leaving_nothing(control_config(args, len(train_dataset)), nowhere)
        # Without consistency, the published recipes are plain fine-tuning.
        fine_tuned = purified("guide" if recipe == "strong" else recipe, control).model
        evaluations[FINE_TUNING] = measure(fine_tuned)
        witness.look(FINE_TUNING, fine_tuned)
    purification = purified(recipe, args, resume_from_checkpoint)
    evaluations[_name_of(recipe)] = measure(purification.model)
    with _reporting(purification.trainer):
        witness.look(_name_of(recipe), purification.model)
        record = record_of(
            purification,
            witness,
            model_name=suspect.name_or_path,
            train_dataset=train_dataset,
            test_dataset=test_dataset,
            evaluations=evaluations,
        )
        _write_report(record, purification)
    return Comparison(evaluations, purification)
