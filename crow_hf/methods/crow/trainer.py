"""Train a model with the CROW objective in transformers' Trainer."""

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
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from ...data.collators import CrowDataCollator
from ...data.encoding import IGNORE_INDEX, check_ids, columns_of, padding_id, prepare_dataset
from ...progress import name_progress_bar
from ...training.checkpoints import (
    OUTPUT_WAS_USED,
    CheckpointMixin,
    StopAtCtrlC,
    check_adapter_name,
    check_writable,
    checkpoint_to_resume,
    output_was_used,
    writing,
)
from ...training.compilation import compiled_layers
from ...training.hub import HubMixin
from ...training.loading import load_causal_lm, load_tokenizer
from ...training.recorder import context_length, embedding_table, frozen_modules, recorder_of, trains_only_the_head
from ...training.sharding import are_finite, is_sharded, will_shard
from .config import CrowConfig, loading_kwargs
from .objective import control_terms, crow_terms


logger = logging.get_logger(__name__)


class _ConnectParameters(torch.autograd.Function):
    """Returns the loss unchanged, and connects parameters to its graph without giving them a gradient."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.num_parameters = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient, *[None] * ctx.num_parameters


class CrowTrainer(HubMixin, CheckpointMixin, Trainer):
    """
    Purify a causal LM by layer consistency under adversarial embeddings (CROW, arXiv 2411.12768).

    Gradients are exact. Both terms are means over all tokens of an optimizer step, so rows of any length, gradient
    accumulation and several processes give the gradient of one large batch. If the model has dropout, both passes of
    a micro-batch drop the same units.

    Training continues if a checkpoint cannot be written to a full disk or cannot be pushed. `failures` lists what went
    wrong, one sentence each. `num_dropped_rows` counts the training rows that are not learned, because they have no
    answer or it begins beyond `max_length`. Of a stream it is 0.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            The model to purify. A path is loaded with [`load_causal_lm`], in float32 unless `args.model_init_kwargs`
            sets another dtype. The adapter of a `PeftModel` is trained further, so load it with `is_trainable=True`.
        args (`CrowConfig` or `TrainingArguments`, *optional*):
            The training arguments. By default, the defaults of [`CrowConfig`] and an output directory named after the
            model.
        train_dataset (`Dataset` or `IterableDataset`):
            Clean rows with `text`, `prompt`/`completion`, `instruction`/`input`/`output`, `messages`, or `input_ids`.
            See [`crow_hf.data`].
        eval_dataset (`Dataset`, `IterableDataset` or `dict`, *optional*):
            Rows in the same formats, for `eval_strategy`.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. By default, the one saved with the model is loaded if the rows hold text.
        data_collator (`DataCollator`, *optional*, defaults to [`CrowDataCollator`]):
            Collates prepared rows into batches with `input_ids`, `labels` and `attention_mask`.
        peft_config (`PeftConfig`, *optional*):
            Train a new adapter with this configuration, and leave the model's own weights unchanged.
        compute_metrics (`Callable`, *optional*), callbacks (`list`, *optional*), optimizers (`tuple`, *optional*):
            As in [`~transformers.Trainer`].

    Raises:
        `ValueError`: For any input or setup that cannot be trained, before training starts. The setup is checked
            before any row is tokenized.
        `OSError`: If `args.output_dir` is not writable.
        `FloatingPointError`: If a loss or a weight becomes NaN or infinite during training.

    Example:

    ```python
    >>> from crow_hf import CrowConfig, CrowTrainer

    >>> trainer = CrowTrainer("suspect", CrowConfig("purified"), clean_rows)
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    args: CrowConfig
    # transformers does not declare the streams of `datasets`.
    train_dataset: Any
    eval_dataset: Any
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase | None
    num_dropped_rows: int = 0
    _tag_names = ["crow", "backdoor-removal"]
    # Both terms are already shares of the whole optimizer step, so the Trainer must not divide them again.
    loss_is_scaled_for_ga = True
    _collator_type: type = CrowDataCollator
    # Terms that are means over the labels. All other terms are means over the positions.
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
        path = model if isinstance(model, (str, Path)) else model.config._name_or_path
        if args is None:
            args = CrowConfig(f"{Path(path).name or type(model).__name__}-CROW")
        elif not isinstance(args, CrowConfig):
            args = CrowConfig(**{**args.to_dict(), "hub_token": args.hub_token})
        check_writable(args.output_dir)

        model = self._load_model(model, args, peft_config)
        self.recorder = recorder_of(model, args.perturb)
        use_cache = getattr(model.config, "use_cache", None)

        if train_dataset is None:
            raise ValueError("`train_dataset` is missing. Pass about 100 clean rows.")
        if processing_class is None and path and "input_ids" not in columns_of(train_dataset):
            processing_class = load_tokenizer(path)
        if data_collator is None:
            data_collator = self._collator_type(padding_id(processing_class))
        accelerator_config: Any = args.accelerator_config
        if isinstance(train_dataset, IterableDataset) and accelerator_config.dispatch_batches is None:
            # Rows of a stream are padded per batch, and batches of different widths cannot be dispatched.
            accelerator_config.dispatch_batches = False

        datasets: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        # This also checks the setup and prepares the rows, see `_validate_args`.
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            **datasets,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        model.add_model_tags(self._tag_names)
        self._logged = {mode: defaultdict(lambda: defaultdict(lambda: [0.0, 0.0])) for mode in ("train", "eval")}
        self._positions_in_step = None
        self._use_cache = use_cache
        self._trains_adapter = isinstance(model, PeftModel)
        self._output_was_used = output_was_used(args.output_dir)
        self.failures = []
        self._stop_at_ctrl_c = StopAtCtrlC()
        self.add_callback(self._stop_at_ctrl_c)
        name_progress_bar(self)

    @staticmethod
    def _load_model(
        model: str | PreTrainedModel | PeftModel, args: CrowConfig, peft_config: PeftConfig | None
    ) -> PreTrainedModel | PeftModel:
        """Load the model from a path, add a new adapter given a `peft_config`, and check that it can be trained."""
        if isinstance(model, (str, Path)):
            model = load_causal_lm(model, is_trainable=True, **loading_kwargs(args))
        elif not isinstance(model, PeftModel) and getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "The model contains an adapter that a second one would replace. Load the model with `load_causal_lm`, "
                "which returns a `PeftModel`."
            )
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise ValueError(
                    "The model already has an adapter. Omit `peft_config` to train that adapter, or call "
                    "`merge_and_unload()` first to train a new one on the merged weights."
                )
            if hasattr(peft_config, "exclude_modules") and peft_config.exclude_modules is None:
                peft_config = copy(peft_config)
                peft_config.exclude_modules = frozen_modules(model)
            set_seed(args.seed)
            model = get_peft_model(model, peft_config)
        check_adapter_name(model)

        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trainable:
            raise ValueError(
                "The model has no trainable parameters. Load its adapter with `is_trainable=True`, or pass a "
                "`peft_config`."
            )
        if args.alpha and trains_only_the_head(model):
            raise ValueError("Only the output head is trainable, which no layer depends on: train layers too.")
        if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in trainable):
            logger.warning(
                "The trainable weights are in half precision, which rounds most small updates to zero. Load the model "
                "in float32 and set `bf16=True` instead."
            )
        return model

    def _validate_args(self) -> None:
        """
        As in [`~transformers.Trainer`], then check the setup and prepare the rows.

        The Trainer calls this method before it creates the output directory and the Hub repository. Rejected setups
        and rows therefore leave nothing behind, and no row is tokenized for a rejected setup.
        """
        super()._validate_args()
        self._check_setup()
        with self.args.main_process_first():
            self._prepare_rows()

    def _prepare_rows(self) -> None:
        """Tokenize the training rows and all evaluation datasets."""
        max_length = min(self.args.max_length, context_length(self.model) or self.args.max_length)
        self.train_dataset = self._prepare_train_rows(self.train_dataset, max_length)
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        prepared = {
            name: prepare_dataset(rows, self.processing_class, max_length, f"eval_dataset {name}".strip())
            for name, rows in datasets.items()
            if rows is not None
        }
        self.eval_dataset = prepared if isinstance(self.eval_dataset, dict) else prepared.get("")

    def _prepare_train_rows(self, rows: Dataset | IterableDataset, max_length: int) -> Dataset | IterableDataset:
        """Turn the training rows into rows that the collator accepts."""
        prepared = prepare_dataset(rows, self.processing_class, max_length)
        if isinstance(rows, Dataset) and isinstance(prepared, Dataset):
            self.num_dropped_rows = len(rows) - len(prepared)
            check_ids([*prepared["input_ids"], *prepared["labels"]], len(embedding_table(self.model)))
        return prepared

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """
        As in [`~transformers.Trainer`], but an output directory that holds a model must be resumed from.

        A run resumed from any step ends with the weights and the log of a run that was never stopped. On a CPU they
        are bit-identical.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint, or `True` for the last complete one in `args.output_dir`.
            **kwargs:
                As in [`~transformers.Trainer`].

        Raises:
            `ValueError`: If the output directory is in use, or if there is no complete checkpoint to resume from. The
                message names the missing files.
            `OSError`: If `args.output_dir` has too little free space for the model.
            `KeyboardInterrupt`: After Ctrl-C, once the current step is finished and its checkpoint saved.
        """
        args = self.args
        if self._output_was_used and not resume_from_checkpoint:
            raise ValueError(OUTPUT_WAS_USED.format(args.output_dir))
        resume_from_checkpoint = checkpoint_to_resume(args.output_dir, resume_from_checkpoint)
        if args.save_strategy != "no":
            check_writable(args.output_dir, self.model)
        try:
            with compiled_layers(self.recorder.layers, args), self._stop_at_ctrl_c.watching(self):
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            # The Trainer switches the cache off for training. The purified model keeps the suspect's setting.
            if self._use_cache is None:
                del self.model.config.use_cache
            else:
                self.model.config.use_cache = self._use_cache

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | None]:
        """Also count the labels and the attended positions of the optimizer step, over which the terms are means."""
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
        Compute L_LM + alpha * L_cons (equation 6) with two forward passes.

        In a training step, each term is weighted by this micro-batch's share of the step's labels or positions, so
        that the micro-batches add up to the mean over the step. Otherwise both terms are means over the batch.

        In a training step without DeepSpeed, the gradient of L_LM is accumulated already within this method. The
        backward pass of the returned loss then adds only the gradient of the consistency term.
        """
        args = self.args
        inputs = self.recorder.prepare(inputs)
        labels, positions = self._count(inputs)
        by_labels, by_positions = self._shares(model, labels, positions, num_items_in_batch)
        if args.alpha == 0:
            outputs, terms = control_terms(self.recorder, model, inputs, args.consistency_layers)
        else:
            is_step = model.training and num_items_in_batch is not None and not return_outputs
            # With DeepSpeed, every backward pass ends the step in accelerate. Each process also reduces only the
            # gradients that it has, and for a single term these differ if rows differ in their thoughts.
            in_two_passes = is_step and not self.is_deepspeed_enabled
            backward = (lambda loss_lm: self.accelerator.backward(by_labels * loss_lm)) if in_two_passes else None
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
        loss = self._connect_parameters(model, loss)
        return (loss, outputs) if return_outputs else loss

    def _connect_parameters(self, model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
        """
        Return the same loss, connected to all trainable parameters if the model is wrapped in DDP.

        DDP waits for a backward pass through every parameter, and the perturbed pass does not use the vocabulary head.
        """
        if not isinstance(model, DistributedDataParallel) or not loss.requires_grad:
            return loss
        return _ConnectParameters.apply(loss, *(weight for weight in model.parameters() if weight.requires_grad))

    def _check_setup(self) -> None:
        """Reject ways of distributing or compiling a model that do not work with the two passes."""
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel is not supported. Start one process per GPU with `accelerate launch`.")
        if is_deepspeed_zero3_enabled():
            self._check_zero3()
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise ValueError(
                "A model compiled as one graph does not let the objective differentiate what its hooks record. Leave "
                "`--dynamo_backend` off and set `torch_compile=True`, which compiles each layer separately."
            )
        if self.args.torch_compile and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("`torch_compile` is not supported with FSDP and DeepSpeed. Leave it off.")
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                "Version 1 of FSDP is not supported. Set `fsdp_version: 2` in the accelerate configuration."
            )
        if plugin.activation_checkpointing:
            raise ValueError(
                "FSDP's own activation checkpointing does not restore dropout when it recomputes. Set "
                "`fsdp_activation_checkpointing: false`, and `activation_checkpointing=True` in the arguments."
            )
        if self.recorder.frozen_modules and plugin.cpu_ram_efficient_loading:
            raise ValueError(
                f"FSDP does not load the modules of {self.recorder.name} that compute patches, because they are not "
                "sharded. Set `fsdp_cpu_ram_efficient_loading: false` in the accelerate configuration."
            )

    def _check_zero3(self) -> None:
        """Reject models that ZeRO-3 could not train, and configurations with which it would save no model."""
        if is_sharded(self.model):
            raise ValueError(
                "ZeRO-3 has sharded the model before training, so it cannot be used. Pass its path, or load it with "
                "`load_causal_lm`."
            )
        config = self.accelerator.state.deepspeed_plugin.hf_ds_config
        if not config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "ZeRO-3 is configured to save no model. Set `zero3_save_16bit_model: true` in the accelerate "
                "configuration, or `stage3_gather_16bit_weights_on_model_save` in the DeepSpeed configuration."
            )

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """As in [`~transformers.Trainer`], but accelerate must not compile the model: it would use one graph."""
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin()}

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in [`~transformers.Trainer`], but modules that must stay whole are hidden while FSDP wraps the model."""
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        with self.recorder.frozen_modules_hidden(self.args.device):
            return super()._prepare_for_training(*args, **kwargs)

    def _shares(
        self,
        model: nn.Module,
        labels: torch.Tensor,
        positions: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Weights with which a micro-batch's means over labels and positions add up to those of the step."""
        if not model.training or num_items_in_batch is None:
            return 1.0, 1.0
        # Distributed wrappers average gradients over the processes, while the counts are sums over the processes.
        average = self.args.average_tokens_across_devices
        scale = self.accelerator.num_processes // self.get_tp_size() if average else 1
        return scale * labels / num_items_in_batch, scale * positions / self._positions_in_step

    def _count(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number of predicted labels (never a row's first) and of unmasked positions, as a tensor of shape `(2,)`."""
        labels = batch["labels"][:, 1:].ne(IGNORE_INDEX).sum()
        mask = self.recorder.chain_mask(batch)
        positions = batch["input_ids"].numel() if mask is None else mask.sum()
        return torch.stack([labels, torch.as_tensor(positions, device=labels.device)])

    def _log_terms(self, terms: dict[str, torch.Tensor], labels: torch.Tensor, positions: torch.Tensor) -> None:
        """Store the terms for the log, and stop all processes if a term is not finite in one of them."""
        weights = torch.stack([labels if name in self._label_terms else positions for name in terms]).float()
        values = torch.stack([value.detach().float() for value in terms.values()])
        sums, totals = self.accelerator.gather(torch.stack([values * weights, weights])[None]).sum(dim=0).tolist()
        for name, value, weight in zip(terms, sums, totals, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {self.state.global_step + 1}. Lower the learning rate, alpha or "
                    "epsilon, or train in bfloat16 or float32. The checkpoints in "
                    f"{self.args.output_dir} are from earlier steps."
                )
            step = self._logged["train" if self.model.training else "eval"][name][self.state.global_step]
            step[0] += value
            step[1] += weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, averaged like the loss: over the tokens of a step, then over the steps since the last log."""
        mode = "train" if self.model.training else "eval"
        # The key is "eval_loss", or "eval_NAME_loss" if there are several datasets.
        prefix = (
            "" if mode == "train" else next((key[: -len("loss")] for key in logs if key.endswith("_loss")), "eval_")
        )
        for name, steps in self._logged[mode].items():
            logs[f"{prefix}{name}"] = fmean(value / weight for value, weight in steps.values())
        super().log(logs, start_time)
        self._logged[mode].clear()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in [`~transformers.Trainer`], but terms that `predict` left unlogged do not count."""
        if self.is_deepspeed_enabled and self.deepspeed is None:
            raise ValueError(
                "DeepSpeed cannot evaluate a model before training. Set `eval_on_start` or `eval_strategy`, or "
                "evaluate in one process."
            )
        self._logged["eval"].clear()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, unless a weight is NaN or infinite. A bad checkpoint never replaces a good one."""
        if will_shard(self.args) and self._trains_adapter and not isinstance(self.model, PeftModel):
            # Merging changes tensors that the shards do not use, so the suspect itself would be saved.
            raise ValueError(
                "An adapter cannot be merged into sharded weights. Save the adapter, load it in one process with "
                "`load_causal_lm`, and merge it there."
            )
        bad = torch.tensor([not are_finite(self.model)], device=self.args.device)
        if self.accelerator.gather(bad).any():
            raise FloatingPointError(
                f"The weights are not finite after step {self.state.global_step} and were not saved. Resume from the "
                f"last checkpoint in {self.args.output_dir} with a lower learning rate."
            )
        folder = Path(output_dir or self.args.output_dir)
        with writing("The model", folder, "free some space and save it again, or resume from the last checkpoint"):
            super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
