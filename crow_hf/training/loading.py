"""Load a suspect model safely: from safetensors only, without remote code, with adapters on top of their base."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from .sharding import loading_unsharded


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# transformers' error for a model with remote code contains these words, and advises to run the code. Our error must
# not contain them. Otherwise the error for the base model of an adapter would name the adapter.
NEEDS_CODE = "custom code"
CODE_IS_NOT_RUN = (
    "{} needs code of its own, which is never run. Read the code. If you trust it, load the model yourself with "
    "`trust_remote_code=True` on a machine you can afford to lose."
)


@loading_unsharded()
def load_causal_lm(path: str | Path, is_trainable: bool = False, **kwargs: Any) -> PreTrainedModel | PeftModel:
    """
    Load a causal LM, or an adapter on top of the base model that it names, from safetensors only.

    The model is under suspicion, and reading a pickle can run code. Pickled weights and remote code are refused.

    Args:
        path (`str` or `Path`):
            A folder or a Hub repository with a model or a PEFT adapter.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether to load the model for training. An adapter then has gradients, and the weights are in float32
            unless `dtype` is given.
        **kwargs:
            Keyword arguments of the model's `from_pretrained`, such as `dtype`. `revision` is the revision of `path`.
            If `path` is an adapter, the adapter itself names the revision of its base model.

    Returns:
        `PreTrainedModel` or `PeftModel`: The model.

    Raises:
        `ValueError`: If the path holds no model, only pickled weights, damaged or missing weights, or a model that
            needs custom code, and for `kwargs` that the model does not accept.

    Example:

    ```python
    >>> from crow_hf import load_causal_lm

    >>> model = load_causal_lm("suspect", dtype="bfloat16")
    ```
    """
    if Path(path).is_dir():
        _check_folder(Path(path))
    elif "gguf_file" not in kwargs:
        _check_exists(path, **_hub_options(kwargs))
    # Training is in float32 because half precision rounds most updates of a purification to zero.
    kwargs = {"trust_remote_code": False, **({"dtype": "float32"} if is_trainable else {}), **kwargs}
    revision = kwargs.get("revision")
    try:
        is_adapter = find_adapter_config_file(str(path), revision=revision) is not None
        if not Path(path).is_dir():
            _check_repository(str(path), is_adapter, kwargs)
        if not is_adapter:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, **kwargs
            )
            model, found = loaded
            if missing := sorted(found["missing_keys"]):
                raise ValueError(
                    f"The weights of {path} lack {len(missing)} tensors that its config requires, such as "
                    f"{missing[0]}. Download or save the model again."
                )
            return model
        adapter = PeftConfig.from_pretrained(str(path), revision=revision)
        base = load_causal_lm(
            adapter.base_model_name_or_path, is_trainable, **{**kwargs, "revision": adapter.revision}
        )
        adapted: Any = PeftModel.from_pretrained(
            base, path, is_trainable=is_trainable, revision=revision, use_safetensors=True
        )
        # PEFT leaves the name of the base model here.
        adapted.name_or_path = str(path)
        return adapted
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {path} cannot be read ({error}). Download or save the model again."
        ) from error
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be loaded ({_in_one_line(error)}). Check `model_init_kwargs`, and that the config belongs "
            "to the weights."
        ) from error
    except ValueError as error:
        if NEEDS_CODE not in str(error):
            raise
        raise ValueError(CODE_IS_NOT_RUN.format(path)) from None


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Merge the adapter of a model, if it has one, into its weights. They must not be quantized."""
    return model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model


def is_quantized(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model was loaded with quantized weights, such as the 4-bit weights of QLoRA."""
    return getattr(model.config, "quantization_config", None) is not None


def move(model: PreTrainedModel | PeftModel, device: torch.device) -> PreTrainedModel | PeftModel:
    """Move a model to a device and return it."""
    # The decorator of `PreTrainedModel.to` hides from type checkers that it is a method.
    movable: Any = model
    return movable.to(device)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """
    Load a model's tokenizer. For an adapter that was saved without one, load the tokenizer of its base model.

    Args:
        path (`str` or `Path`):
            A folder or a Hub repository with a tokenizer, or with an adapter.

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer.

    Raises:
        `ValueError`: If there is no tokenizer that can be read, or it needs custom code.
    """
    if not str(path):
        raise ValueError(
            "The model was not loaded from a folder or the Hub, so its tokenizer is unknown. Pass `processing_class`."
        )
    _check_exists(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if NEEDS_CODE in str(error):
            raise ValueError(CODE_IS_NOT_RUN.format(f"The tokenizer of {path}")) from None
        if find_adapter_config_file(str(path)) is not None:
            return load_tokenizer(PeftConfig.from_pretrained(str(path)).base_model_name_or_path)
        raise ValueError(
            f"There is no readable tokenizer in {path} ({_in_one_line(error)}). Save one next to the model or, in "
            "Python, pass `processing_class`."
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where the files are."""
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    return {name: kwargs[name] for name in names if name in kwargs}


def _check_exists(path: str | Path, **options: Any) -> None:
    """Check that the path is a folder or a readable repository, with a single request to the Hub if it has a model."""
    if Path(path).is_dir():
        return
    file_names = (CONFIG_NAME, ADAPTER_CONFIG_NAME, TOKENIZER_CONFIG_FILE)
    try:
        if any(
            cached_file(str(path), file_name, _raise_exceptions_for_missing_entries=False, **options)
            for file_name in file_names
        ):
            return
        raise FileNotFoundError(f"none of {', '.join(file_names)}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is neither a local folder nor a model that can be read from the Hub. Check the spelling, the "
            "connection and, for a private model, the token."
        ) from error


def _check_folder(folder: Path) -> None:
    """Check that a folder holds a model or an adapter with weights in safetensors."""
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise ValueError(
            f"There is no model in the folder {folder}: it has neither a config.json nor an adapter_config.json."
        )
    # If adapter_model.safetensors is missing, PEFT reads a pickle, no matter what other safetensors there are.
    if any(folder.glob("adapter_model.safetensors" if is_adapter else "*.safetensors")):
        return
    if any(file.suffix in PICKLES and file.name != TRAINING_ARGS_NAME for file in folder.iterdir()):
        raise ValueError(
            f"The folder {folder} has only pickled weights, and reading a pickle can run code. Convert them to "
            "safetensors on a machine you can afford to lose."
        )
    raise ValueError(f"There are no weights in the folder {folder}: it has no .safetensors file.")


def _check_repository(name: str, is_adapter: bool, kwargs: dict[str, Any]) -> None:
    """
    Check that a Hub repository has safetensors.

    Otherwise PEFT would read a pickle, and transformers would ask a service on the Hub to convert it.
    """
    if not is_adapter and kwargs.keys() & {"variant", "gguf_file"}:
        # These have other file names, and no service converts them.
        return
    files = ["adapter_model.safetensors"] if is_adapter else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    options = _hub_options(kwargs)
    if not any(cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options) for file in files):
        raise ValueError(
            f"{name} has no {files[0]}. Other weights are pickles, and reading a pickle can run code. Convert them to "
            "safetensors on a machine you can afford to lose."
        )
