"""Runs made of several trainings: canaries and a purification, and a purification beside its controls."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from ..evaluation.generation import answered
from ..evaluation.harness import CROW, NO_DEFENCE, STRONG
from ..evidence.canaries import Canary, canary_success, draw_canaries, implant_canaries
from ..evidence.result import Purification
from ..evidence.screening import Screening, screen_dataset
from ..evidence.snapshot import Witness
from ..methods.crow.config import CrowConfig
from ..methods.crow.trainer import CrowTrainer
from ..methods.invariance.config import InvarianceConfig
from ..methods.invariance.trainer import InvarianceTrainer
from ..reporting.html import REPORT_DATA, write_report
from ..reporting.record import Record, record_of
from ..reporting.verdict import CANARY_ADVICE, canary_outcome
from ..training.checkpoints import OUTPUT_WAS_USED, check_room, checkpoint_to_resume, output_was_used
from ..training.loading import load_causal_lm, load_tokenizer
from ..training.recorder import recorder_of
from ..training.sharding import in_shards
from .presets import RECIPES, recipe_config


logger = logging.get_logger(__name__)


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
    recorder_of(model, args.perturb)
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
