"""InvarianceTrainer: the strong objective in the ordinary Trainer way of working."""

import copy
from typing import Any

import torch
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names, fsdp2_prepare_model
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler

from ...data.rows import prompt_of, render
from ...training.recorder import recorder_of
from ...training.sharding import gathered, placed_as, zero3_engine
from ..crow.config import CrowConfig, rows_in_step
from ..crow.trainer import CrowTrainer
from .config import InvarianceConfig
from .objective import invariance_terms, view
from .views import ViewCollator, ViewRow


class _LengthGroupedSampler(LengthGroupedSampler):
    """That of transformers, but the order depends on the seed and the epoch alone, so that a resumed run goes on with it."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called at the beginning of every epoch."""
        self.generator.manual_seed(self._seed + epoch)


class InvarianceTrainer(CrowTrainer):
    """
    Purify a causal LM by teaching it to give the same answers, whatever is inserted into the prompt ([`crow_hf.invariance`]).

    The suspect, frozen, is what the adversary attacks, and teaches what the rows do not. With a fresh adapter (`peft_config`) that is
    the model without it; otherwise a copy, which takes the memory of a second model.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model to purify.
        args (`InvarianceConfig`):
            The arguments.
        train_dataset (`Dataset`):
            Clean rows with a prompt and an answer. The answers are the text to run along; the suspect's own will do.
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        peft_config (`PeftConfig`, *optional*):
            Train a fresh adapter of this kind and leave the model's own weights as they are.
        **kwargs:
            As in [`CrowTrainer`], but for `eval_dataset`.

    Raises:
        `ValueError`: For every input that cannot be trained on, before training starts.
    """

    _collator_type = ViewCollator
    _label_terms = frozenset({"distillation", "decoy", "adversarial"})

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: InvarianceConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, InvarianceConfig):
            raise ValueError(f"`args` must be an InvarianceConfig, got {type(args).__name__}.")
        if not isinstance(train_dataset, Dataset) or not len(train_dataset):
            raise ValueError(
                "`train_dataset` must be a datasets.Dataset and not empty: its rows are used many times over."
            )
        if kwargs.get("eval_dataset") is not None:
            raise ValueError(
                "The strong objective has no evaluation loss: leave out `eval_dataset` and use evaluate_model."
            )
        if getattr(peft_config, "init_lora_weights", True) not in (True, False, "gaussian"):
            raise ValueError(
                "A fresh adapter must change nothing at first, because the model without it is the suspect: leave "
                "`init_lora_weights` at True."
            )
        suspect = None if peft_config is not None else copy.deepcopy(model)
        super().__init__(
            model, args, train_dataset, processing_class=processing_class, peft_config=peft_config, **kwargs
        )
        self._suspect = None if suspect is None else self._placed(suspect.requires_grad_(False).eval())
        # Where the suspect is the model without a fresh adapter, that adapter's beginning is all there is to go back to.
        self._beginning = {
            name: parameter.detach().clone()
            for name, parameter in (() if suspect is not None else self.model.named_parameters())
            if parameter.requires_grad
        }
        self._suspect_recorder = self.recorder if suspect is None else recorder_of(self._suspect)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As in [`CrowTrainer`]; at the end `args.keep` of the suspect is mixed into the weights."""
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._mix_in_suspect()
        return result

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The strong objective; each term is weighed as in [`CrowTrainer.compute_loss`]."""
        args, inputs = self.args, dict(self.recorder.prepare(inputs))
        inserted_mask = inputs.pop("inserted_mask")
        outputs, terms = invariance_terms(
            self.recorder,
            model,
            self._suspect_recorder,
            self._suspect_forward,
            inputs,
            inserted_mask,
            adversarial_steps=args.adversarial_steps,
            adversarial_step_size=args.adversarial_step_size,
            label_weight=args.label_weight,
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
        loss = by_labels * divergence + args.alpha * by_positions * terms["consistency_perturbed"]
        loss = self._reaching_all(model, loss)
        return (loss, outputs) if return_outputs else loss

    def _count(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """As in [`CrowTrainer`], of the attacked view: all views have the same answers, and it alone has a consistency term."""
        return super()._count(view(batch, 2))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """As in [`~transformers.Trainer`]; batches of one length are the same in any number of processes."""
        args = self.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # The optimizer step's rows, whoever has them.
        batch_size = rows_in_step(args)
        seed = args.seed if args.data_seed is None else args.data_seed
        # The rows that are passed here have lost the column.
        return _LengthGroupedSampler(batch_size, list(self.train_dataset["length"]), seed)

    @torch.no_grad()
    def _mix_in_suspect(self) -> None:
        """
        Go back part of the way to the suspect: what was learned is spread over all weights and keeps most of its effect, and
        what was forgotten comes back (WiSE-FT, arXiv 2109.01903).
        """
        model = self.accelerator.unwrap_model(self.model)
        beginning = self._beginning or dict(self._suspect.named_parameters())
        # Wrappers of the layers change the names.
        for name, parameter in fsdp2_canonicalize_names(dict(model.named_parameters())).items():
            # Half of a low-rank product is one of its factors halved, the one that is 0 at first.
            is_other_factor = bool(self._beginning) and ("lora_A." in name or "lora_embedding_B." in name)
            if parameter.requires_grad and not is_other_factor:
                with gathered(parameter, beginning[name]):
                    parameter.lerp_(placed_as(beginning[name], parameter), self.args.keep)

    def _placed(self, suspect: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
        """The suspect on this process's device, in shards where the model is going to be: a whole one may not fit there."""
        if is_deepspeed_zero3_enabled():
            self._suspect_engine = zero3_engine(suspect)
            return self._suspect_engine.module
        if self.is_fsdp_enabled:
            with recorder_of(suspect).outside_of_shards(self.args.device):
                return fsdp2_prepare_model(self.accelerator, suspect)
        return suspect.to(self.args.device)

    def _suspect_forward(self, **inputs: Any) -> Any:
        if self._suspect is not None:
            with self.accelerator.autocast():
                return self._suspect(**inputs)
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        try:
            with model.disable_adapter(), self.accelerator.autocast():
                outputs = model(**inputs)
                # An adapter is switched off and on together with its gradients, on the tensors that are there at the time:
                # they must be the shards both times.
                for module in model.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()
                return outputs
        finally:
            model.train(was_training)

    @staticmethod
    def _prepare(
        rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, max_length: int, args: CrowConfig
    ) -> Dataset:
        """`args.num_views` rows, those of the dataset over and over, each time with other decoys."""
        if tokenizer is None:
            raise ValueError("Decoys are text, so a tokenizer is needed: pass it as `processing_class`.")
        texts = [f"{render(row, tokenizer, index).answer} {prompt_of(row)}" for index, row in enumerate(rows)]
        words = sorted({word for text in texts for word in text.split()})
        repeated = rows.select([number % len(rows) for number in range(max(args.num_views, len(rows)))])
        views = repeated.map(
            ViewRow(tokenizer, tuple(words), max_length, args.seed),
            with_indices=True,
            remove_columns=rows.column_names,
            desc="Inserting decoys",
        )
        learnable = views.filter(_has_answer)
        if not len(learnable):
            raise ValueError(
                f"`train_dataset` has no answer in any row within the {max_length} tokens of `max_length` and the model's "
                "context: pass rows with an answer, or shorter prompts."
            )
        return learnable

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompts", "completion", "inserted"]


def _has_answer(row: dict[str, Any]) -> bool:
    return bool(row["completion"])
