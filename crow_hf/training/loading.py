"""Loading a suspect: safetensors only, no remote code, adapters on top of their base."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from .sharding import loaded_whole


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What transformers says of such a model, and what is said here instead of its advice to run the code.
NEEDS_CODE = "custom code"
CODE_IS_NOT_RUN = (
    "{} needs code that comes with it, which is not run: read it, and if you trust it, load the model yourself with "
    "`trust_remote_code=True` on a machine you can lose."
)


@loaded_whole()
def load_causal_lm(path: str | Path, is_trainable: bool = False, **kwargs: Any) -> PreTrainedModel | PeftModel:
    """
    Load a causal LM, or an adapter and the base model it names, from safetensors only.

    A pickle runs code when it is read, and the model is under suspicion.

    Args:
        path (`str` or `Path`):
            A folder or a repository on the Hub, with a model or a PEFT adapter.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether the model is loaded to be trained: an adapter with gradients, the weights in float32 unless `dtype`
            says otherwise.
        **kwargs:
            For `from_pretrained` of the model, `dtype` for instance. A `revision` is that of `path`, so of the adapter
            if it is one, which names the revision of its base itself.

    Returns:
        `PreTrainedModel` or `PeftModel`

    Raises:
        `ValueError`: If the path has no model, pickled weights only, damaged or missing weights, or a model that needs code of
            its own, and for `kwargs` that the model does not take.
    """
    if Path(path).is_dir():
        _check_folder(Path(path))
    elif "gguf_file" not in kwargs:
        _check_exists(path, **_hub_options(kwargs))
    # Remote code of a suspect is not even asked for. In half precision most updates of a purification are rounded away.
    kwargs = {"trust_remote_code": False, **({"dtype": "float32"} if is_trainable else {}), **kwargs}
    revision = kwargs.get("revision")
    try:
        is_adapter = find_adapter_config_file(str(path), revision=revision) is not None
        if not Path(path).is_dir():
            _check_repository(str(path), is_adapter, kwargs)
        if not is_adapter:
            model, found = AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, **kwargs
            )
            if missing := sorted(found["missing_keys"]):
                raise ValueError(
                    f"The weights of {path} lack {len(missing)} that its config asks for, such as {missing[0]}: download or save "
                    "them again."
                )
            return model
        adapter = PeftConfig.from_pretrained(path, revision=revision)
        base = load_causal_lm(
            adapter.base_model_name_or_path, is_trainable, **{**kwargs, "revision": adapter.revision}
        )
        model = PeftModel.from_pretrained(
            base, path, is_trainable=is_trainable, revision=revision, use_safetensors=True
        )
        # Of its own, it has the name of its base.
        model.name_or_path = str(path)
        return model
    except SafetensorError as error:
        raise ValueError(f"The weights of {path} cannot be read ({error}): download or save them again.") from error
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be loaded ({_in_one_line(error)}): check `model_init_kwargs`, and that config and weights belong together."
        ) from error
    except ValueError as error:
        if NEEDS_CODE not in str(error):
            raise
        raise ValueError(CODE_IS_NOT_RUN.format(path)) from None


def is_quantized(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model was loaded with weights of few bits, as for QLoRA."""
    return getattr(model.config, "quantization_config", None) is not None


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """
    Load a model's tokenizer, or that of its base if the path is an adapter saved without one.

    Raises:
        `ValueError`: If there is none.
    """
    if not str(path):
        raise ValueError(
            "The model was not loaded from a folder or the Hub, so its tokenizer is unknown: pass `processing_class`."
        )
    _check_exists(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if NEEDS_CODE in str(error):
            raise ValueError(CODE_IS_NOT_RUN.format(f"The tokenizer of {path}")) from None
        if find_adapter_config_file(str(path)) is not None:
            return load_tokenizer(PeftConfig.from_pretrained(path).base_model_name_or_path)
        raise ValueError(
            f"There is no tokenizer in {path} that can be read ({_in_one_line(error)}): save it beside the model (in "
            "Python, `processing_class` takes another)."
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where its files are."""
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    return {name: kwargs[name] for name in names if name in kwargs}


def _check_exists(path: str | Path, **options: Any) -> None:
    """Refuse what is neither a folder nor a repository that can be read: one question to the Hub where there is a model."""
    if Path(path).is_dir():
        return
    signs = (CONFIG_NAME, ADAPTER_CONFIG_NAME, TOKENIZER_CONFIG_FILE)
    try:
        if any(cached_file(str(path), sign, _raise_exceptions_for_missing_entries=False, **options) for sign in signs):
            return
        raise FileNotFoundError(f"none of {', '.join(signs)}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no folder {path} here, and no model of that name could be read on the Hub: check the spelling, the "
            "connection, and the token if it is a private one."
        ) from error


def _check_folder(folder: Path) -> None:
    """Refuse a folder whose weights would be read from pickles, or that has none."""
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: it has neither a config.json nor an adapter_config.json.")
    # PEFT reads a pickle if the one name it looks for is missing, whatever else is there.
    if any(folder.glob("adapter_model.safetensors" if is_adapter else "*.safetensors")):
        return
    if any(file.suffix in PICKLES and file.name != TRAINING_ARGS_NAME for file in folder.iterdir()):
        raise ValueError(
            f"{folder} holds pickled weights only, which run code when they are read: convert them to safetensors on a "
            "machine you can lose."
        )
    raise ValueError(f"{folder} holds no weights: there is no .safetensors file in it.")


def _check_repository(name: str, is_adapter: bool, kwargs: dict[str, Any]) -> None:
    """
    Refuse a repository on the Hub without safetensors: PEFT would read a pickle, and transformers would ask a service on the
    Hub to convert it.
    """
    if not is_adapter and kwargs.keys() & {"variant", "gguf_file"}:
        # Other file names, which nothing converts.
        return
    files = ["adapter_model.safetensors"] if is_adapter else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    options = _hub_options(kwargs)
    if not any(cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options) for file in files):
        raise ValueError(
            f"{name} has no {files[0]}, and weights of another kind are pickles, which run code when they are read: convert "
            "them to safetensors on a machine you can lose."
        )
