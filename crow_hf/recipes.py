"""Runs made of several trainings: a purification beside its controls."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .backdoors import Target, Trigger
from .config import CrowConfig
from .evaluation.harness import Evaluation, evaluate_model
from .trainer import CrowTrainer


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
    trigger: Trigger | None = None,
    target: Target | None = None,
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
            Returns a fresh copy of the suspect at every call.
        args (`CrowConfig`):
            Of the purification. The control runs with `alpha=0` and saves nothing.
        train_dataset (`Dataset`):
            The clean rows.
        test_dataset (`Dataset`):
            Other clean rows, to measure on.
        trigger (`Trigger`, *optional*):
            See [`evaluate_model`].
        target (`Target`, *optional*):
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
    """

    def measure(model: PreTrainedModel | PeftModel) -> Evaluation:
        return evaluate_model(model, processing_class, test_dataset, trigger, target, **evaluation)

    def trained(run_args: CrowConfig, resume: str | bool | None = None) -> CrowTrainer:
        trainer = CrowTrainer(
            load_model(), run_args, train_dataset, processing_class=processing_class, peft_config=peft_config
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    evaluations = {NO_DEFENCE: measure(load_model())}
    with TemporaryDirectory() as nowhere:
        control = replace(args, alpha=0.0, output_dir=nowhere, save_strategy="no", push_to_hub=False, report_to="none")
        evaluations[FINE_TUNING] = measure(trained(control).model)
    trainer = trained(args, resume_from_checkpoint)
    evaluations[CROW] = measure(trainer.model)
    return Comparison(evaluations, trainer)
