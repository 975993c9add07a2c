"""Merge a saved adapter into the files of its base model, one after another, in the memory of one."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file, logging

from ..files import whole_files
from .checkpoints import check_writable
from .foreign import drop_foreign_settings
from .loading import is_quantized, load_causal_lm, load_tokenizer, merged
from .recorder import base_model_of
from .saves import cast_to, copy_side_files, save_whole, stored_dtype
from .sizes import weights_of_model


logger = logging.get_logger(__name__)


def merge_adapter(adapter: str | Path, output_dir: str | Path) -> None:
    """
    Merge an adapter into the weights of the base model that it names, and save the whole model.

    An adapter that was trained on quantized weights (QLoRA) is merged into the weights as they are stored. Each sum is
    computed in float32, and rounded to the dtype of its file. A LoRA takes the memory of the largest file. Other
    adapters, and those that change tied embeddings or the number of tokens, take that of the whole model.

    Args:
        adapter (`str` or `Path`):
            The folder of the adapter, or its name on the Hub.
        output_dir (`str` or `Path`):
            The folder to save to. It must be empty or new.

    Raises:
        `ValueError`: If there is no adapter, or if it or its base model cannot be read or merged.
        `OSError`: If the folder cannot be written to.

    Example:

    ```python
    >>> merge_adapter("purified-adapter", "purified-whole")
    ```
    """
    check_writable(str(output_dir))
    tokenizer = load_tokenizer(adapter)
    # Without memory, but with every check of a model that is loaded.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        model = load_causal_lm(adapter, device_map="meta")
    if not isinstance(model, PeftModel):
        raise ValueError(f"{adapter} is no adapter, so there is nothing to merge.")
    base: Any = base_model_of(model)
    if is_quantized(model):
        raise ValueError(
            f"The base model {base.name_or_path} is stored quantized: name the model that it was made from in "
            "adapter_config.json, as `base_model_name_or_path`."
        )
    files = weights_of_model(base.name_or_path, revision=model.active_peft_config.revision)
    with whole_files(output_dir) as folder:
        if _is_simple(model, files):
            _merge_files(model, str(adapter), files, folder)
            _save_rest(model, tokenizer, folder)
        else:
            logger.warning("This adapter is merged in the memory of the whole model.")
            whole: Any = merged(load_causal_lm(adapter, dtype="float32"))
            drop_foreign_settings(whole, tokenizer)
            cast_to(
                whole, stored_dtype(base.name_or_path, revision=model.active_peft_config.revision) or torch.float32
            )
            save_whole(folder, whole)
        tokenizer.save_pretrained(folder)
        copy_side_files(base.name_or_path, folder, revision=model.active_peft_config.revision)


def _is_simple(model: PeftModel, files: list[str]) -> bool:
    """Whether each matrix that the adapter changes is a tensor of the files, and is used in one place."""
    config, base = model.active_peft_config, base_model_of(model)
    unusual = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "lora_bias")
    if type(config) is not LoraConfig or config.bias != "none" or any(getattr(config, name, None) for name in unusual):
        return False
    held: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            held |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    in_memory = {name.replace(".base_layer", ""): list(tensor.shape) for name, tensor in base.state_dict().items()}
    changed = {f"{name}.weight" for name in _layers(model)}
    tied = {
        name.replace(".base_layer", "") for pair in getattr(base, "all_tied_weights_keys", {}).items() for name in pair
    }
    # Other names are those of an architecture whose files differ from its modules, and other shapes are added tokens.
    return changed <= held.keys() - tied and all(in_memory.get(name) == shape for name, shape in held.items())


def _layers(model: PeftModel) -> dict[str, Any]:
    return {
        name: module for name, module in base_model_of(model).named_modules() if isinstance(module, BaseTunerLayer)
    }


@torch.no_grad()
def _merge_files(model: PeftModel, adapter: str, files: list[str], folder: Path) -> None:
    weights = load_peft_weights(adapter, device="cpu", use_safetensors=True)
    layers = _layers(model)
    for file in files:
        with safe_open(file, "pt") as held:
            tensors = {name: held.get_tensor(name) for name in held.keys()}
            metadata = held.metadata()
        for name, tensor in tensors.items():
            owner = name.removesuffix(".weight")
            layer = layers.get(owner)
            if layer is None or owner == name:
                continue
            hollow = layer.base_layer.weight
            layer.base_layer.weight = nn.Parameter(tensor.float(), requires_grad=False)
            own: dict[str, torch.Tensor] = {}
            for inner, _ in layer.named_parameters():
                # As PEFT names them in the file.
                key = f"base_model.model.{owner}.{inner.replace('.default', '')}"
                found = weights.get(key, weights.get(key.removesuffix(".weight")))
                own |= {} if found is None else {inner: found.float()}
            layer.load_state_dict(own, strict=False, assign=True)
            layer.merge(safe_merge=True)
            tensors[name] = layer.base_layer.weight.data.to(tensor.dtype)
            layer.base_layer.weight = hollow
        save_file(tensors, folder / Path(file).name, metadata)
        del tensors


def _save_rest(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the config of the base model, its settings of generation and its index, whose names stay the same."""
    base: Any = base_model_of(model)
    revision = model.active_peft_config.revision
    drop_foreign_settings(base, tokenizer)
    if base._auto_class is not None:
        # The code of our own models, which their config names.
        custom_object_save(base, folder, config=base.config)
    base.config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    index = cached_file(
        base.name_or_path, SAFE_WEIGHTS_INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if index is not None:
        shutil.copyfile(index, folder / SAFE_WEIGHTS_INDEX_NAME)
