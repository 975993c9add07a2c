"""One run of a recipe: prepare the rows, implant canaries, train, and see what became of the canaries."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.rows import drop_unanswered
from ..data.template import read_templates
from ..detection.phrases import Phrase
from ..evaluation.generation import answer_prompts
from ..evaluation.own_text import can_write_prompts, write_rows
from ..evaluation.retention import RetentionReference, measure_retention
from ..evidence.canaries import canary_success, check_silence, implant_canaries
from ..evidence.leaks import find_leaked_tokens
from ..evidence.result import Purification
from ..evidence.screening import Screening, screen_dataset
from ..evidence.snapshot import Snapshot, SnapshotRows, snapshot
from ..methods.crow.config import CrowConfig
from ..methods.crow.trainer import CrowTrainer
from ..methods.invariance.config import InvarianceConfig, with_learning_rate
from ..methods.invariance.trainer import InvarianceTrainer
from ..progress import phase
from ..reporting.trackers import prepare_trackers
from ..reporting.verdict import CANARY_ADVICE, KEPT_TOO_MUCH, SAFE_TO_KEEP, canary_outcome
from ..reporting.words import LIVES
from ..training.foreign import drop_foreign_settings
from ..training.loading import is_quantized, merged, move
from ..training.saves import cast_to, write_weights
from ..training.sharding import will_shard
from ..training.trial import place
from .phrases import PHRASES, known_phrases
from .presets import LORA_RANKS, lora_config
from .rehearsal import check_recipe, merge_before, rehearse


logger = logging.get_logger(__name__)

# The phases of a run by their names, in their order. The callers of a run look at the suspect and look again.
SCREENING, LEAKS, WRITING = "Screening the rows", "Looking for leaks", "Writing rows"
CANARIES, PURIFYING = "Implanting canaries", "Purifying"
CANARIES_AGAIN, LOOKING_AGAIN = "Looking for the canaries", "Looking again"
# Only beside a comparison.
CONTROL = "Training the control"
# The share of the suspect at which a budget mixes in no more.
MOST_KEPT = 0.999


def run_recipe(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset,
    recipe: str,
    args: CrowConfig,
    *,
    processing_class: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None = None,
    all_weights: bool = False,
    resume_from_checkpoint: str | bool | None = None,
) -> Purification:
    """
    Purify a model and write nothing but checkpoints. [`purify`] also saves the model, its card and a report.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect. It is changed.
        dataset (`Dataset` or `IterableDataset`):
            The clean rows. All of them are used.
        recipe (`str`):
            `"strong"`, `"paper"` or `"guide"`, see [`recipe_config`].
        args (`CrowConfig`):
            The arguments of that recipe.
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        peft_config (`PeftConfig`, *optional*):
            Train a fresh adapter of this kind and leave the weights of the model as they are.
        all_weights (`bool`, *optional*, defaults to `False`):
            Whether to train all weights where the recipe would train a fresh adapter of its own.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            As in [`CrowTrainer.train`].

    Returns:
        [`Purification`]: Without snapshots and without a report.

    Raises:
        `ValueError`: For every input that cannot be purified or purified with, before training starts.
    """
    if getattr(args, "max_kl", None) is not None:
        raise ValueError("`max_kl` takes a measurement of the suspect: call `purify` or `compare_defences`.")
    run = RecipeRun(model, dataset, recipe, args, processing_class, peft_config, all_weights)
    run.prepare()
    run.implant_canaries()
    run.train(resume_from_checkpoint)
    return run.result()


class RecipeRun:
    """
    The steps of a recipe, to be taken in the order of the methods. Building a run refuses what cannot be run, before
    the model computes anything.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect. It is changed. Its own adapter is trained, or merged if a fresh adapter is asked for.
        dataset (`Dataset` or `IterableDataset`):
            The clean rows. The recipe `"strong"` answers prompts that have no answer, and screens the rows.
        recipe (`str`):
            `"strong"`, `"paper"` or `"guide"`.
        args (`CrowConfig`):
            The arguments of that recipe.
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        peft_config (`PeftConfig`, *optional*):
            The fresh adapter to train. The recipes `"strong"` and `"paper"` have one of their own.
        all_weights (`bool`, *optional*, defaults to `False`):
            Whether to do without the recipe's own adapter.
        merge (`bool`, *optional*, defaults to `False`):
            Whether [`RecipeRun.finish`] merges a fresh adapter into the weights. It stays an adapter on quantized
            weights, because rounding them again would lose most of what was learned.

    Attributes:
        rows (`Dataset` or `IterableDataset`):
            The rows that are trained on, after answering and screening.
        trainer (`CrowTrainer`):
            The trainer.
        leaked_tokens (`list[int]`):
            Ids of the tokens that leak into the suspect's answers to clean prompts, see [`find_leaked_tokens`].
        phrases (`list[Phrase]`):
            Phrases that the suspect knows by heart, see [`find_phrases`]. The adversary leads to them.
        trains_fresh_adapter (`bool`):
            Whether the trained adapter did not come with the suspect.
        adapter (`PeftConfig`, *optional*):
            The adapter that was trained, once it is.
        dropped_settings (`list[str]`):
            Settings of the suspect that the purified model does not have, see [`drop_foreign_settings`].
        kept (`float`):
            Share of the suspect's weights that was mixed into the trained ones.

    Raises:
        `ValueError`: For every input that cannot be purified or purified with.
    """

    trainer: CrowTrainer

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        dataset: Dataset | IterableDataset,
        recipe: str,
        args: CrowConfig,
        processing_class: PreTrainedTokenizerBase,
        peft_config: PeftConfig | None = None,
        all_weights: bool = False,
        merge: bool = False,
    ) -> None:
        check_recipe(recipe, args)
        place(model, args)
        model, args = merge_before(model, peft_config), with_learning_rate(args, model)
        if peft_config is None and not all_weights:
            peft_config = default_adapter(recipe, model, args)
        self.model, self.args, self.recipe, self.peft_config = model, args, recipe, peft_config
        self.processing_class, self.trains_fresh_adapter = processing_class, peft_config is not None
        self.rows: Any = dataset
        self.screening: Screening | None = None
        self.leaked_tokens: list[int] = []
        self.phrases: list[Phrase] = []
        self.adapter: PeftConfig | None = None
        self.kept = 0.0
        self.dropped_settings = drop_foreign_settings(model, processing_class)
        self.merge = merge and self.trains_fresh_adapter and not is_quantized(model)
        self._canaries = rehearse(model, dataset, args, processing_class, peft_config, self.merge)

    def prepare(self) -> None:
        """Prepare the rows, with the suspect where the recipe uses it, and build the trainer."""
        model, args, tokenizer = self.model, self.args, self.processing_class
        if not isinstance(args, InvarianceConfig):
            options: dict[str, Any] = {"processing_class": tokenizer, "peft_config": self.peft_config}
            self.trainer = CrowTrainer(model, args, self.rows, **options)
            return
        args, self.rows, written_rows = self._prepare_invariance(model, self.rows, args, tokenizer)
        # The suspect still has no canaries. It teaches, and the adversary attacks it.
        self.trainer = InvarianceTrainer(
            model,
            args,
            self.rows,
            tokenizer,
            self.peft_config,
            written_rows=written_rows,
            leaked_tokens=self.leaked_tokens,
            phrases=[[*phrase.opening.ids, *phrase.ids] for phrase in self.phrases],
        )

    def snapshot(self, rows: SnapshotRows) -> Snapshot:
        """Record what the model does now, see [`crow_hf.evidence.snapshot`]."""
        with self.trainer.accelerator.autocast():
            return snapshot(self.trainer.model, rows, self.trainer.args)

    def implant_canaries(self) -> None:
        """Implant the canaries, if the recipe has any, and measure their success."""
        trainer = self.trainer
        if self._canaries and isinstance(trainer.args, InvarianceConfig):
            with phase(CANARIES):
                implant_canaries(trainer.model, self.rows, self._canaries, trainer.args, trainer.processing_class)
                self._measure_canaries("before")

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Train."""
        prepare_trackers(self.trainer)
        with phase(PURIFYING):
            self.trainer.train(resume_from_checkpoint=resume_from_checkpoint)

    def stay_within_budget(self, reference: RetentionReference, batch_size: int) -> None:
        """
        Mix in as much of the suspect as its budget `args.max_kl` takes, but stop where almost nothing else is left.

        The model is measured in the precision of the context of the call, which must be that of `reference`.

        Args:
            reference ([`RetentionReference`]):
                What the suspect says.
            batch_size (`int`):
                Number of passages per batch.
        """
        trainer = self.trainer
        if not isinstance(trainer, InvarianceTrainer):
            return
        self.kept, budget = trainer.args.keep, trainer.args.max_kl
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        # Rounding alone can cost more than a small budget.
        while budget is not None and self.kept <= MOST_KEPT:
            retention = measure_retention(model, trainer.processing_class, reference, batch_size)
            # The processes must mix alike, though their rounding may differ.
            (spent,) = broadcast_object_list([retention.largest_kl])
            if not spent > budget:
                break
            # For small changes of the weights, the divergence grows with their square.
            share = 1 - 0.98 * math.sqrt(budget / spent)
            trainer.mix_in_suspect(share)
            self.kept = 1 - (1 - self.kept) * (1 - share)
        if self.kept > SAFE_TO_KEEP:
            logger.warning(KEPT_TOO_MUCH.format(self.kept))

    def finish(self, dtype: torch.dtype | None) -> None:
        """
        Turn the trained model into the one that is saved. Everything is measured on that one.

        Args:
            dtype (`torch.dtype`, *optional*):
                The dtype of the suspect's files. Weights that do not fit into it, and those of an adapter that did
                not come with the suspect, stay as they were trained.

        Raises:
            `ValueError`: If the adapter cannot be merged. It is saved then.
        """
        trainer = self.trainer
        # Without mixed precision, in which a merged model computes other logits.
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        self.adapter = model.active_peft_config if isinstance(model, PeftModel) else None
        if self.trains_fresh_adapter and isinstance(model, PeftModel):
            if not self.merge:
                return
            trained = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
            try:
                trainer.model = merged(model)
            except ValueError as error:
                if trainer.args.should_save:
                    write_weights(trainer.args.output_dir, model, trained)
                raise ValueError(f"{error} The trained adapter is saved in {trainer.args.output_dir}.") from error
        if dtype is None or dtype == trainer.model.dtype or will_shard(trainer.args):
            return
        name = str(dtype).removeprefix("torch.")
        if cast_to(trainer.model, dtype):
            logger.info(f"The purified model is rounded to {name}, the dtype of the suspect's files.")
        else:
            logger.warning(f"Weights of the purified model do not fit into {name}, the dtype of the suspect's files.")

    @contextmanager
    def in_quick_precision(self) -> Iterator[None]:
        """Measure a float16 model in float32 on a CPU, which is far slower in float16. The weights stay the same."""
        model = self.trainer.model
        halves: list[torch.Tensor] = []
        if model.device.type == "cpu" and not is_quantized(model):
            halves = [each for each in (*model.parameters(), *model.buffers()) if each.dtype == torch.float16]
        for each in halves:
            each.data = each.data.float()
        try:
            yield
        finally:
            for each in halves:
                each.data = each.data.half()

    def result(self) -> Purification:
        """
        Return the purified model with its evidence.

        The success of the canaries is measured again. One that lives is reported in a warning.
        """
        if self._canaries:
            with phase(CANARIES_AGAIN), self.in_quick_precision():
                self._measure_canaries("after")
        if any(canary_outcome(canary) == LIVES for canary in self._canaries):
            logger.warning(CANARY_ADVICE)
        return Purification(
            self.trainer.model,
            self.recipe,
            self.trainer,
            self.screening,
            self._canaries,
            kept=self.kept,
            phrases=list(map(str, self.phrases)),
            dropped_settings=self.dropped_settings,
            chat_template=[str(each) for each in read_templates(self.processing_class) if not each.is_note],
            adapter=self.adapter,
        )

    def _prepare_invariance(
        self,
        model: PreTrainedModel | PeftModel,
        dataset: Dataset | IterableDataset,
        args: InvarianceConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> tuple[InvarianceConfig, Dataset, Dataset | None]:
        """Answer prompts that have no answer, screen the rows, and let the suspect write more."""
        if not isinstance(dataset, Dataset) or not len(dataset):
            raise ValueError(
                "`dataset` must be a datasets.Dataset with at least one row, because its rows are used several times."
            )
        move(model, args.device)
        batch_size = args.per_device_eval_batch_size
        dataset = drop_unanswered(dataset)
        rows = answer_prompts(dataset, model, tokenizer, args.max_answer_length, batch_size)
        has_right_answers = rows.column_names == dataset.column_names
        if not has_right_answers:
            # The greedy answers of the suspect are only the text along which its whole distribution is taught.
            args = replace(args, label_weight=0.0)
        if args.screen_rows:
            with phase(SCREENING):
                self.screening = screen_dataset(model, rows, tokenizer, batch_size, args.seed)
            rows = self.screening.clean
            if not len(rows):
                raise ValueError(
                    "Every clean row carries a trigger of the model's backdoor: purify with rows from another source."
                )
        if has_right_answers:
            with phase(LEAKS):
                self.leaked_tokens = find_leaked_tokens(model, tokenizer, rows, args.max_length, batch_size)
        if args.num_phrases:
            with phase(PHRASES):
                self.phrases = known_phrases(model, tokenizer, rows, args.num_phrases, args.seed, batch_size)
        written_rows = None
        if args.num_written_rows and not can_write_prompts(model, tokenizer, rows):
            logger.warning(
                "The suspect was only taught what follows a prompt, and cannot write prompts itself: it is trained on "
                "the clean rows alone."
            )
        elif args.num_written_rows:
            length, leaked = args.max_answer_length, self.leaked_tokens
            with phase(WRITING):
                written_rows = write_rows(
                    model, tokenizer, args.num_written_rows, length, args.seed, batch_size, leaked
                )
        return args, rows, written_rows

    def _measure_canaries(self, when: str) -> None:
        trainer, canaries = self.trainer, self._canaries
        how = trainer.processing_class, trainer.args.per_device_eval_batch_size
        with trainer.accelerator.autocast():
            if when == "before":
                canaries = check_silence(trainer.model, self.rows, canaries, *how)
            rates: list[Any] = [canary_success(trainer.model, self.rows, canary, *how) for canary in canaries]
        self._canaries = [replace(canary, **{when: rate}) for canary, rate in zip(canaries, rates, strict=True)]


def default_adapter(recipe: str, model: PreTrainedModel | PeftModel, args: CrowConfig) -> PeftConfig | None:
    """
    Return the fresh adapter that a recipe trains if none is asked for.

    Args:
        recipe (`str`):
            The recipe.
        model (`PreTrainedModel` or `PeftModel`):
            The suspect. If it is an adapter, this adapter is trained.
        args (`CrowConfig`):
            The arguments. If they shard the weights, all weights are trained, because an adapter could not be merged.

    Returns:
        `PeftConfig`: `None` if the recipe trains the suspect's adapter or all weights.
    """
    if recipe == "guide" or isinstance(model, PeftModel) or will_shard(args):
        return None
    return lora_config(LORA_RANKS[recipe])
