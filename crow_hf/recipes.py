"""Runs made of several trainings: canaries and a purification, and a purification beside its controls."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from .adapters import adapter_of
from .canaries import Canary, canary_success, draw_canaries, implant_canaries, implant_steps
from .checkpoints import OUTPUT_WAS_USED, check_room, checkpoint_to_resume, output_was_used
from .config import CrowConfig, InvarianceConfig, fine_tuning_config, leaving_nothing, rows_in_step
from .data import render
from .evaluation.generation import answered
from .evaluation.harness import CROW, FINE_TUNING, NO_DEFENCE, STRONG, Evaluation, evaluate_model
from .html_report import REPORT_DATA, write_report
from .invariance_trainer import InvarianceTrainer
from .loading import load_causal_lm, load_tokenizer
from .report import CANARY_ADVICE, canary_outcome
from .run_record import Record, Witness, record_of
from .screening import Screening, screen_dataset
from .shards import in_shards
from .trainer import CrowTrainer
from .triggers import BaseTarget, BaseTrigger


logger = logging.get_logger(__name__)

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
            Known backdoors that were put into the suspect first, and whether the purification removed them.
        report (`dict`, *optional*):
            What `report.json` holds, by the keys of [`crow_hf.run_record`]; `None` if no report was asked for.
    """

    model: PreTrainedModel | PeftModel
    recipe: str
    trainer: CrowTrainer
    screening: Screening | None
    canaries: list[Canary]
    report: Record | None = None


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
    report: bool = True,
) -> Purification:
    """
    Remove whatever backdoor a model may have, without knowing it, and write `report.html` and `report.json`.

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
        report (`bool`, *optional*, defaults to `True`):
            Whether to look at the model before and after, and to write the report into `args.output_dir`.

    Returns:
        [`Purification`]

    Raises:
        `ValueError`: For every input that cannot be purified or purified with, before training starts.
        `OSError`: If `args.output_dir` cannot be written to.

    Example:

    ```python
    >>> from crow_hf import purify

    >>> purification = purify("suspect", clean_rows)
    >>> purification.model.save_pretrained("purified")
    >>> [(canary.before.rate, canary.after.rate) for canary in purification.canaries]
    ```
    """
    path = str(model) if isinstance(model, (str, Path)) else model.name_or_path
    if args is None:
        args = recipe_config(recipe, f"{Path(path).name or type(model).__name__}-{recipe}")
    if recipe not in RECIPES or (recipe == "strong") != isinstance(args, InvarianceConfig):
        raise ValueError(
            f"The recipe {recipe!r} does not go with {type(args).__name__}: make the arguments by recipe_config(recipe, ...)."
        )
    resume_from_checkpoint = _check_output(args, resume_from_checkpoint, report)
    _check_shards(args)
    _check_reporting(args)
    if processing_class is None:
        processing_class = load_tokenizer(path)
    if isinstance(model, (str, Path)):
        model = load_causal_lm(model, is_trainable=True, **(args.model_init_kwargs or {}))
    # A model that cannot be purified is refused before it is looked at, and 4-bit weights are kept from being packed then.
    adapter_of(model, args.perturb)
    if recipe == "paper" and peft_config is None and not isinstance(model, PeftModel):
        peft_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")

    def finished(
        trainer: CrowTrainer, rows: Dataset, screening: Screening | None = None, canaries: Sequence[Canary] = ()
    ) -> Purification:
        # Answers of the suspect's own are no right ones to compare with.
        witness = Witness(rows.select_columns(dataset.column_names), processing_class, args) if report else None
        if report:
            with trainer.accelerator.autocast():
                witness.look(NO_DEFENCE, trainer.model)
        if canaries:
            implant_canaries(trainer.model, rows, canaries, args, processing_class)
            canaries = _measured(canaries, "before", trainer, rows)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        canaries = _measured(canaries, "after", trainer, rows)
        if any(canary_outcome(canary) == "lives" for canary in canaries):
            logger.warning(CANARY_ADVICE)
        purification = Purification(trainer.model, recipe, trainer, screening, canaries)
        if report:
            with _reporting(trainer), trainer.accelerator.autocast():
                witness.look(_name_of(recipe), purification.model)
                _write_report(record_of(purification, witness, model_name=path, train_dataset=dataset), purification)
        return purification

    if recipe != "strong":
        trainer = CrowTrainer(model, args, dataset, processing_class=processing_class, peft_config=peft_config)
        return finished(trainer, dataset)

    if not isinstance(dataset, Dataset) or not len(dataset):
        raise ValueError(
            "`dataset` must be a datasets.Dataset with at least one row: its rows are used many times over."
        )
    model.to(args.device)
    rows = answered(dataset, model, processing_class, args.max_answer_length, args.per_device_eval_batch_size)
    if rows is not dataset:
        # The suspect's greedy answers are only the text along which its whole distribution is taught.
        args = replace(args, label_weight=0.0)
    screening = None
    if args.screen_rows:
        screening = screen_dataset(model, rows, processing_class, args.per_device_eval_batch_size, args.seed)
        rows = screening.clean
        if not len(rows):
            raise ValueError(
                "Every clean row carries a trigger of the model's backdoor: purify with rows from elsewhere."
            )
    canaries = draw_canaries(model, args.num_canaries, args.seed) if args.num_canaries else []
    # The trainer's teacher and what the adversary attacks is the suspect as it is now, without canaries.
    return finished(InvarianceTrainer(model, args, rows, processing_class, peft_config), rows, screening, canaries)


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


def _name_of(recipe: str) -> str:
    """What the purified model is called in a comparison."""
    return STRONG if recipe == "strong" else CROW


def _check_output(args: CrowConfig, resume_from_checkpoint: str | bool | None, report: bool) -> str | None:
    """Refuse, before hours of work, a folder that holds another run or cannot hold this one; returns the checkpoint."""
    if report and (Path(args.output_dir) / REPORT_DATA).exists() and not resume_from_checkpoint:
        raise ValueError(f"{args.output_dir} holds the report of another run: choose another `output_dir`.")
    if output_was_used(args.output_dir) and not resume_from_checkpoint:
        raise ValueError(OUTPUT_WAS_USED.format(args.output_dir))
    check_room(args.output_dir)
    return checkpoint_to_resume(args.output_dir, resume_from_checkpoint)


def _check_shards(args: CrowConfig) -> None:
    """Refuse what needs whole weights in every process."""
    if not in_shards(args):
        return
    if isinstance(args, InvarianceConfig) and args.num_canaries:
        raise ValueError("Canaries cannot be implanted in weights in shards (FSDP, ZeRO-3): set `num_canaries` to 0.")
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "The model is looked at before it is in shards, in every process: set `fsdp_cpu_ram_efficient_loading: false` in "
            "the configuration of accelerate."
        )


@contextmanager
def _reporting(trainer: CrowTrainer) -> Iterator[None]:
    """Whatever goes wrong with a report, the model it is about must not be lost with it."""
    try:
        yield
    except Exception as error:
        trainer.note_failure(
            f"There is no report in {trainer.args.output_dir} ({type(error).__name__}: {error}); the purified model is whole."
        )


def _write_report(record: Record, purification: Purification) -> None:
    purification.report = record
    if purification.trainer.is_world_process_zero():
        write_report(purification.trainer.args.output_dir, record)


def _check_reporting(args: CrowConfig) -> None:
    """Say now what the Trainer, which comes last, would say of a package that is not installed."""
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"`report_to` names what is not installed ({error}): install it, or leave it out.") from error


def _measured(canaries: list[Canary], when: str, trainer: CrowTrainer, rows: Dataset) -> list[Canary]:
    """The canaries with their success in the trainer's model, as what it is `"before"` or `"after"` the purification."""
    batch_size = trainer.args.per_device_eval_batch_size
    with trainer.accelerator.autocast():
        return [
            replace(
                canary, **{when: canary_success(trainer.model, rows, canary, trainer.processing_class, batch_size)}
            )
            for canary in canaries
        ]


def control_config(args: CrowConfig, num_rows: int) -> CrowConfig:
    """
    The arguments of plain fine-tuning with a purification's learning rate, schedule, batch size and number of steps, those
    that implant canaries among them.

    Args:
        args (`CrowConfig`):
            Of the purification.
        num_rows (`int`):
            How many clean rows there are.
    """
    steps = args.max_steps
    if isinstance(args, InvarianceConfig):
        if steps <= 0:
            batches = math.ceil(max(args.num_views, num_rows) / rows_in_step(args))
            steps = math.ceil(args.num_train_epochs * batches)
        steps += implant_steps(args)
    return fine_tuning_config(args, steps)
