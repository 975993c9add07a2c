"""Save a model whole: every tensor, in the dtype of the suspect's files, with the files that no training changes."""

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from peft.functional import cast_adapter_dtype
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import id_tensor_storage
from transformers.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..files import leads_outside, temporary_folder, write_text
from .foreign import without_pointers
from .gguf import gguf_header, split_gguf
from .recorder import base_model_of


logger = transformers_logging.get_logger(__name__)

# Files beside a model that a purification does not change. Code is not among them, because the suspect's maker wrote
# it.
SIDE_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tekken.json"),
    *(
        name + suffix
        for name in ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
        for suffix in ("", ".md", ".txt")
    ),
)
_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@contextmanager
def quietly() -> Iterator[None]:
    """Show no progress and no warnings, which the real work shows again."""
    shows = transformers_logging.is_progress_bar_enabled(), datasets.utils.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.utils.disable_progress_bars()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        if shows[0]:
            transformers_logging.enable_progress_bar()
        if not shows[1]:
            datasets.utils.enable_progress_bars()


def hollow_copy(model: nn.Module) -> nn.Module:
    """
    Copy the structure of a model. Its tensors have their shapes and dtypes, are 0, and take no memory.

    Args:
        model (`nn.Module`):
            The model. It is not changed.
    """
    hollow: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        is_parameter = isinstance(tensor, nn.Parameter)
        hollow[id(tensor)] = nn.Parameter(zeros, tensor.requires_grad) if is_parameter else zeros
    return deepcopy(model, hollow)


def rehearse_save(model: PreTrainedModel | PeftModel, processing_class: PreTrainedTokenizerBase | None) -> None:
    """
    Save everything except the weights of a full model into a temporary folder, and repair what can be repaired.

    transformers checks some settings only when they are saved, which is after the training.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model. Output flags and sampling settings that transformers loads but does not save are changed in it.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer.

    Raises:
        `ValueError`: If the model or its tokenizer cannot be saved.
    """
    with temporary_folder() as folder:
        try:
            quantizer = getattr(model, "hf_quantizer", None)
            if isinstance(model, PeftModel):
                model.save_pretrained(folder)
            elif quantizer is not None:
                # Its weights are not saved, but an adapter is, which must find them again.
                if not quantizer.is_serializable():
                    raise ValueError("its weights are in a format that transformers reads but does not write")
            else:
                _repair_settings(model, folder)
                _shapes_of(model, saved_tensors(model))
                with quietly():
                    model.save_pretrained(folder, state_dict={})
            if processing_class is not None:
                processing_class.save_pretrained(folder)
        except Exception as error:
            raise ValueError(
                f"The model could not be saved after the work ({one_line(error)}): mend its files, or take a copy of "
                "it in safetensors."
            ) from error


def _repair_settings(model: PreTrainedModel, folder: str) -> None:
    config, generation_config = model.config, model.generation_config
    try:
        config.save_pretrained(folder)
    except Exception:
        config.output_attentions = config.output_hidden_states = False
        # They decide how answers are written, so they belong to the other file. transformers says so too.
        for name, value in config._get_generation_parameters().items():
            if generation_config is not None:
                setattr(generation_config, name, value)
            delattr(config, name)
        config.save_pretrained(folder)
        logger.warning("Settings of the config that transformers does not save were switched off or moved.")
    if generation_config is None:
        return
    try:
        generation_config.save_pretrained(folder)
    except ValueError:
        # transformers saves such settings, with a warning, as long as they are those of the file. Training may have
        # changed only the ids of special tokens.
        generation_config._original_object_hash = hash(generation_config)
        generation_config.save_pretrained(folder)


def saved_tensors(
    model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """
    Return the tensors that the file of a model must hold for the model to be loaded again.

    A tensor under several names is left out where the config ties the names. Where it was tied by hand, loading would
    not tie it again, so every name is kept.

    Args:
        model (`PreTrainedModel`):
            The model.
        state_dict (`dict`, *optional*):
            Its whole state, if the model itself is sharded.
    """
    state = model.state_dict() if state_dict is None else state_dict
    tied, ignored = getattr(model, "all_tied_weights_keys", {}), model._keys_to_ignore_on_save or ()

    def is_tied(name: str) -> bool:
        source = state.get(tied.get(name, ""))
        return source is not None and id_tensor_storage(source) == id_tensor_storage(state[name])

    return {
        name: tensor
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and name not in ignored and not is_tied(name)
    }


def with_own_storage(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy each tensor that shares its storage with an earlier one, because a file of safetensors cannot."""
    seen, own = set(), {}
    for name, tensor in tensors.items():
        storage = id_tensor_storage(tensor)
        own[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return own


def lost_tensors(
    folder: str | Path, model: PreTrainedModel | PeftModel, tensors: Mapping[str, torch.Tensor]
) -> list[str]:
    """
    Compare a saved model with the one in memory.

    Args:
        folder (`str` or `Path`):
            The folder of the saved model.
        model (`PreTrainedModel` or `PeftModel`):
            The model in memory.
        tensors (`dict`):
            What must be in its files, by the names in memory: [`saved_tensors`], or the state of an adapter.

    Returns:
        `list[str]`: The names of tensors that the files lack, or hold in another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not isinstance(model, PeftModel):
        wanted = _shapes_of(model, tensors)
    found: dict[str, tuple[int, ...]] = {}
    prefix = "adapter_model" if isinstance(model, PeftModel) else "model"
    for file in Path(folder).glob(f"{prefix}*.safetensors"):
        with safe_open(file, "pt") as held:
            found |= {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}
    return sorted(name for name, shape in wanted.items() if found.get(name) != shape)


def write_weights(folder: str | Path, model: PreTrainedModel | PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the weights and the config without the checks of transformers, as the last resort."""
    is_adapter = isinstance(model, PeftModel)
    pattern = "adapter_model{suffix}.safetensors" if is_adapter else "model{suffix}.safetensors"
    save_torch_state_dict(dict(tensors), folder, filename_pattern=pattern)
    if isinstance(model, PeftModel):
        if not (Path(folder) / ADAPTER_CONFIG_NAME).exists():
            model.active_peft_config.save_pretrained(str(folder))
    elif not (Path(folder) / CONFIG_NAME).exists():
        config: PreTrainedConfig = model.config
        config.to_json_file(Path(folder) / CONFIG_NAME)


def save_whole(folder: str | Path, model: PreTrainedModel | PeftModel) -> None:
    """
    Save a model that no trainer saves, every tensor under each name that loading needs.

    Args:
        folder (`str` or `Path`):
            The folder to save to.
        model (`PreTrainedModel` or `PeftModel`):
            The model.

    Raises:
        `OSError`: If the written files lack a tensor.
    """
    if isinstance(model, PeftModel):
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        tensors = saved_tensors(model)
        model.save_pretrained(folder, state_dict=with_own_storage(tensors))
    check_saved(folder, model, tensors)


def check_saved(folder: str | Path, model: PreTrainedModel | PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise an `OSError` if the files of a model lack a tensor, see [`lost_tensors`]."""
    if lost := lost_tensors(folder, model, tensors):
        raise OSError(f"{len(lost)} tensors, such as {lost[0]}, are not in the files")


def hub_options(name: str, model: PreTrainedModel | PeftModel, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the `revision` and the `cache_dir` that a suspect was loaded with, as far as they are known.

    Args:
        name (`str`):
            The name of the suspect.
        model (`PreTrainedModel` or `PeftModel`):
            The suspect, which may have been trained.
        kwargs (`dict`):
            The keyword arguments that it was loaded with.
    """
    options = {each: kwargs[each] for each in ("revision", "cache_dir") if each in kwargs}
    base = base_model_of(model)
    # The commit of an adapter is not known, but that of its base is.
    if base.name_or_path == name and (commit := getattr(base.config, "_commit_hash", None)):
        options["revision"] = commit
    return options


def stored_dtype(name: str | Path, **options: Any) -> torch.dtype | None:
    """
    Return the dtype in which most weights of a suspect are stored.

    Args:
        name (`str` or `Path`):
            The folder of the suspect, or its name on the Hub. It is loaded, so its files are in the cache.
        **options:
            The `revision` and the `cache_dir` that it was loaded with.

    Returns:
        `torch.dtype`: `None` if there are no weights in floating point. bfloat16 for GGUF with quantised weights.
    """
    folder, gguf = split_gguf(name)
    if gguf is not None:
        return gguf_header(str(name), folder, gguf, **options, local_files_only=True).dtype or torch.bfloat16
    sizes: dict[torch.dtype, int] = {}
    for file in _files_of(name, ["*.safetensors"], **options, local_files_only=True):
        with safe_open(file, "pt") as held:
            for key in held.keys():
                tensor = held.get_slice(key)
                if dtype := _STORED_DTYPES.get(tensor.get_dtype()):
                    sizes[dtype] = sizes.get(dtype, 0) + torch.Size(tensor.get_shape()).numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


@torch.no_grad()
def cast_to(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> bool:
    """
    Round a model's weights to a dtype, in place. Tensors that the model keeps in float32 stay there.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model. Only the adapter of a `PeftModel` is rounded.
        dtype (`torch.dtype`):
            The dtype.

    Returns:
        `bool`: Whether all weights fit. Otherwise nothing is changed.
    """
    kept = base_model_of(model)._get_dtype_plan(dtype)
    rounded = [
        tensor
        for name, tensor in (*model.named_parameters(), *_saved_buffers(model))
        if tensor.is_floating_point()
        and (tensor.requires_grad or not isinstance(model, PeftModel))
        and not _is_kept(name, kept)
    ]
    limit = torch.finfo(dtype).max
    if any(bool(tensor.abs().max() > limit) for tensor in rounded if tensor.numel()):
        return False
    for tensor in rounded:
        tensor.data = tensor.data.to(dtype)
    return True


@torch.no_grad()
def cast_as_loaded(model: PeftModel, dtype: torch.dtype | None) -> None:
    """
    Bring an adapter and its base model to the dtypes in which transformers and PEFT load them again.

    PEFT computes with adapters of 16 bits in float32. Modules that are trained as a whole get the dtype of the base.

    Args:
        model (`PeftModel`):
            The model, whose adapter is saved.
        dtype (`torch.dtype`, *optional*):
            The dtype in which the base model is stored. Without it, the base stays as it is.
    """
    base = base_model_of(model)
    kept = base._get_dtype_plan(dtype) if dtype is not None else {}
    for name, tensor in model.named_parameters() if dtype is not None else ():
        is_of_base = not tensor.requires_grad or ".modules_to_save." in name
        if is_of_base and tensor.is_floating_point() and not _is_kept(name, kept):
            tensor.data = tensor.data.to(dtype)
    for adapter in model.peft_config:
        cast_adapter_dtype(base, adapter)


def _is_kept(name: str, kept: Iterable[str]) -> bool:
    """Whether a model keeps a tensor in float32."""
    return any(re.search(rf"(^|\.){pattern}($|\.)", name) for pattern in kept)


def copy_side_files(name: str | Path, folder: str | Path, **options: Any) -> None:
    """
    Copy the files of a suspect that a purification does not change, unless the folder has them. Pointers to code are
    left out, and so are chat templates, which the tokenizer writes itself.

    Args:
        name (`str` or `Path`):
            The folder of the suspect, or its name on the Hub.
        folder (`str` or `Path`):
            The folder to copy to.
        **options:
            The `revision`, the `cache_dir` and the `token` that the suspect was loaded with.
    """
    for file in _files_of(name, SIDE_FILES, **options):
        copy = Path(folder) / file.name
        # A template that is not in the folder yet is none of the tokenizer that was measured.
        if copy.exists() or file.name.startswith("chat_template"):
            continue
        if file.suffix != ".json":
            shutil.copyfile(file, copy)
            continue
        try:
            write_text(copy, json.dumps(without_pointers(json.loads(file.read_bytes())), indent=2) + "\n")
        except (ValueError, RecursionError) as error:
            logger.warning(f"{file.name} is not copied, because it cannot be read ({one_line(error)}).")


def one_line(error: BaseException) -> str:
    """Return the beginning of an error's message, in one line, and with the error's class if it says little."""
    # A long list of models follows these words.
    text = " ".join(str(error).partition("Model type should be one of")[0].split())[:300].rstrip(".:")
    says_enough = text and isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
    return text if says_enough else f"{type(error).__name__}: {text}".rstrip(": ")


def _files_of(name: str | Path, patterns: Iterable[str], **options: Any) -> list[Path]:
    """The files of a folder, or of a repository on the Hub. A link to a place outside of them is not followed."""
    if not str(name):
        return []
    folder = Path(split_gguf(name)[0])
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(folder), allow_patterns=list(patterns), **options))
        except (OSError, ValueError) as error:
            logger.warning(f"The files of {name} cannot be read ({one_line(error)}).")
            return []
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return [file for file in files if not leads_outside(file, folder)]


def _saved_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    saved = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def _shapes_of(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors by their names in its file, which are not always those in memory."""
    converted = revert_weight_conversion(model, {name: tensor.to("meta") for name, tensor in tensors.items()})
    return {name: tuple(tensor.shape) for name, tensor in converted.items()}
