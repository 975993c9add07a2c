"""`purify()`: from a suspect and clean rows to a purified model with its evidence, card and report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.rows import drop_unanswered
from ..evaluation.retention import measure_retention
from ..evidence.result import Comparison, Purification
from ..evidence.snapshot import SnapshotRows
from ..files import own_claims
from ..methods.crow.config import CrowConfig, loading_kwargs
from ..progress import LOOKING, phase, restart_clock
from ..reporting.record import adapter_settings, record_of
from ..training.checkpoints import check_writable
from ..training.loading import is_quantized, load_causal_lm, load_tokenizer
from ..training.quantization import quantized
from ..training.recorder import base_model_of
from ..training.sharding import will_shard
from .forecast import announce_forecast
from .holdout import evaluate_held_out, hold_out, reference_of
from .presets import MAX_ROWS, lora_config, recipe_config
from .rehearsal import check_recipe
from .run import LOOKING_AGAIN, RecipeRun
from .saving import look_at_quantized, look_at_saved, not_fatal, prepare_output, save_model, save_result, try_quantized


logger = logging.get_logger(__name__)


@own_claims()
def purify(
    model: str | Path | PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset,
    recipe: str = "strong",
    args: CrowConfig | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    peft_config: PeftConfig | None = None,
    merge: bool = True,
    max_rows: int | None = None,
    resume_from_checkpoint: str | bool | None = None,
    card_fields: dict[str, Any] | None = None,
    text: Sequence[str] | Dataset | None = None,
    quantization: str | None = None,
) -> Purification:
    """
    Purify a suspect model without knowing its backdoor.

    The purified model, its tokenizer, its card (`README.md`) and a report (`report.html`, `report.json`) are written
    to `args.output_dir`. The model is pushed to the Hub if `args.push_to_hub` is set, without the report. After the
    training, `trainer.failures` lists what could not be written or pushed.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            The suspect. A path or a name is loaded with [`load_causal_lm`]. A model is changed. The adapter of a
            `PeftModel` is trained further.
        dataset (`Dataset` or `IterableDataset`):
            About 100 clean rows, better 1,000, in any of the formats of [`crow_hf.data`]. With the recipe `"strong"`,
            prompts without an answer are answered by the suspect itself. Of 40 rows or more, a tenth is held
            out, at least 8 and at most 50: what the purification cost is measured on them.
        recipe (`str`, *optional*, defaults to `"strong"`):
            `"strong"`, `"paper"` or `"guide"`, see [`recipe_config`]. `"strong"` trains a fresh LoRA of rank 16, and
            `"paper"` one of rank 8, unless the suspect is a `PeftModel` or `peft_config` is passed. On sharded weights
            `"strong"` trains all of them. `"guide"` does so everywhere.
        args (`CrowConfig`, *optional*):
            The arguments of that recipe. Defaults to those of [`recipe_config`], with an output folder named after the
            model and the recipe.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. Defaults to the one that was saved with the model.
        peft_config (`PeftConfig`, *optional*):
            The fresh adapter to train, instead of what the recipe trains. An adapter of the suspect is merged first.
        merge (`bool`, *optional*, defaults to `True`):
            Whether to merge a fresh adapter into the weights at the end. On quantized weights it stays an adapter.
        max_rows (`int`, *optional*):
            The number of clean rows to draw from the dataset. 0 uses all of them. Defaults to 1,000 for the recipe
            `"strong"` and 100 for the others. A stream is used as it is.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            As in [`CrowTrainer.train`].
        card_fields (`dict`, *optional*):
            Further arguments of [`build_model_card`], such as `datasets` or `language`.
        text (`Sequence[str]` or `Dataset`, *optional*):
            Running text, as texts or as rows with the column `text`, to measure what the model forgets. It is not
            trained on, and its first 16 windows are used, see [`retention_reference`]. Defaults to text that the
            suspect writes itself.
        quantization (`str`, *optional*):
            `"nf4"` or `"int8"`: measure the saved model with quantized weights too, in case that brings a backdoor
            back.

    Returns:
        [`Purification`]

    Raises:
        `ValueError`: For every input that cannot be purified or purified with, before training starts.
        `OSError`: If `args.output_dir` cannot be written to.

    Example:

    ```python
    >>> from crow_hf import purify

    >>> purification = purify("suspect", clean_rows)
    >>> [(canary.before.rate, canary.after.rate) for canary in purification.canaries]
    ```
    """
    # Prepare
    restart_clock()
    name = str(model) if isinstance(model, (str, Path)) else model.name_or_path
    if args is None:
        args = recipe_config(recipe, f"{Path(name).name or type(model).__name__}-{recipe}")
    check_recipe(recipe, args)
    check_sharding(recipe, args, peft_config)
    quantized(quantization)
    rows, held_out = hold_out(draw_rows(dataset, recipe, max_rows, args.seed), args.seed)
    checkpoint = prepare_output(args, resume_from_checkpoint)
    tokenizer = load_tokenizer(name) if processing_class is None else processing_class
    if isinstance(model, (str, Path)):
        model = load_causal_lm(model, is_trainable=True, **loading_kwargs(args))
    check_base(model, peft_config, merge)
    check_writable(args.output_dir, model)
    try_quantized(model.name_or_path, args, quantization)
    run = RecipeRun(model, rows, recipe, args, tokenizer, peft_config, merge=merge)
    announce_forecast(run.model, rows, args, tokenizer, run.peft_config)
    run.prepare()

    # Look. The answers of the suspect itself are not right ones to compare with, so only the columns of `dataset` are
    # shown.
    visible = run.rows.select_columns(rows.column_names) if isinstance(rows, Dataset) else run.rows
    shown = SnapshotRows.first_of(visible if held_out is None else held_out, tokenizer)
    batch_size = args.per_device_eval_batch_size
    with phase(LOOKING), run.trainer.accelerator.autocast():
        suspect = run.snapshot(shown)
        reference = reference_of(run.trainer.model, tokenizer, shown.rows, text, args.seed, batch_size)
        before = None if held_out is None else evaluate_held_out(run.trainer.model, tokenizer, held_out, batch_size)

    # Implant, train
    run.implant_canaries()
    run.train(checkpoint)
    with run.trainer.accelerator.autocast():
        run.stay_within_budget(reference, batch_size)
    save_model(run, name)
    purification = run.result()

    # Look, report
    comparison = None
    with not_fatal(run, "report"):
        with phase(LOOKING_AGAIN), run.in_quick_precision(), run.trainer.accelerator.autocast():
            purified = run.snapshot(shown)
            purification.snapshots = {"suspect": suspect, "purified": purified}
            purification.retention = measure_retention(run.trainer.model, tokenizer, reference, batch_size)
            if held_out is not None and before is not None:
                after = evaluate_held_out(run.trainer.model, tokenizer, held_out, batch_size, purification.retention)
                purification.held_out = {"suspect": before, "purified": after}
            purification.last_look = look_at_saved(run, shown, purified)
        with not_fatal(run, f"measurement in {quantization}"):
            purification.held_out |= look_at_quantized(
                run,
                purification,
                quantization,
                lambda model: None if held_out is None else evaluate_held_out(model, tokenizer, held_out, batch_size),
            )
        comparison = Comparison.on_held_out_rows(purification)
        purification.report = record_of(
            purification, shown, model_name=name, train_dataset=rows, held_out=held_out, comparison=comparison
        )
    fields = describe_for_card(name, peft_config, merge, max_rows) | (card_fields or {})
    save_result(run, purification, comparison=comparison, card_fields=fields)
    return purification


@overload
def draw_rows(dataset: Dataset, recipe: str, max_rows: int | None, seed: int) -> Dataset: ...
@overload
def draw_rows(dataset: IterableDataset, recipe: str, max_rows: int | None, seed: int) -> IterableDataset: ...
def draw_rows(
    dataset: Dataset | IterableDataset, recipe: str, max_rows: int | None, seed: int
) -> Dataset | IterableDataset:
    """
    Draw the clean rows that a recipe uses from those that have an answer. A stream is returned as it is.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The clean rows.
        recipe (`str`):
            The recipe, for the default of `max_rows`.
        max_rows (`int`, *optional*):
            The number of rows. 0 keeps all of them.
        seed (`int`):
            Seed for the draw.

    Raises:
        `ValueError`: If `max_rows` is negative.
    """
    count = MAX_ROWS[recipe] if max_rows is None else max_rows
    if count < 0:
        raise ValueError(f"`max_rows` is a number of rows, or 0 for all of them, got {count}.")
    if isinstance(dataset, Dataset):
        dataset = drop_unanswered(dataset)
    if not isinstance(dataset, Dataset) or not 0 < count < len(dataset):
        return dataset
    logger.warning(f"{count} of {len(dataset)} clean rows are used. Pass `max_rows=0` to use all of them.")
    return dataset.shuffle(seed=seed).select(range(count))


def check_sharding(recipe: str, args: CrowConfig, peft_config: PeftConfig | None) -> None:
    """
    Refuse a fresh adapter if the weights will be sharded, where it cannot be merged.

    Raises:
        `ValueError`: If a fresh adapter would be trained on sharded weights.
    """
    if will_shard(args) and (peft_config is not None or recipe == "paper"):
        raise ValueError(
            "An adapter cannot be merged into sharded weights (FSDP, ZeRO-3): train all weights with the recipe "
            "`strong` or `guide`, or train the adapter with `CrowTrainer` and save it unmerged."
        )


def check_base(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, merge: bool) -> None:
    """
    Refuse to save a fresh adapter without its base model: a suspect whose own adapter is merged first.

    Raises:
        `ValueError`: If the suspect is an adapter, and the fresh adapter is not merged at the end.
    """
    if peft_config is not None and not merge and isinstance(model, PeftModel):
        raise ValueError(
            "The suspect's adapter is merged before a fresh adapter is trained, and that base model is not saved: set "
            "`merge=True`, or leave out `peft_config` to train the suspect's adapter."
        )
    stays = isinstance(model, PeftModel) if peft_config is None else not merge or is_quantized(model)
    if stays and not base_model_of(model).name_or_path:
        logger.warning(
            "The purified adapter will not name its base model, which has no name: save that model, load it from its "
            "folder, and purify again, or remember it."
        )


def describe_for_card(
    suspect: str, peft_config: PeftConfig | None, merge: bool, max_rows: int | None
) -> dict[str, Any]:
    """
    Return what the card says that the trainer does not know: the suspect, the other arguments of the call, and an
    adapter that only Python can ask for.
    """
    settings = {"max_rows": max_rows, "merge": merge}
    adapter = None
    if isinstance(peft_config, LoraConfig) and peft_config == lora_config(peft_config.r):
        settings |= {"lora": True, "lora_r": peft_config.r}
    elif peft_config is not None:
        changed = ", ".join(f"{name}={value!r}" for name, value in adapter_settings(peft_config).items())
        adapter = f"{type(peft_config).__name__}({changed})"
    # As `crow-hf purify --config` takes them.
    return {
        "finetuned_from": suspect,
        "adapter": adapter,
        "settings": {name: value for name, value in settings.items() if value is not None},
    }
