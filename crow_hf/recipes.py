"""Runs made of several trainings: a purification beside its controls."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .config import CrowConfig
from .data import render
from .evaluation.harness import Evaluation, evaluate_model
from .trainer import CrowTrainer
from .triggers import BaseTarget, BaseTrigger


logger = logging.get_logger(__name__)

NO_DEFENCE, FINE_TUNING, CROW = "no defence", "fine-tuning", "CROW"


@dataclass
class Comparison:
    """
    A purification beside its controls.

    Attributes:
        evaluations (`dict[str, Evaluation]`):
            By the names `"no defence"`, `"fine-tuning"` (the same rows, order, steps and learning rate) and `"CROW"`.
        trainer (`CrowTrainer`):
            Of the purification, with the purified model and the log.
    """

    evaluations: dict[str, Evaluation]
    trainer: CrowTrainer


def compare_defences(
    load_model: Callable[[], PreTrainedModel | PeftModel],
    args: CrowConfig,
    train_dataset: Dataset,
    test_dataset: Dataset,
    trigger: BaseTrigger | None = None,
    target: BaseTarget | None = None,
    *,
    processing_class: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None = None,
    resume_from_checkpoint: str | bool | None = None,
    **evaluation: Any,
) -> Comparison:
    """
    Purify a suspect, and do nothing to it, and fine-tune it plainly, and measure all three in the same way.

    Args:
        load_model (`Callable`):
            Returns a fresh copy of the suspect, ready to be trained, at every call.
        args (`CrowConfig`):
            Of the purification. The control runs with `alpha=0` and saves nothing.
        train_dataset (`Dataset`):
            The clean rows.
        test_dataset (`Dataset`):
            Other clean rows, to measure on; prompts that are among the clean rows are counted in a warning.
        trigger (`BaseTrigger`, *optional*):
            See [`evaluate_model`].
        target (`BaseTarget`, *optional*):
            See [`evaluate_model`].
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        peft_config (`PeftConfig`, *optional*):
            For a fresh adapter in both trainings.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            Of the purification.
        **evaluation:
            Further arguments of [`evaluate_model`].

    Returns:
        `Comparison`

    Raises:
        `ValueError`: In a run of several processes.
    """
    if args.world_size > 1:
        raise ValueError("Defences are compared in one process: purify in many, and measure with one afterwards.")
    test_prompts = {render(row, processing_class).prompt for row in test_dataset}
    if seen := sum(render(row, processing_class).prompt in test_prompts for row in train_dataset):
        logger.warning(f"{seen} prompts of the clean rows are test prompts too: what is measured on them is learned.")

    def measure(model: PreTrainedModel | PeftModel) -> Evaluation:
        return evaluate_model(model.to(args.device), processing_class, test_dataset, trigger, target, **evaluation)

    def trained(run_args: CrowConfig, resume: str | bool | None = None) -> CrowTrainer:
        trainer = CrowTrainer(
            load_model(), run_args, train_dataset, processing_class=processing_class, peft_config=peft_config
        )
        trainer.train(resume_from_checkpoint=resume)
        # Mixed precision stays with the training: all models are measured in the precision they were loaded in.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        return trainer

    evaluations = {NO_DEFENCE: measure(load_model())}
    with TemporaryDirectory() as nowhere:
        control = replace(args, alpha=0.0, output_dir=nowhere, save_strategy="no", push_to_hub=False, report_to="none")
        evaluations[FINE_TUNING] = measure(trained(control).model)
    trainer = trained(args, resume_from_checkpoint)
    evaluations[CROW] = measure(trainer.model)
    return Comparison(evaluations, trainer)
