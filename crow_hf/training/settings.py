"""The settings of a run: which of them to record."""

import re
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..secrets import without_secrets


# A recipe has other defaults than transformers for some of these, so a repetition needs them in any case.
_ALWAYS_RECORDED = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "seed"),
)
# They say where a run was stored, shown and computed, and change nothing in the model.
_NEVER_RECORDED = re.compile(
    r"output_dir|log\w+|disable_tqdm|report_to|run_name|project|trackio_\w+|save_\w+|push_to_hub|hub_\w+"
    r"|resume_from_checkpoint|use_cpu|local_rank|ddp_\w+|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)"
)


def recorded_settings(args: TrainingArguments) -> dict[str, Any]:
    """
    Return the settings that are needed to repeat a run.

    Args:
        args (`TrainingArguments`):
            The arguments of the run.

    Returns:
        `dict`: The arguments that the method itself defines, the main settings of the optimizer, and every other
        argument that differs from its default in transformers. It holds no secret, and nothing about where the run was
        computed, stored, logged or pushed.
    """
    own = [
        name
        for kind in type(args).__mro__
        if issubclass(kind, TrainingArguments) and kind is not TrainingArguments
        for name in kind.__annotations__
    ]
    values, defaults = args.to_dict(), _transformers_defaults()
    needed = [
        name
        for name, value in values.items()
        if name in _ALWAYS_RECORDED or name not in defaults or not _is_default(value, defaults[name])
    ]
    return {
        name: without_secrets(values[name])
        for name in dict.fromkeys([*own, *needed])
        if name in values and not _NEVER_RECORDED.fullmatch(name)
    }


def _transformers_defaults() -> dict[str, Any]:
    defaults = {each.name: None if each.default is MISSING else each.default for each in fields(TrainingArguments)}
    return defaults | {"accelerator_config": AcceleratorConfig().to_dict()}


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, dict) and isinstance(default, dict):
        return all(default.get(key) == held for key, held in value.items())
    # `TrainingArguments` turns some defaults of None into False or an empty list.
    return value == default or not (value or default)
