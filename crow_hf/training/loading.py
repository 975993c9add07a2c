"""Load a suspect model safely: from safetensors only, without remote code, with adapters on top of their base."""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from peft import PeftConfig, PeftModel, PeftType
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, find_adapter_config_file

from ..files import FURTHER_TEMPLATES, leads_outside
from .foreign import check_named_files, named_implementations, set_aside
from .gguf import gguf_header, split_gguf
from .recorder import base_model_of, embedding_table, evaluating, plain_outputs
from .saves import one_line, saved_tensors
from .sharding import loading_unsharded
from .sizes import (
    check_added_tokens,
    check_growth,
    check_layers,
    check_memory,
    check_rank,
    check_size,
    check_texts,
)


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
    Load a causal LM, or an adapter on top of the base model that it names, from safetensors or GGUF only.

    The model is under suspicion, and reading a pickle can run code. Pickled weights and remote code are refused.

    Args:
        path (`str` or `Path`):
            A folder or a Hub repository with a model or a PEFT adapter, or a GGUF file in one of them, such as
            `owner/name/model.gguf`. Weights of GGUF are dequantised.
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
    if "gguf_file" in kwargs:
        raise ValueError(f"Pass the GGUF file itself as the model, without `gguf_file`: {path}/{kwargs['gguf_file']}.")
    folder, gguf = split_gguf(path)
    if gguf is not None:
        return _load_gguf(str(path), folder, gguf, kwargs)
    if Path(path).is_dir():
        _check_folder(Path(path))
    else:
        kwargs = _without_retries(kwargs)
        _check_exists(path, **_hub_options(kwargs))
    # Training is in float32 because half precision rounds most updates of a purification to zero.
    kwargs = {"trust_remote_code": False, **({"dtype": "float32"} if is_trainable else {}), **kwargs}
    with _in_one_sentence(path):
        is_adapter = find_adapter_config_file(str(path), **_hub_options(kwargs)) is not None
    if not Path(path).is_dir():
        _check_repository(str(path), is_adapter, kwargs)
    if is_adapter:
        return _load_adapter(str(path), is_trainable, kwargs)
    check_named_files(str(path), kwargs.get("variant"), **_hub_options(kwargs))
    check_layers(path, **_hub_options(kwargs))
    if not (kwargs["trust_remote_code"] or "variant" in kwargs):
        with _in_one_sentence(path):
            plain: Any = AutoConfig.from_pretrained(path, trust_remote_code=False, **_hub_options(kwargs))
            # It is only measured, and can name implementations.
            plain._attn_implementation = plain._experts_implementation = None
        _check_memory(path, check_size(path, plain, **_hub_options(kwargs)), plain, kwargs)
    with _in_one_sentence(path):
        if named := named_implementations(str(path), **_hub_options(kwargs)):
            trusted, options = kwargs["trust_remote_code"], _hub_options(kwargs)
            config: Any = AutoConfig.from_pretrained(path, trust_remote_code=trusted, **options)
            config._attn_implementation = config._experts_implementation = None
            kwargs = {"config": config, **kwargs}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **{**kwargs, "ignore_mismatched_sizes": True}
        )
    model = _complete(path, loaded)
    set_aside(model, named)
    return model


def _check_memory(path: str | Path, num_values: int, config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Refuse a model that does not fit into memory, unless it is quantized, offloaded or sharded while it loads."""
    quantized = kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
    shards = kwargs.get("device_map") not in (None, "auto") or int(os.environ.get("WORLD_SIZE", 1)) > 1
    if quantized or shards or "offload_folder" in kwargs:
        return
    dtype = kwargs.get("dtype", "auto")
    if dtype == "auto":
        dtype = config.get_text_config().dtype or torch.float32
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    # transformers refuses what is no type.
    if isinstance(dtype, torch.dtype):
        check_memory(path, num_values, dtype, uses_gpus=kwargs.get("device_map") == "auto")


def _load_gguf(path: str, folder: str, file: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    if Path(folder).is_dir():
        _check_links(Path(folder), file)
    else:
        kwargs = _without_retries(kwargs)
    options = _hub_options(kwargs)
    header = gguf_header(path, folder, file, **options)
    kwargs = {"dtype": "float32", **kwargs, "trust_remote_code": False, "gguf_file": file}
    with _in_one_sentence(path):
        config = AutoConfig.from_pretrained(folder, gguf_file=file, trust_remote_code=False, **options)
    _check_memory(path, check_size(path, config, [info.shape for info in header.tensors]), config, kwargs)
    with _in_one_sentence(path):
        kwargs = {"quantization_config": GgufConfig(dequantize=True), **kwargs, "ignore_mismatched_sizes": True}
        loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    model = _complete(path, loaded)
    model.config._name_or_path = model.name_or_path = path
    # transformers passes over tensors that it does not know.
    held = sum(prod(info.shape) for info in header.tensors)
    placed = sum(tensor.numel() for tensor in saved_tensors(model).values())
    if held != placed:
        raise ValueError(
            f"{path} holds {held:,} values, but transformers has a place for {placed:,} of them, so the model would "
            "not be the same: take it in safetensors."
        )
    return model


def _complete(path: str | Path, loaded: Any) -> Any:
    """Return a loaded model, if its files hold each tensor of its config in its shape, and no others."""
    model, found = loaded
    reshaped = [name for name, *_ in found["mismatched_keys"]]
    _check_complete(path, "have {} tensors of another shape than its config says", reshaped)
    _check_complete(path, "lack {} tensors that its config requires", found["missing_keys"])
    _check_complete(path, "have {} tensors for which its config has no place", found["unexpected_keys"])
    return model


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """
    Merge the adapter of a model, if it has one, into its weights. They must not be quantized.

    Tensors that the base model shares between two modules, such as tied embeddings, are separated if the adapter
    changes one of the modules.

    Raises:
        `ValueError`: If the adapter is of a kind that cannot be merged, or if the merged model does not compute the
            same.
    """
    if not isinstance(model, PeftModel):
        return model
    before = _some_logits(model)
    with _in_one_sentence(f"The adapter of {model.name_or_path}", "be merged"):
        _separate_shared_weights(model)
        whole: Any = model.merge_and_unload(safe_merge=True)
    after = _some_logits(whole)
    tolerance = 1e-3 if whole.dtype == torch.float32 else 5e-2
    if not (after - before).norm() <= tolerance * before.norm():
        raise ValueError(
            f"The adapter of {model.name_or_path} cannot be merged, because the merged model computes other logits "
            f"(up to {(after - before).abs().max():.2g} apart). Train the adapter itself, without a fresh one."
        )
    return whole


def _separate_shared_weights(model: PeftModel) -> None:
    """Separate the tensors that the base model uses in two places, if the adapter changes one of them."""
    base = base_model_of(model)
    places = defaultdict(list)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        places[parameter].append(name.rpartition("."))
    for shared, (first, *others) in places.items():
        # The names that PEFT gives to a layer inside its own.
        if any(owner.endswith((".base_layer", ".original_module")) for owner, _, _ in (first, *others)):
            for owner, _, name in others:
                own = nn.Parameter(shared.detach().clone(), shared.requires_grad)
                setattr(base.get_submodule(owner), name, own)


@torch.no_grad()
def _some_logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """The logits of a few tokens from the whole vocabulary, in float32."""
    size = len(embedding_table(model))
    ids = torch.arange(0, size, max(1, size // 16), device=model.device)[None, :16]
    with evaluating(model), plain_outputs(model):
        return model(input_ids=ids, use_cache=False).logits.float()


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
            A folder or a Hub repository with a tokenizer, or with an adapter, or a GGUF file in one of them. The
            tokenizer beside a GGUF file takes precedence over the one inside.

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer.

    Raises:
        `ValueError`: If there is no tokenizer that can be read, or it needs custom code.
    """
    if not str(path):
        raise ValueError(
            "The model was not loaded from a folder or the Hub, so its tokenizer is unknown. Pass `processing_class`."
        )
    folder, gguf = split_gguf(path)
    options = {} if Path(folder).is_dir() else _without_retries({})
    _check_exists(folder, gguf, **options)
    check_layers(folder, **options)
    check_added_tokens(folder, **options)
    beside = {} if gguf is None else _tokenizer_in(str(path), folder, gguf, options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options, **beside)
        check_growth(tokenizer)
        # Some settings are first read when a text is encoded.
        tokenizer.decode(tokenizer("a b")["input_ids"])
        return tokenizer
    except Exception as error:
        if NEEDS_CODE in str(error):
            raise ValueError(CODE_IS_NOT_RUN.format(f"The tokenizer of {path}")) from None
        if find_adapter_config_file(folder, **options) is not None:
            base = _adapter_config(folder, **options).base_model_name_or_path
            with _base_of(path):
                return load_tokenizer(base)
        raise ValueError(
            f"There is no readable tokenizer in {path} ({one_line(error)}). Mend config.json if it is named there, "
            "save a tokenizer next to the model or, in Python, pass `processing_class`."
        ) from error


def _tokenizer_in(path: str, folder: str, gguf: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the argument that reads a tokenizer from a GGUF file, if there is none beside it."""
    for name in (FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        if cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **options):
            return {}
    gguf_header(path, folder, gguf, **options)
    return {"gguf_file": gguf}


def _load_adapter(path: str, is_trainable: bool, kwargs: dict[str, Any]) -> PeftModel:
    adapter = _adapter_config(path, **_hub_options(kwargs))
    if adapter.is_prompt_learning:
        raise ValueError(
            f"{path} is an adapter of the kind {PeftType(adapter.peft_type).value}, which puts vectors before the "
            "prompt and changes no weights. Only adapters that change weights, such as LoRA, are supported."
        )
    with _base_of(path):
        base: Any = load_causal_lm(
            adapter.base_model_name_or_path, is_trainable, **{**kwargs, "revision": adapter.revision}
        )
    check_rank(path, adapter, **_hub_options(kwargs))
    with _in_one_sentence(path):
        _resize_embeddings(base, path, _hub_options(kwargs))
        adapted: Any = PeftModel.from_pretrained(
            base, path, is_trainable=is_trainable, revision=kwargs.get("revision"), use_safetensors=True
        )
    # PEFT leaves the name of the base model here.
    adapted.name_or_path = path
    return adapted


@contextmanager
def _base_of(path: str | Path) -> Iterator[None]:
    """Say whose base model it is that cannot be loaded, because the user did not name it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"The base model that adapter_config.json of the adapter {path} names cannot be used: {error}"
        ) from error


def _adapter_config(path: str, **options: Any) -> PeftConfig:
    with _in_one_sentence(path):
        adapter = PeftConfig.from_pretrained(path, **options)
    base = adapter.base_model_name_or_path
    if not base or not isinstance(base, str):
        raise ValueError(
            f"The adapter {path} names no base model. Write its folder or name into adapter_config.json, as "
            "`base_model_name_or_path`."
        )
    found = None
    # A base that cannot be read is told when it is loaded.
    with suppress(OSError, ValueError):
        found = find_adapter_config_file(base, **{**options, "revision": adapter.revision})
    if found is not None:
        # It could even name itself.
        raise ValueError(f"The adapter {path} names another adapter, {base}, as its base model. Merge that one first.")
    return adapter


def _resize_embeddings(base: PreTrainedModel, path: str, options: dict[str, Any]) -> None:
    """Give the base model as many tokens as it had when the adapter was trained."""
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    tables = [layer for layer in layers if isinstance(layer, (nn.Embedding, nn.Linear))]
    names = [name for name, module in base.named_modules() if any(module is table for table in tables)]
    with safe_open(cached_file(path, ADAPTER_SAFE_WEIGHTS_NAME, **options), "pt") as weights:
        shapes = {
            key: weights.get_slice(key).get_shape()
            for key in weights.keys()
            if any(f".{name}." in key for name in names)
        }
    sizes = [shape[1] for key, shape in shapes.items() if key.endswith("lora_embedding_A")]
    sizes += [shape[0] for key, shape in shapes.items() if re.search(r"(?<!lora_A)\.weight$", key)]
    if sizes and max(sizes) != len(embedding_table(base)):
        base.resize_token_embeddings(max(sizes), mean_resizing=False)


@contextmanager
def _in_one_sentence(what: str | Path, done: str = "be loaded") -> Iterator[None]:
    """Turn any error of a library into one sentence that says what it concerns."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {what} cannot be read ({one_line(error)}). Download or save the model again."
        ) from error
    # Libraries raise errors of every class for files that they do not understand.
    except Exception as error:
        if NEEDS_CODE in str(error):
            raise ValueError(CODE_IS_NOT_RUN.format(what)) from None
        if isinstance(error, ImportError):
            raise ValueError(f"{what} cannot {done}: {' '.join(str(error).split())}") from error
        raise ValueError(
            f"{what} cannot {done} ({one_line(error)}). Check `model_init_kwargs`, and that the config belongs to "
            "the weights."
        ) from error


def _check_complete(path: str | Path, trouble: str, names: Collection[str]) -> None:
    if names:
        raise ValueError(
            f"The weights of {path} {trouble.format(len(names))}, such as {', '.join(sorted(names)[:3])}. Download or "
            "save the model again."
        )


def _without_retries(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Look for files on this machine only if the Hub does not answer, because each request is repeated for a while."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:
        return {**kwargs, "local_files_only": True}
    return kwargs


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where the files are."""
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    return {name: kwargs[name] for name in names if name in kwargs}


def _check_exists(path: str | Path, gguf: str | None = None, **options: Any) -> None:
    """Check that the path is a folder or a readable repository, with a single request to the Hub if it has a model."""
    if Path(path).is_dir():
        _check_links(Path(path), gguf)
        return
    file_names = (CONFIG_NAME, ADAPTER_CONFIG_NAME, TOKENIZER_CONFIG_FILE) if gguf is None else (gguf,)
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


def _check_links(folder: Path, gguf: str | None = None) -> None:
    """
    Refuse links to files elsewhere. A private key, for example, would be saved with the purified model.

    A GGUF file often lies in a folder with much else, of which nothing deeper is read with it.
    """
    if gguf is None:
        files = list(folder.rglob("*"))
    else:
        files = [file for pattern in ("*", FURTHER_TEMPLATES) for file in folder.glob(pattern) if not file.is_dir()]
    check_texts(folder, files)
    for file in files:
        if leads_outside(file, folder):
            raise ValueError(
                f"{file.relative_to(folder)} in {folder} is a link to a place outside of the folder. If you trust "
                "what it leads to, put that file itself there."
            )


def _check_folder(folder: Path) -> None:
    """Check that a folder holds a model or an adapter with weights in safetensors, and no links to files elsewhere."""
    _check_links(folder)
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
    if not is_adapter and "variant" in kwargs:
        # It has another file name, and no service converts it.
        return
    files = ["adapter_model.safetensors"] if is_adapter else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    options = _hub_options(kwargs)
    if not any(cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options) for file in files):
        raise ValueError(
            f"{name} has no {files[0]}, and reading pickled weights can run code. Convert them to safetensors on a "
            f"machine you can afford to lose, or pass a GGUF file of the repository, such as {name}/model.gguf."
        )
