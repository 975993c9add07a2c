"""Runs made of several trainings: a purification with its evidence, and a purification beside its controls."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .canaries import Canary, try_canaries
from .config import CrowConfig, InvarianceConfig
from .data import render
from .evaluation.generation import answered
from .evaluation.harness import Evaluation, evaluate_model
from .invariance_trainer import InvarianceTrainer
from .loading import load_causal_lm, load_tokenizer
from .screening import Screening, screen_dataset
from .trainer import OUTPUT_WAS_USED, CrowTrainer, output_was_used
from .triggers import BaseTarget, BaseTrigger


logger = logging.get_logger(__name__)

NO_DEFENCE, FINE_TUNING, CROW, STRONG = "no defence", "fine-tuning", "CROW", "strong recipe"


RECIPES = ("strong", "paper", "guide")
# Section 4.4 of the paper.
PAPER = {
    "learning_rate": 1e-3,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}


@dataclass
class Purification:
    """
    A purified model, and what is known about it.

    Attributes:
        model (`PreTrainedModel` or `PeftModel`):
            The purified model; an adapter that was trained is still one.
        recipe (`str`):
            One of [`RECIPES`].
        trainer (`CrowTrainer`):
            With the arguments and the log.
        screening (`Screening`, *optional*):
            Which clean rows were left out because they carry a trigger.
        canaries (`list[Canary]`):
            Known backdoors that were put into a copy of the suspect, and whether the same purification removed them.
    """

    model: PreTrainedModel | PeftModel
    recipe: str
    trainer: CrowTrainer
    screening: Screening | None
    canaries: list[Canary]


def recipe_config(recipe: str, output_dir: str, **changes: Any) -> CrowConfig:
    """
    The arguments of a recipe.

    Args:
        recipe (`str`):
            `"strong"`: [`InvarianceConfig`]. `"paper"`: CROW as published. `"guide"`: the defaults of [`CrowConfig`].
        output_dir (`str`):
            See [`CrowConfig`].
        **changes:
            Any arguments of that configuration.

    Raises:
        `ValueError`: If there is no such recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, got {recipe!r}.")
    if recipe == "strong":
        return InvarianceConfig(output_dir, **changes)
    return CrowConfig(output_dir, **((PAPER if recipe == "paper" else {}) | changes))


def purify(
    model: str | PreTrainedModel | PeftModel,
    dataset: Dataset,
    recipe: str = "strong",
    args: CrowConfig | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    peft_config: PeftConfig | None = None,
    resume_from_checkpoint: str | bool | None = None,
) -> Purification:
    """
    Remove whatever backdoor a model may have, without knowing it.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            The suspect. A model is changed; a path is loaded by [`load_causal_lm`]. The adapter of a `PeftModel` is trained on.
        dataset (`Dataset`):
            About 100 clean rows, better 1,000. Rows without an answer get the suspect's own with the recipe `"strong"`.
        recipe (`str`, *optional*, defaults to `"strong"`):
            `"strong"`, `"paper"` or `"guide"`; see [`recipe_config`]. `"paper"` trains a fresh LoRA of rank 8 unless the suspect
            is a `PeftModel` or `peft_config` says otherwise.
        args (`CrowConfig`, *optional*):
            Of that recipe; without it, its defaults and an output directory named after the model.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer; without it, the one saved with the model.
        peft_config (`PeftConfig`, *optional*):
            Train a fresh adapter of this kind and leave the model's own weights as they are.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            As in [`CrowTrainer.train`].

    Returns:
        [`Purification`]

    Raises:
        `ValueError`: For every input that cannot be purified or purified with, before training starts.

    Example:

    ```python
    >>> from crow_hf import purify

    >>> purification = purify("suspect", clean_rows)
    >>> purification.model.save_pretrained("purified")
    >>> [(canary.before.rate, canary.after.rate) for canary in purification.canaries]
    ```
    """
    path = str(model) if isinstance(model, (str, Path)) else model.config._name_or_path
    if args is None:
        args = recipe_config(recipe, f"{Path(path).name or type(model).__name__}-{recipe}")
    if recipe not in RECIPES or (recipe == "strong") != isinstance(args, InvarianceConfig):
        raise ValueError(
            f"The recipe {recipe!r} does not go with {type(args).__name__}: make the arguments by recipe_config(recipe, ...)."
        )
    if processing_class is None:
        processing_class = load_tokenizer(path)
    if isinstance(model, (str, Path)):
        model = load_causal_lm(model, is_trainable=True, **(args.model_init_kwargs or {}))
    if recipe == "paper" and peft_config is None and not isinstance(model, PeftModel):
        peft_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if recipe != "strong":
        trainer = CrowTrainer(model, args, dataset, processing_class=processing_class, peft_config=peft_config)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        return Purification(trainer.model, recipe, trainer, None, [])

    if not isinstance(dataset, Dataset) or not len(dataset):
        raise ValueError(
            "`dataset` must be a datasets.Dataset with at least one row: its rows are used many times over."
        )
    if output_was_used(args.output_dir) and not resume_from_checkpoint:
        raise ValueError(OUTPUT_WAS_USED.format(args.output_dir))
    model.to(args.device)
    dataset = answered(dataset, model, processing_class, args.max_answer_length, args.per_device_eval_batch_size)
    screening = None
    if args.screen_rows:
        screening = screen_dataset(model, dataset, processing_class, args.per_device_eval_batch_size, args.seed)
        dataset = screening.clean
        if not len(dataset):
            raise ValueError(
                "Every clean row carries a trigger of the model's backdoor: purify with rows from elsewhere."
            )

    def trained(suspect: PreTrainedModel | PeftModel, run_args: InvarianceConfig, resume=None) -> InvarianceTrainer:
        trainer = InvarianceTrainer(suspect, run_args, dataset, processing_class, peft_config)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    canaries = []
    if args.num_canaries:
        with TemporaryDirectory() as nowhere:
            canary_args = _leaving_nothing(args, nowhere)
            canaries = try_canaries(
                model, dataset, canary_args, processing_class, lambda copy: trained(copy, canary_args).model
            )
    trainer = trained(model, args, resume_from_checkpoint)
    return Purification(trainer.model, recipe, trainer, screening, canaries)


@dataclass
class Comparison:
    """
    A purification beside its controls.

    Attributes:
        evaluations (`dict[str, Evaluation]`):
            By the names `"no defence"`, `"fine-tuning"` (the same rows, number of steps and learning rate), and last `"CROW"` or
            `"strong recipe"`.
        purification (`Purification`):
            With the purified model and the log.
    """

    evaluations: dict[str, Evaluation]
    purification: Purification

    @property
    def trainer(self) -> CrowTrainer:
        """Of the purification."""
        return self.purification.trainer


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
    Purify a suspect, and do nothing to it, and fine-tune it plainly, and measure all three in the same way.

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
        `ValueError`: In a run of several processes.
    """
    if args.world_size > 1:
        raise ValueError("Defences are compared in one process: purify in many, and measure with one afterwards.")
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
        )
        # Mixed precision stays with the training: all models are measured in the precision they were loaded in.
        purification.trainer.accelerator.unwrap_model(purification.model, keep_fp32_wrapper=False)
        return purification

    evaluations = {NO_DEFENCE: measure(load_model())}
    with TemporaryDirectory() as nowhere:
        control = _leaving_nothing(control_config(args, len(train_dataset)), nowhere)
        # Without consistency, the published recipes are plain fine-tuning.
        evaluations[FINE_TUNING] = measure(purified("guide" if recipe == "strong" else recipe, control).model)
    purification = purified(recipe, args, resume_from_checkpoint)
    evaluations[STRONG if recipe == "strong" else CROW] = measure(purification.model)
    return Comparison(evaluations, purification)


def _leaving_nothing(args: CrowConfig, folder: str) -> CrowConfig:
    """The arguments of a run beside the one that was asked for: it saves, pushes and reports nothing."""
    return replace(args, output_dir=folder, save_strategy="no", push_to_hub=False, report_to="none")


def control_config(args: CrowConfig, num_rows: int) -> CrowConfig:
    """
    The arguments of plain fine-tuning with a purification's learning rate, schedule, batch size and number of steps.

    Args:
        args (`CrowConfig`):
            Of the purification.
        num_rows (`int`):
            How many clean rows there are.
    """
    shared = {each.name: getattr(args, each.name) for each in fields(CrowConfig) if each.init}
    if isinstance(args, InvarianceConfig) and args.max_steps <= 0:
        batch_size = args.train_batch_size * args.gradient_accumulation_steps
        batches = math.ceil(max(args.num_views, num_rows) / batch_size)
        shared["max_steps"] = math.ceil(args.num_train_epochs * batches)
    return CrowConfig(**shared | {"alpha": 0.0})
