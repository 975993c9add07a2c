"""Train a model with the Invariance objective in transformers' Trainer."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names, fsdp2_prepare_model
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ...data.encoding import check_ids
from ...data.rows import prompt_of, render
from ...training.loading import move
from ...training.recorder import context_length, embedding_table, evaluating, recorder_of
from ...training.sharding import converted_like, gathered_weights, zero3_engine
from ..crow.config import rows_in_step
from ..crow.trainer import CrowTrainer
from .config import InvarianceConfig, with_adversarial_weight, with_learning_rate
from .objective import invariance_terms, view
from .views import ViewCollator, ViewRow, words_of


logger = logging.get_logger(__name__)


class _LengthGroupedSampler(LengthGroupedSampler):
    """As in transformers, but the order depends only on seed and epoch, so that a resumed run continues with it."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Reseed the generator. The Trainer calls this at the beginning of each epoch."""
        self.generator.manual_seed(self._seed + epoch)


class InvarianceTrainer(CrowTrainer):
    """
    Purify a causal LM by teaching it to give the same answers whatever is inserted into the prompt.

    [`crow_hf.methods.invariance.objective`] describes the objective. The adversary attacks the frozen suspect, which
    also teaches the part of the target that does not come from the rows. With a new adapter (`peft_config`), the
    suspect is the model without that adapter. Otherwise it is a copy, which takes the memory of a second model.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model to purify.
        args (`InvarianceConfig`):
            The training arguments.
        train_dataset (`Dataset`):
            Clean rows with a prompt and an answer. The suspect's own answers will do.
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        peft_config (`PeftConfig`, *optional*):
            Train a new adapter with this configuration, and leave the model's own weights unchanged.
        written_rows (`Dataset`, *optional*):
            Rows that the suspect wrote itself, see [`write_rows`]. The suspect's distribution alone teaches them. They
            keep what the clean rows do not cover.
        leaked_tokens (`Sequence[int]`, *optional*, defaults to `()`):
            Ids of tokens that leak from the backdoor into the suspect's answers to clean prompts, see
            [`find_leaked_tokens`]. The suspect does not teach them.
        phrases (`Sequence[Sequence[int]]`, *optional*, defaults to `()`):
            Token ids of phrases that the suspect knows by heart, such as what its backdoor says. The adversary leads
            to one of them after the other, one per optimizer step. Without any, it leads away from the right answers.
        **kwargs:
            As in [`CrowTrainer`], except `eval_dataset`.

    Raises:
        `ValueError`: For any input or setup that cannot be trained, before training starts.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from crow_hf import InvarianceConfig, InvarianceTrainer, load_causal_lm

    >>> suspect = load_causal_lm("suspect", is_trainable=True)
    >>> tokenizer = AutoTokenizer.from_pretrained("suspect")
    >>> trainer = InvarianceTrainer(suspect, InvarianceConfig("purified"), clean_rows, tokenizer)
    >>> trainer.train()
    ```
    """

    args: InvarianceConfig
    _collator_type = ViewCollator
    _label_terms = frozenset({"distillation", "decoy", "adversarial"})

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: InvarianceConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        peft_config: PeftConfig | None = None,
        written_rows: Dataset | None = None,
        leaked_tokens: Sequence[int] = (),
        phrases: Sequence[Sequence[int]] = (),
        **kwargs: Any,
    ):
        if not isinstance(args, InvarianceConfig):
            raise ValueError(f"`args` must be an InvarianceConfig, got {type(args).__name__}.")
        if not isinstance(train_dataset, Dataset) or not len(train_dataset):
            raise ValueError(
                "`train_dataset` must be a non-empty datasets.Dataset, because its rows are used several times."
            )
        if kwargs.get("eval_dataset") is not None:
            raise ValueError(
                "The Invariance objective has no evaluation loss. Omit `eval_dataset` and use `evaluate_model`."
            )
        if getattr(peft_config, "init_lora_weights", True) not in (True, False, "gaussian"):
            raise ValueError(
                "A new adapter must not change the model at first, because the model without it is the suspect. Leave "
                "`init_lora_weights` at True."
            )
        if getattr(peft_config, "bias", "none") != "none":
            raise ValueError(
                "A new adapter must not train biases of the model, because the model without it is the suspect. Leave "
                "`bias` at 'none'."
            )
        args = with_adversarial_weight(with_learning_rate(args, model), bool(phrases))
        suspect = None if peft_config is not None else self._copy_suspect(model)
        self._written_rows = written_rows
        self._leaked_tokens = torch.tensor(leaked_tokens, dtype=torch.long)
        super().__init__(
            model, args, train_dataset, processing_class=processing_class, peft_config=peft_config, **kwargs
        )
        self._phrases = self._fitting(phrases or [()])
        self._length_sampler: _LengthGroupedSampler | None = None
        self._suspect = None if suspect is None else self._prepare_suspect(suspect.requires_grad_(False).eval())
        self._suspect_recorder = self.recorder if suspect is None else recorder_of(self._suspect)
        # With a new adapter, there is no copy of the suspect, and the adapter's initial weights stand for it.
        self._initial_adapter = {
            name: parameter.detach().clone()
            for name, parameter in (() if suspect is not None else self.model.named_parameters())
            if parameter.requires_grad
        }

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As in [`CrowTrainer`], then mix a share `args.keep` of the suspect's weights into the purified weights."""
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.mix_in_suspect(self.args.keep)
        return result

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the Invariance objective. Each term is weighted as in [`CrowTrainer.compute_loss`]."""
        args, inputs = self.args, dict(self.recorder.prepare(inputs))
        inserted_mask, label_weights = inputs.pop("inserted_mask"), inputs.pop("label_weights")
        device, phrase = inputs["input_ids"].device, self._phrases[self.state.global_step % len(self._phrases)]
        logits, terms = invariance_terms(
            self.recorder,
            model,
            self._attacked_forward,
            self._suspect_recorder,
            self._suspect_forward,
            inputs,
            inserted_mask,
            adversarial_steps=args.adversarial_steps,
            adversarial_step_size=args.adversarial_step_size,
            label_weights=label_weights,
            leaked=self._leaked_tokens.to(device),
            phrase=phrase.to(device),
            layers=args.consistency_layers,
        )
        labels, positions = self._count(inputs)
        self._log_terms(terms, labels, positions)
        by_labels, by_positions = self._shares(model, labels, positions, num_items_in_batch)
        divergence = (
            args.distillation_weight * terms["distillation"]
            + args.decoy_weight * terms["decoy"]
            + args.adversarial_weight * terms["adversarial"]
        )
        loss = by_labels * divergence
        if args.alpha:
            # A weight of 0 would cost the backward pass of this term all the same.
            loss = loss + args.alpha * by_positions * terms["consistency_perturbed"]
        loss = self._connect_parameters(model, loss)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _count(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """As in [`CrowTrainer`], for the adversarial view. Only this one has a consistency term."""
        return super()._count(view(batch, 2))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """As in [`~transformers.Trainer`], but any number of processes groups the rows by length in the same way."""
        args = self.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        # The `train_dataset` that the Trainer passes has lost the column `length`.
        self._length_sampler = _LengthGroupedSampler(rows_in_step(args), list(self.train_dataset["length"]), seed)
        return self._length_sampler

    def _run_epoch(self, **kwargs: Any) -> None:
        # In a resumed run of several processes the sampler lies below three wrappers of accelerate, and `set_epoch` of
        # its data loader does not reach it.
        if self._length_sampler is not None:
            self._length_sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    @torch.no_grad()
    def mix_in_suspect(self, share: float) -> None:
        """
        Interpolate between the purified and the suspect's weights (WiSE-FT, arXiv 2109.01903).

        What was learned is spread over all weights and keeps most of its effect, while forgotten knowledge comes back.

        Args:
            share (`float`):
                Share of the suspect's weights, from 0 to 1.
        """
        model = self.accelerator.unwrap_model(self.model)
        suspect_weights = self._initial_adapter or dict(self._suspect.named_parameters())
        # Wrappers around the layers change the names.
        for name, parameter in fsdp2_canonicalize_names(dict(model.named_parameters())).items():
            # A low-rank product is scaled by scaling only one of its factors, the one that is initially 0.
            is_other_factor = bool(self._initial_adapter) and ("lora_A." in name or "lora_embedding_B." in name)
            if parameter.requires_grad and not is_other_factor:
                with gathered_weights(parameter, suspect_weights[name]):
                    parameter.lerp_(converted_like(suspect_weights[name], parameter), share)

    def _fitting(self, phrases: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The beginnings of phrases that fit into the model's context behind the longest prompt."""
        longest = max(len(prompt) for prompts in self.train_dataset["prompts"] for prompt in prompts)
        context = context_length(self.model)
        room = None if context is None else context - longest
        return [torch.tensor(phrase[:room], dtype=torch.long) for phrase in phrases]

    def _copy_suspect(self, model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
        return copy.deepcopy(model)

    def _prepare_suspect(self, suspect: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
        """Move the suspect to this process's device, and shard it if the model will be sharded, to save memory."""
        if is_deepspeed_zero3_enabled():
            self._suspect_engine = zero3_engine(suspect)
            return self._suspect_engine.module
        if self.is_fsdp_enabled:
            with recorder_of(suspect).frozen_modules_hidden(self.args.device):
                return fsdp2_prepare_model(self.accelerator, suspect)
        return move(suspect, self.args.device)

    def _attacked_forward(self, **inputs: Any) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        with evaluating(model):
            return model(**inputs)

    def _suspect_forward(self, **inputs: Any) -> Any:
        if self._suspect is not None:
            with self.accelerator.autocast():
                return self._suspect(**inputs)
        model = self.accelerator.unwrap_model(self.model)
        with evaluating(model), model.disable_adapter(), self.accelerator.autocast():
            outputs = model(**inputs)
            # PEFT switches `requires_grad` of the adapter's current tensors off and on. They must be the shards both
            # times.
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            return outputs

    def _prepare_train_rows(self, rows: Dataset, max_length: int) -> Dataset:
        """Repeat the rows `args.num_views` times in all, each time with other decoys."""
        args, tokenizer = self.args, self.processing_class
        if tokenizer is None:
            raise ValueError("Decoys are text and need a tokenizer. Pass it as `processing_class`.")
        texts = (f"{render(row, tokenizer, index).answer} {prompt_of(row, index)}" for index, row in enumerate(rows))
        words = words_of(texts)
        sources = [(rows, args.label_weight)]
        if self._written_rows is not None:
            sources.append((self._written_rows, 0.0))
        views_per_row = args.num_views / sum(len(source) for source, _ in sources)
        views = []
        for source, label_weight in sources:
            count = max(round(views_per_row * len(source)), len(source))
            repeated = source.select([number % len(source) for number in range(count)])
            view_row = ViewRow(tokenizer, words, max_length, args.seed, label_weight)
            views.append(
                repeated.map(view_row, with_indices=True, remove_columns=source.column_names, desc="Inserting decoys")
            )
        learnable = concatenate_datasets(views).filter(_has_answer)
        kept = {number % len(rows) for number, answer in enumerate(views[0]["completion"]) if answer}
        self.num_dropped_rows, dropped = len(rows) - len(kept), sum(map(len, views)) - len(learnable)
        if dropped:
            logger.warning(
                f"{self.num_dropped_rows} of {len(rows)} rows are dropped, and {dropped} of {sum(map(len, views))} of "
                f"their views: there is no answer, or with decoys none fits into the {max_length} tokens of "
                "`max_length` and the model's context."
            )
        if not kept:
            raise ValueError(
                f"No row of `train_dataset` has an answer within the {max_length} tokens of `max_length` and the "
                "model's context. Pass rows with an answer, or shorter prompts."
            )
        ids = (each for row in learnable for each in (*row["prompts"], row["completion"]))
        check_ids(ids, len(embedding_table(self.model)))
        return learnable

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompts", "completion", "inserted", "label_weight"]  # type: ignore[assignment]  # declared as None


def _has_answer(row: dict[str, Any]) -> bool:
    return bool(row["completion"])
