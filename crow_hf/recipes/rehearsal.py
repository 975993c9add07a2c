"""What is checked before the work: the arguments of a recipe, and a rehearsal of what would fail after hours."""

from copy import deepcopy
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_zero3_enabled

from ..data.rows import fits_a_format
from ..evidence.canaries import Canary, check_canaries, draw_canaries
from ..files import temporary_folder
from ..methods.crow.config import CrowConfig, scratch_config
from ..methods.crow.trainer import CrowTrainer
from ..methods.invariance.config import InvarianceConfig
from ..methods.invariance.trainer import InvarianceTrainer
from ..progress import phase
from ..training.loading import is_quantized, merged
from ..training.recorder import base_model_of, recorder_of
from ..training.saves import hollow_copy, one_line, quietly, rehearse_save
from ..training.sharding import are_finite, will_shard
from ..training.trial import try_out
from .presets import RECIPES


def check_recipe(recipe: str, args: CrowConfig) -> None:
    """
    Refuse arguments that a recipe cannot run with, before any work.

    Raises:
        `ValueError`: If the arguments belong to another recipe, if weights are sharded that must be whole, or if a
            tracker is not installed.
    """
    if recipe not in RECIPES or (recipe == "strong") != isinstance(args, InvarianceConfig):
        raise ValueError(
            f"The recipe {recipe!r} does not go with {type(args).__name__}: make the arguments with "
            "recipe_config(recipe, ...)."
        )
    if will_shard(args):
        if isinstance(args, InvarianceConfig) and args.num_canaries:
            raise ValueError(
                "Canaries cannot be implanted in sharded weights (FSDP, ZeRO-3): set `num_canaries` to 0."
            )
        if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            raise ValueError(
                "Every process uses the model before it is sharded: set `fsdp_cpu_ram_efficient_loading: false` in "
                "the configuration of accelerate."
            )
    # The Trainer, which is built last, would find out only then.
    if missing := set(args.report_to) - set(get_available_reporting_integrations()):
        raise ValueError(
            f"`report_to` names a tracker that is not installed ({', '.join(sorted(missing))}): install it, or leave "
            "it out."
        )


@phase("Checking model and rows")
def rehearse(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset,
    args: CrowConfig,
    processing_class: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None,
    merge: bool,
) -> list[Canary]:
    """
    Try the suspect on a few tokens, build the trainer with its adapter, optimizer and schedule on a copy without
    weights, merge that adapter, and save the suspect without its weights. What would fail after hours of work fails
    here.

    The copy of quantized weights is not quantized, so the layers that PEFT has for these are not rehearsed. Weights
    that will be sharded are not tried on tokens, because they fit into no single device, and nothing of what
    DeepSpeed builds can be built twice.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect as [`merge_before`] returns it, on the device of the run. Only settings that could not be saved
            are changed.
        dataset (`Dataset` or `IterableDataset`):
            The clean rows.
        args (`CrowConfig`):
            The arguments of the run.
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        peft_config (`PeftConfig`, *optional*):
            The fresh adapter.
        merge (`bool`):
            Whether it will be merged.

    Returns:
        `list[Canary]`: The canaries of the run, which fit into the rows.

    Raises:
        `ValueError`: For everything that the objective, the trainer, the adapter, the optimizer or the saving refuses,
            and if there is no room for the canaries.
    """
    # Keeps 4-bit weights from being packed by the first use of the model, too.
    recorder = recorder_of(model, args.perturb)
    if not are_finite(model):
        raise ValueError("Weights of the suspect are NaN or infinite: download it again, or take another checkpoint.")
    rehearse_save(model, processing_class)
    if is_deepspeed_zero3_enabled():
        return []
    canaries: list[Canary] = []
    if isinstance(args, InvarianceConfig) and args.num_canaries and isinstance(dataset, Dataset) and len(dataset):
        canaries = draw_canaries(model, processing_class, args.num_canaries, args.seed)
        canaries = check_canaries(model, dataset, canaries, args.max_length, processing_class)
    if not will_shard(args):
        # Before the trainer patches kernels.
        try_out(recorder)
    trainer_type: Any = InvarianceTrainer if isinstance(args, InvarianceConfig) else CrowTrainer

    class Rehearsal(trainer_type):
        def _move_model_to_device(self, *args: Any) -> None:
            """Stay without memory."""

        def _copy_suspect(self, model: Any) -> Any:
            return hollow_copy(model)

        def _prepare_suspect(self, suspect: Any) -> Any:
            return suspect

    if isinstance(args, InvarianceConfig) and isinstance(dataset, Dataset) and not fits_a_format(dataset.column_names):
        # The suspect will answer. Any answer shows whether the prompts can be trained on.
        dataset = Dataset.from_list([{"prompt": "prompt", "completion": "answer"}])
    with temporary_folder() as folder, quietly():
        try:
            hollow = _unquantized(model) if is_quantized(model) else hollow_copy(model)
            options: dict[str, Any] = {"processing_class": processing_class, "peft_config": peft_config}
            trainer = Rehearsal(hollow, scratch_config(args, folder), dataset, **options)
            trainer.check_optimizer()
            if merge and isinstance(trainer.model, PeftModel):
                _rehearse_merge(trainer.model)
        except (ImportError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"This model cannot be trained with these arguments ({one_line(error)}).") from error
    return canaries


def merge_before(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """
    Merge the adapter of a suspect, if it has one, before a fresh adapter is trained.

    Raises:
        `ValueError`: If it cannot be merged, see [`merged`].
    """
    if peft_config is None or not isinstance(model, PeftModel):
        return model
    if is_quantized(model):
        raise ValueError(
            "An adapter is not merged into quantized weights: leave out the fresh adapter to train the existing one."
        )
    return merged(model)


def _rehearse_merge(model: PeftModel) -> None:
    """Merge an adapter whose values do not matter, because some kinds refuse it. The model is used up."""
    try:
        model.to("meta").merge_and_unload()
    except Exception as error:
        # Some kinds compute with the values. Whether they can be merged is seen at the end.
        if "meta tensor" not in str(error):
            raise ValueError(
                f"This adapter could not be merged after the training ({one_line(error)}): set `merge=False`, or "
                "train another kind."
            ) from error


def _unquantized(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Copy the structure that a quantized model would have without quantization. It takes no memory."""
    base = base_model_of(model)
    config = deepcopy(base.config)
    del config.quantization_config
    with torch.device("meta"):
        structure = type(base)(config)
    plain: Any = hollow_copy(structure)
    # The Trainer asks for both.
    plain.is_quantized, plain.hf_quantizer = True, getattr(base, "hf_quantizer", None)
    return get_peft_model(plain, deepcopy(model.active_peft_config)) if isinstance(model, PeftModel) else plain
