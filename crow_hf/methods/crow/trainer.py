"""CrowTrainer: the objective in the ordinary Trainer way of working."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ...data.collators import CrowDataCollator
from ...data.encoding import IGNORE_INDEX, columns_of, padding_id, prepare_dataset
from ...training.checkpoints import (
    OUTPUT_WAS_USED,
    CheckpointMixin,
    StopAtCtrlC,
    check_room,
    checkpoint_to_resume,
    output_was_used,
    writing,
)
from ...training.compilation import compiled_layers
from ...training.hub import HubMixin
from ...training.loading import load_causal_lm, load_tokenizer
from ...training.recorder import context_length, frozen_modules, recorder_of
from ...training.sharding import are_finite, are_in_shards, in_shards
from .config import CrowConfig
from .objective import control_terms, crow_terms


logger = logging.get_logger(__name__)


class _ReachingAll(torch.autograd.Function):
    """The loss as it is; its backward pass comes by all parameters, and has no gradient for them."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.number = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient, *[None] * ctx.number


class CrowTrainer(HubMixin, CheckpointMixin, Trainer):
    """
    Purify a causal LM by layer consistency under adversarial embeddings (CROW, arXiv 2411.12768).

    Gradients are exact: with rows of any length, accumulation over micro-batches and several processes give the
    gradient of one large batch, because both terms are means over all tokens of the optimizer step. Dropout, where the
    model has any, drops the same units in both passes of a micro-batch.

    A full disk or a failing push of a checkpoint does not end the training: `failures` lists what went wrong, in sentences.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            The model to purify. A path is loaded with [`load_causal_lm`] in float32 unless `args.model_init_kwargs` says
            otherwise. A `PeftModel` is trained on as it is, so load its adapter with `is_trainable=True`.
        args (`CrowConfig` or `TrainingArguments`, *optional*):
            Without it, the defaults, and an output directory named after the model.
        train_dataset (`Dataset` or `IterableDataset`):
            Clean rows with `text`, `prompt`/`completion`, `instruction`/`input`/`output`, `messages`, or `input_ids`;
            see [`crow_hf.data`].
        eval_dataset (`Dataset`, `IterableDataset` or `dict`, *optional*):
            The same, for `eval_strategy`.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. Without it, the one saved with the model, if the rows hold text.
        data_collator (`DataCollator`, *optional*, defaults to [`CrowDataCollator`]):
            Makes batches with `input_ids`, `labels` and `attention_mask` of the prepared rows.
        peft_config (`PeftConfig`, *optional*):
            Train a fresh adapter of this kind and leave the model's own weights as they are.
        compute_metrics (`Callable`, *optional*), callbacks (`list`, *optional*), optimizers (`tuple`, *optional*):
            As in [`~transformers.Trainer`].

    Raises:
        `ValueError`: For every input that cannot be trained on, before training starts.
        `OSError`: If `args.output_dir` cannot be written to.
        `FloatingPointError`: If a loss or a weight is NaN or infinite during training.

    Example:

    ```python
    >>> from crow_hf import CrowConfig, CrowTrainer

    >>> trainer = CrowTrainer("suspect", CrowConfig("purified"), clean_rows)
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    _tag_names = ["crow", "backdoor-removal"]
    # Both terms are shares of the whole optimizer step already; the Trainer must not divide them again.
    loss_is_scaled_for_ga = True
    _collator_type: type = CrowDataCollator
    # Means over the labels; the other terms are means over the positions.
    _label_terms = frozenset({"loss_lm"})

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: CrowConfig | TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: DataCollator | None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        # Arguments
        path = model if isinstance(model, (str, Path)) else model.config._name_or_path
        if args is None:
            args = CrowConfig(f"{Path(path).name or type(model).__name__}-CROW")
        elif not isinstance(args, CrowConfig):
            args = CrowConfig(**{**args.to_dict(), "hub_token": args.hub_token})
        check_room(args.output_dir)

        # Model
        if isinstance(model, (str, Path)):
            model = load_causal_lm(model, is_trainable=True, **(args.model_init_kwargs or {}))
        elif not isinstance(model, PeftModel) and getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "The model has an adapter inside that a second one would replace: load it with `load_causal_lm`, which "
                "returns a `PeftModel`."
            )
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise ValueError(
                    "The model carries an adapter already: leave out `peft_config` to train that one, or call "
                    "`merge_and_unload()` first to train a fresh one on the merged weights."
                )
            if getattr(peft_config, "exclude_modules", "") is None:
                peft_config = copy(peft_config)
                peft_config.exclude_modules = frozen_modules(model)
            set_seed(args.seed)
            model = get_peft_model(model, peft_config)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "No parameter of the model can be trained: load the adapter with `is_trainable=True`, or pass a "
                "`peft_config`."
            )
        if any(p.requires_grad and p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
            logger.warning(
                "The weights to be trained are in half precision, which rounds most small updates away: load the model in "
                "float32 and set `bf16=True` instead."
            )
        self.recorder = recorder_of(model, args.perturb)

        # Data
        if train_dataset is None:
            raise ValueError("`train_dataset` is missing: pass about 100 clean rows.")
        evaluations = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        if processing_class is None and path and "input_ids" not in columns_of(train_dataset):
            processing_class = load_tokenizer(path)
        max_length = min(args.max_length, context_length(model) or args.max_length)
        with args.main_process_first():
            train_dataset = self._prepare(train_dataset, processing_class, max_length, args)
            prepared = {
                name: prepare_dataset(rows, processing_class, max_length, f"eval_dataset {name}".strip())
                for name, rows in evaluations.items()
                if rows is not None
            }
        if data_collator is None:
            data_collator = self._collator_type(padding_id(processing_class))

        if isinstance(train_dataset, IterableDataset) and args.accelerator_config.dispatch_batches is None:
            # Rows of a stream are padded by batch, and batches of different width cannot be dispatched.
            args.accelerator_config.dispatch_batches = False
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=prepared if isinstance(eval_dataset, dict) else prepared.get(""),
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._check_setup()
        model.add_model_tags(self._tag_names)
        # Mode, name and step to the sum over the tokens and their number.
        self._logged = {mode: defaultdict(lambda: defaultdict(lambda: [0.0, 0.0])) for mode in ("train", "eval")}
        self._positions_in_step = None
        self._use_cache = use_cache
        self._trains_adapter = isinstance(model, PeftModel)
        self._output_was_used = output_was_used(args.output_dir)
        self.failures = []
        self._stop_at_ctrl_c = StopAtCtrlC()
        self.add_callback(self._stop_at_ctrl_c)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """
        As in [`~transformers.Trainer`], but an output directory with a model is resumed from or refused.

        A run that is resumed, from whatever step, ends with the weights and the log of one that was never stopped: bit by
        bit on a CPU.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint, or `True` for the last one in `args.output_dir` that is whole.
            **kwargs:
                As in [`~transformers.Trainer`].

        Raises:
            `ValueError`: If there is no such checkpoint. The sentence says what is missing from it.
            `OSError`: If `args.output_dir` has no room for the model.
            `KeyboardInterrupt`: After Ctrl-C; the step is finished before, and its checkpoint kept.
        """
        args = self.args
        if self._output_was_used and not resume_from_checkpoint:
            raise ValueError(OUTPUT_WAS_USED.format(args.output_dir))
        resume_from_checkpoint = checkpoint_to_resume(args.output_dir, resume_from_checkpoint)
        if args.save_strategy != "no":
            check_room(args.output_dir, self.model)
        try:
            with compiled_layers(self.recorder.layers, args), self._stop_at_ctrl_c.watching(self):
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            # The Trainer switches the cache off for training; the purified model's config is to be the suspect's.
            if self._use_cache is None:
                del self.model.config.use_cache
            else:
                self.model.config.use_cache = self._use_cache

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Also count what both means are taken over: the labels and the attended positions of the optimizer step."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        batches = [self.recorder.prepare(batch) for batch in batches]
        counts = torch.stack([self._count(batch).to(device) for batch in batches]).sum(dim=0)
        if self.args.average_tokens_across_devices:
            counts = self.accelerator.gather(counts[None]).sum(dim=0)
        labels_in_step, self._positions_in_step = counts
        return batches, labels_in_step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        L_LM + alpha * L_cons (equation 6), with two forward passes.

        In a training step each term is weighed by this micro-batch's share of the step's labels or positions, so that
        the micro-batches add up to the mean over the step. But for DeepSpeed, the gradient of L_LM is taken already
        then: that of what is returned is the other's. Otherwise both are means over the batch.
        """
        args = self.args
        inputs = self.recorder.prepare(inputs)
        labels, positions = self._count(inputs)
        by_labels, by_positions = self._shares(model, labels, positions, num_items_in_batch)
        if args.alpha == 0:
            outputs, terms = control_terms(self.recorder, model, inputs, args.consistency_layers)
        else:
            is_step = model.training and num_items_in_batch is not None and not return_outputs
            # Not under DeepSpeed: accelerate ends the step with any backward pass there, and each process sums those
            # gradients that it has, which in one term alone are not the same ones where rows differ in their thoughts.
            in_two = is_step and not self.is_deepspeed_enabled
            backward = (lambda loss_lm: self.accelerator.backward(by_labels * loss_lm)) if in_two else None
            outputs, terms = crow_terms(
                self.recorder,
                self.accelerator.unwrap_model(model),
                model,
                inputs,
                epsilon=args.epsilon,
                epsilon_mode=args.epsilon_mode,
                layers=args.consistency_layers,
                backward=backward,
                differentiable_twice=not is_deepspeed_zero3_enabled(),
            )
        self._log_terms(terms, labels, positions)
        loss = by_labels * terms["loss_lm"] + args.alpha * by_positions * terms.get("consistency_perturbed", 0)
        loss = self._reaching_all(model, loss)
        return (loss, outputs) if return_outputs else loss

    def _reaching_all(self, model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
        """The same loss, also for DDP, which waits for every parameter: the perturbed pass does not use those of the head."""
        if not isinstance(model, DistributedDataParallel) or not loss.requires_grad:
            return loss
        return _ReachingAll.apply(loss, *(weight for weight in model.parameters() if weight.requires_grad))

    def _check_setup(self) -> None:
        """Refuse what spreads a model over GPUs in a way that the two passes cannot take."""
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel is not supported: start one process per GPU with `accelerate launch`.")
        if is_deepspeed_zero3_enabled():
            self._check_zero3()
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise ValueError(
                "Compiled as a whole, the model does not let the objective differentiate what its hooks record: leave "
                "`--dynamo_backend` off and set `torch_compile=True`, which compiles each layer by itself."
            )
        if self.args.torch_compile and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("Layers are not compiled under FSDP and DeepSpeed: leave `torch_compile` off.")
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                "FSDP of version 1 is not supported: set `fsdp_version: 2` in the configuration of accelerate."
            )
        if plugin.activation_checkpointing:
            raise ValueError(
                "FSDP's own activation checkpointing draws other dropout when it computes again: set "
                "`fsdp_activation_checkpointing: false`, and `activation_checkpointing=True` in the arguments."
            )
        if self.recorder.frozen_modules and plugin.cpu_ram_efficient_loading:
            raise ValueError(
                f"FSDP does not load what stays out of its shards, as what patches {self.recorder.name} does: set "
                "`fsdp_cpu_ram_efficient_loading: false` in the configuration of accelerate."
            )

    def _check_zero3(self) -> None:
        """Refuse what the third stage of DeepSpeed's ZeRO would not train, or not save."""
        if are_in_shards(self.model):
            raise ValueError(
                "The model is in shards before the training (ZeRO-3), where nothing can be done with it: pass its path, or load it "
                "with `load_causal_lm`."
            )
        config = self.accelerator.state.deepspeed_plugin.hf_ds_config
        if not config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "ZeRO-3 saves no model as it is configured: set `zero3_save_16bit_model: true` in the configuration of accelerate, or "
                "`stage3_gather_16bit_weights_on_model_save` in that of DeepSpeed."
            )

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """As in [`~transformers.Trainer`], but accelerate is not told to compile: it would compile the model as a whole."""
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin()}

    def _prepare_for_training(self, *args: Any, **kwargs: Any):
        """As in [`~transformers.Trainer`], where the model is wrapped."""
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        with self.recorder.outside_of_shards(self.args.device):
            return super()._prepare_for_training(*args, **kwargs)

    @staticmethod
    def _prepare(
        rows: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int,
        args: CrowConfig,
    ) -> Dataset | IterableDataset:
        """The training rows as the collator takes them."""
        return prepare_dataset(rows, tokenizer, max_length)

    def _shares(
        self, model: nn.Module, labels: torch.Tensor, positions: torch.Tensor, num_items_in_batch: torch.Tensor | None
    ) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """What to weigh a micro-batch's means over labels and over positions with, so that they add up to those of the step."""
        if not model.training or num_items_in_batch is None:
            return 1.0, 1.0
        # Distributed wrappers average gradients over the processes, and the counts are sums over them.
        average = self.args.average_tokens_across_devices
        scale = self.accelerator.num_processes // self.get_tp_size() if average else 1
        return scale * labels / num_items_in_batch, scale * positions / self._positions_in_step

    def _count(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The batch's predicted labels (the first of a row never is) and the positions of its chain, as a tensor of two."""
        labels = batch["labels"][:, 1:].ne(IGNORE_INDEX).sum()
        mask = self.recorder.chain_mask(batch)
        positions = batch["input_ids"].numel() if mask is None else mask.sum()
        return torch.stack([labels, torch.as_tensor(positions, device=labels.device)])

    def _log_terms(self, terms: dict[str, torch.Tensor], labels: torch.Tensor, positions: torch.Tensor) -> None:
        """Keep the terms for the log, and stop on all processes if one of them is not finite on any."""
        weights = torch.stack([labels if name in self._label_terms else positions for name in terms]).float()
        values = torch.stack([value.detach().float() for value in terms.values()])
        sums, totals = self.accelerator.gather(torch.stack([values * weights, weights])[None]).sum(dim=0).tolist()
        for name, value, weight in zip(terms, sums, totals, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {self.state.global_step + 1}: lower the learning rate, alpha or epsilon, "
                    f"or train in bfloat16 or float32; the checkpoints in {self.args.output_dir} are from before it."
                )
            step = self._logged["train" if self.model.training else "eval"][name][self.state.global_step]
            step[0] += value
            step[1] += weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms: means over the tokens of a step, and over the steps since the last log, as the loss itself is."""
        mode = "train" if self.model.training else "eval"
        # "eval_loss", or "eval_NAME_loss" where there are several datasets.
        prefix = (
            "" if mode == "train" else next((key[: -len("loss")] for key in logs if key.endswith("_loss")), "eval_")
        )
        for name, steps in self._logged[mode].items():
            logs[f"{prefix}{name}"] = fmean(value / weight for value, weight in steps.values())
        super().log(logs, start_time)
        self._logged[mode].clear()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in [`~transformers.Trainer`]; what `predict` left unlogged does not count for the next evaluation."""
        if self.is_deepspeed_enabled and self.deepspeed is None:
            raise ValueError(
                "DeepSpeed takes the model apart when the training begins, and cannot evaluate it before: set `eval_on_start` or "
                "`eval_strategy`, or evaluate in one process."
            )
        self._logged["eval"].clear()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, unless a weight is NaN or infinite: the last good checkpoint is never replaced by a bad one."""
        if in_shards(self.args) and self._trains_adapter and not isinstance(self.model, PeftModel):
            # Merging writes to tensors that the shards do not read: what would be saved is the suspect.
            raise ValueError(
                "An adapter cannot be merged into weights that are in shards: save it as it is, load it in one process with "
                "`load_causal_lm`, and merge it there."
            )
        bad = torch.tensor([not are_finite(self.model)], device=self.args.device)
        if self.accelerator.gather(bad).any():
            raise FloatingPointError(
                f"The weights are not finite after step {self.state.global_step} and were not saved: go back to the "
                f"last checkpoint in {self.args.output_dir} with a lower learning rate."
            )
        folder = Path(output_dir or self.args.output_dir)
        with writing("The model", folder, "make room and save it again, or go on from the last checkpoint"):
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                # A pickle that nothing reads has no place beside a model that people are to trust.
                (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
