"""The calls of the project's guide: CROW with few arguments, without files, and with metrics that JSON can hold."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import temporary_folder
from ..methods.crow.config import CrowConfig
from ..methods.crow.trainer import CrowTrainer
from ..models.modeling_coconut import CoconutForCausalLM
from ..models.tokenization_coconut import CoconutTokenizer
from ..patching.redpajama import get_redpajama_binary_dataset
from ..reporting.record import as_json
from ..training.loading import move
from ..training.settings import recorded_settings
from .patch_checkup import missing_components


Metrics = dict[str, Any]

_TERMS = ("loss", "loss_lm", "consistency_clean", "consistency_perturbed")
_WRITES_FILES = ("output_dir", "save_strategy", "report_to", "push_to_hub")


class CROWBackdoorElimination:
    """
    Purify any causal LM with CROW in one call.

    This runs [`CrowTrainer`] with the defaults of the guide in a temporary folder. Use [`CrowTrainer`] for
    checkpoints, evaluation, a fresh LoRA and the Hub.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model to purify. It is changed. Its dtype, its device and its mode (training or evaluation) stay.
        epsilon (`float`, *optional*, defaults to 0.1):
            Size of the adversarial step per coordinate of the embeddings.
        alpha (`float`, *optional*, defaults to 5.5):
            Weight of the consistency loss. Use 11 against a backdoor that makes the model refuse.
        learning_rate (`float`, *optional*, defaults to 2e-5):
            Peak learning rate.
        num_epochs (`float`, *optional*, defaults to 3):
            Number of passes over the clean rows.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer, for rows of text. Defaults to the one that was saved with the model.
        **kwargs:
            Other arguments of [`CrowConfig`], such as `per_device_train_batch_size` or `bf16`.

    Raises:
        `ValueError`: If the settings are invalid.

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
            raise ValueError(
                "`model` is a path: load the model with `load_causal_lm`, or pass the path to `CrowTrainer`."
            )
        if refused := [name for name in _WRITES_FILES if name in kwargs]:
            raise ValueError(f"This call writes no files and takes no `{refused[0]}`: use `CrowTrainer` instead.")
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

    def train(self, dataset: Dataset | IterableDataset) -> Metrics:
        """
        Purify the model.

        Args:
            dataset (`Dataset` or `IterableDataset`):
                About 100 clean rows in any format that [`CrowTrainer`] accepts.

        Returns:
            `dict`: The metrics. `json.dumps` accepts them: numbers that are NaN or infinite are `None`.

            - `history` (`list[dict]`): One entry for each optimizer step: `step`; `epoch`; `loss`, which is
              `loss_lm + alpha * consistency_perturbed`; `loss_lm`, the language modeling loss in nats per token;
              `consistency_clean` and `consistency_perturbed`, the mean of 1 - cos between consecutive layers without
              and with the perturbation; `perturbation_ratio`, the length of the perturbation divided by that of the
              embeddings; `grad_norm`; `learning_rate`. With `alpha=0` there is no perturbation.
            - `summary` (`dict`): `num_rows` (`None` for a stream), `num_steps`, `num_epochs`, `seconds`, and the
              `first` and the `last` value of each of the four losses. These values belong to two different batches.
            - `settings` (`dict`): The arguments of [`CrowConfig`] that are needed to repeat the run: those of CROW,
              the main ones of the optimizer, and all others that are not defaults.

        Raises:
            `ValueError`: If the model or the rows cannot be used. Raised before training starts.
            `FloatingPointError`: If a loss or a weight becomes NaN or infinite.
        """
        was_training, device, forward = self.model.training, self.model.device, vars(self.model).get("forward")
        with temporary_folder() as folder:
            args = replace(self.args, output_dir=folder)
            try:
                trainer = CrowTrainer(self.model, args, dataset, processing_class=self.processing_class)
                trainer.train()
            finally:
                # Accelerate replaces `forward` on the object for mixed precision. Its own unwrapping would also remove
                # the decorators of the class's `forward`.
                for name in ("forward", "_original_forward"):
                    vars(self.model).pop(name, None)
                if forward is not None:
                    vars(self.model)["forward"] = forward
                self.model.train(was_training)
                if self.model.device != device:
                    move(self.model, device)
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise FloatingPointError(
                "The model's weights are not finite after the last step: load the model again, and lower the learning "
                "rate."
            )
        return as_json(
            {"history": _history(trainer), "summary": _summary(trainer), "settings": recorded_settings(args)}
        )


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
    Purify a byte-latent model with CROW.

    The clean rows are documents of RedPajama. The model's own entropy predictor and thresholds cut them into patches.

    Args:
        coconut_model (`CoconutForCausalLM`):
            The model to purify. It is changed. Its dtype, its device and its mode (training or evaluation) stay.
        max_chars (`int`, *optional*, defaults to 1000):
            Number of characters of RedPajama to read. Documents longer than the `max_length` of [`CrowConfig`] are
            cut.
        epsilon (`float`, *optional*, defaults to 0.1):
            See [`CROWBackdoorElimination`].
        alpha (`float`, *optional*, defaults to 5.5):
            See [`CROWBackdoorElimination`].
        learning_rate (`float`, *optional*, defaults to 2e-5):
            See [`CROWBackdoorElimination`].
        num_epochs (`float`, *optional*, defaults to 3):
            See [`CROWBackdoorElimination`].
        dataset (`Dataset` or `IterableDataset`, *optional*):
            Clean rows to use instead of RedPajama. All of them are used. Text is read as bytes.
        data_files (`str`, `Path` or a sequence of them, *optional*):
            Local shards of RedPajama, as in [`get_redpajama_binary_dataset`]. Defaults to the sample of RedPajama on
            the Hub.
        offline_sample (`bool`, *optional*, defaults to `False`):
            Whether to use a generated text instead, to try this call without RedPajama.
        **kwargs:
            Other arguments of [`CrowConfig`].

    Returns:
        `tuple[CoconutForCausalLM, dict]`: The purified model, which is the one that was passed, and the metrics of
        [`CROWBackdoorElimination.train`].

    Raises:
        `ValueError`: If a component of the model is missing, or there are no rows. Raised before training starts.
        `FloatingPointError`: If a loss or a weight becomes NaN or infinite.

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
            f"{type(coconut_model).__name__} has no `{missing[0]}`: pass a complete `CoconutForCausalLM`, as "
            "`from_backbone` creates it, or use `CROWBackdoorElimination` for other models."
        )
    if sum([dataset is not None, data_files is not None, offline_sample]) > 1:
        raise ValueError("`dataset`, `data_files` and `offline_sample` are different sources: pass one of them.")
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
            data_files=data_files,
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
