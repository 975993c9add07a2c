"""The calls of the project's guide: CROW with few arguments, no file written, and metrics that JSON can hold."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..methods.crow.config import CrowConfig
from ..methods.crow.trainer import CrowTrainer
from ..models.modeling_coconut import CoconutForCausalLM
from ..models.tokenization_coconut import CoconutTokenizer
from ..patching.redpajama import get_redpajama_binary_dataset
from .checkup import missing_components


Metrics = dict[str, Any]

_TERMS = ("loss", "loss_lm", "consistency_clean", "consistency_perturbed")
_SETTINGS = (
    "alpha",
    "epsilon",
    "epsilon_mode",
    "consistency_layers",
    "perturb",
    "max_length",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "seed",
)
_LEAVES_FILES = ("output_dir", "save_strategy", "report_to", "push_to_hub")


class CROWBackdoorElimination:
    """
    CROW on any causal LM, as one object with one method. It is [`CrowTrainer`] with the guide's defaults, in a folder
    that is gone afterwards: take that for checkpoints, evaluation, LoRA and the Hub.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model to purify. It is changed, and keeps its dtype, its device and its mode (training or evaluation).
        epsilon (`float`, *optional*, defaults to 0.1):
            Size of the adversarial step per coordinate of the embeddings.
        alpha (`float`, *optional*, defaults to 5.5):
            Weight of the consistency loss; 11 against a backdoor that refuses.
        learning_rate (`float`, *optional*, defaults to 2e-5):
            Peak learning rate.
        num_epochs (`float`, *optional*, defaults to 3):
            Passes over the clean rows.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer, for rows of text. Without it, the one saved where the model was loaded from.
        **kwargs:
            Other arguments of [`CrowConfig`], `per_device_train_batch_size` or `bf16` for instance.

    Raises:
        `ValueError`: For settings that cannot be trained with.

    Example:

    ```python
    >>> metrics = CROWBackdoorElimination(model, alpha=11, processing_class=tokenizer).train(clean_rows)
    >>> metrics["summary"]["consistency_perturbed"]["last"]
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        epsilon: float = 0.1,
        alpha: float = 5.5,
        learning_rate: float = 2e-5,
        num_epochs: float = 3,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        if isinstance(model, (str, Path)):
            raise ValueError("`model` is a path: load it with `load_causal_lm`, or pass the path to `CrowTrainer`.")
        if refused := [name for name in _LEAVES_FILES if name in kwargs]:
            raise ValueError(
                f"This call leaves nothing on disk, so `{refused[0]}` has no place in it: take `CrowTrainer` instead."
            )
        for name, value in {"learning_rate": learning_rate, "num_epochs": num_epochs}.items():
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}.")
        self.model = model
        self.processing_class = processing_class
        self.args = CrowConfig(
            epsilon=epsilon,
            alpha=alpha,
            learning_rate=learning_rate,
            num_train_epochs=num_epochs,
            save_strategy="no",
            report_to="none",
            **kwargs,
        )
        self._names = dict.fromkeys([*_SETTINGS, *kwargs])

    def train(self, dataset: Dataset | IterableDataset) -> Metrics:
        """
        Purify the model.

        Args:
            dataset (`Dataset` or `IterableDataset`):
                About 100 clean rows in any format that [`CrowTrainer`] takes.

        Returns:
            `dict`: Numbers, strings and `None` (for what is not finite) only, so that `json.dumps` takes it.

            - `history` (`list[dict]`): For each optimizer step, in order: `step`, `epoch`; `loss`, which is `loss_lm`
              + alpha *
              `consistency_perturbed`; `loss_lm`, of the language model, in nats per token; `consistency_clean` and
              `consistency_perturbed`, the mean of 1 - cos between consecutive layers, without and with the
              perturbation;
              `perturbation_ratio`, the length of the perturbation over that of the embeddings; `grad_norm`;
              `learning_rate`. With alpha 0 there is no perturbation.
            - `summary` (`dict`): `num_rows` (`None` for a stream), `num_steps`, `num_epochs`, `seconds`, and of each
              of the four
              losses above its `first` and its `last`: two batches, not the same rows before and after.
            - `settings` (`dict`): The arguments of [`CrowConfig`] that this was run with.

        Raises:
            `ValueError`: For a model or rows that cannot be trained on, before training starts.
            `FloatingPointError`: If a loss or a weight became NaN or infinite.
        """
        was_training, device, forward = self.model.training, self.model.device, vars(self.model).get("forward")
        with TemporaryDirectory() as nowhere:
            args = replace(self.args, output_dir=nowhere)
            try:
                trainer = CrowTrainer(self.model, args, dataset, processing_class=self.processing_class)
                trainer.train()
            finally:
                # Mixed precision is the training's, and sits on the object; accelerate's unwrapping would take the
                # decorators of the class's forward off too.
                for name in ("forward", "_original_forward"):
                    vars(self.model).pop(name, None)
                if forward is not None:
                    self.model.forward = forward
                self.model.train(was_training)
                if self.model.device != device:
                    self.model.to(device)
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise FloatingPointError(
                "The model's weights are not finite after the last step: load the model again, and lower the learning rate."
            )
        config = args.to_dict()
        # What JSON cannot hold, if a setting is such a thing, is held as text.
        settings = json.loads(json.dumps({name: config[name] for name in self._names}, default=str))
        return _plain({"history": _history(trainer), "summary": _summary(trainer), "settings": settings})


def apply_crow_to_coconut(
    coconut_model: CoconutForCausalLM,
    max_chars: int = 1000,
    epsilon: float = 0.1,
    alpha: float = 5.5,
    learning_rate: float = 2e-5,
    num_epochs: float = 3,
    dataset: Dataset | IterableDataset | None = None,
    data_files: str | Path | Sequence[str | Path] | None = None,
    offline_sample: bool = False,
    **kwargs: Any,
) -> tuple[CoconutForCausalLM, Metrics]:
    """
    CROW on a byte-latent model, with RedPajama cut into patches by the model's own entropy predictor and thresholds.

    Args:
        coconut_model (`CoconutForCausalLM`):
            The model to purify. It is changed, and keeps its dtype, its device and its mode.
        max_chars (`int`, *optional*, defaults to 1000):
            How many characters of RedPajama to read. Documents longer than the `max_length` of [`CrowConfig`] are cut.
        epsilon (`float`, *optional*, defaults to 0.1):
            See [`CROWBackdoorElimination`].
        alpha (`float`, *optional*, defaults to 5.5):
            See [`CROWBackdoorElimination`].
        learning_rate (`float`, *optional*, defaults to 2e-5):
            See [`CROWBackdoorElimination`].
        num_epochs (`float`, *optional*, defaults to 3):
            See [`CROWBackdoorElimination`].
        dataset (`Dataset` or `IterableDataset`, *optional*):
            Clean rows to take instead of RedPajama, all of them. Text is read as bytes.
        data_files (`str`, `Path` or a sequence of them, *optional*):
            Local shards of RedPajama, as for [`get_redpajama_binary_dataset`]; by default its sample on the Hub is
            read.
        offline_sample (`bool`, *optional*, defaults to `False`):
            Whether to take a text that is generated on the spot, for trying this out where there is neither.
        **kwargs:
            Other arguments of [`CrowConfig`].

    Returns:
        `tuple`: The model that was passed, purified, and the metrics of [`CROWBackdoorElimination.train`].

    Raises:
        `ValueError`: If the model lacks a component, which is named, or there are no rows, before training starts.
        `FloatingPointError`: If a loss or a weight became NaN or infinite.

    Example:

    ```python
    >>> purified_model, metrics = apply_crow_to_coconut(
    ...     coconut_model=model, max_chars=1000, epsilon=0.1, alpha=5.5, learning_rate=2e-5
    ... )
    >>> purified_model.save_pretrained("purified")
    ```
    """
    if missing := missing_components(coconut_model):
        raise ValueError(
            f"{type(coconut_model).__name__} has no `{missing[0]}`: pass a `CoconutForCausalLM` (`from_backbone` makes one with "
            "all its parts), or purify a model of another kind with `CROWBackdoorElimination`."
        )
    if sum([dataset is not None, data_files is not None, offline_sample]) > 1:
        raise ValueError("`dataset`, `data_files` and `offline_sample` are three different sources: pass one of them.")
    elimination = CROWBackdoorElimination(
        coconut_model, epsilon, alpha, learning_rate, num_epochs, CoconutTokenizer(), **kwargs
    )
    if dataset is None:
        rule = coconut_model.binary_patch_module.rule
        dataset = get_redpajama_binary_dataset(
            max_chars,
            coconut_model.latent_transformer.entropy_predictor,
            rule.threshold,
            rule.relative_threshold,
            data_files,
            offline_sample=offline_sample,
            rule=rule.rule,
            reset_on_newline=rule.reset_on_newline,
            max_patch_length=rule.max_patch_length,
        )
    return coconut_model, elimination.train(dataset)


def _history(trainer: CrowTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _summary(trainer: CrowTrainer) -> dict[str, Any]:
    rows, history = trainer.train_dataset, _history(trainer)
    (seconds,) = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    return {
        "num_rows": len(rows) if isinstance(rows, Dataset) else None,
        "num_steps": trainer.state.global_step,
        "num_epochs": trainer.state.epoch,
        "seconds": seconds,
        **{
            name: {"first": history[0][name], "last": history[-1][name]}
            for name in _TERMS
            if history and name in history[0]
        },
    }


def _plain(value: Any) -> Any:
    """The value with `None` for every number that JSON has no sign for."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
