"""What a suspect's files say about sizes, checked against the files themselves before anything is built."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from .saves import one_line, quietly


# No language model has more layers, and building more takes minutes.
MAX_LAYERS = 2_000
_COUNTS_LAYERS = re.compile(r"(?<!per_)layers?$")
# Each of these has at least one tensor.
_HAS_TENSORS = re.compile(r"num_(hidden_)?layers|n_layers?|(en|de)coder_layers")
# Models of speech add some 65,000 tokens. Each is looked for in every text, and adding more takes minutes.
_MAX_ADDED = 100_000
# Texts beside the weights. The largest tokenizers have some 40 MB.
_MAX_TEXT = 2**28
# A model may have so many values that its files do not hold, such as masks.
_FREE_VALUES = 2**24
# Characters that a normalizer may make of one.
_MAX_GROWTH = 100


def check_texts(folder: Path, files: Iterable[Path]) -> None:
    """
    Refuse a pipe, a device or a text without end among the files of a model's folder.

    Raises:
        `ValueError`: If there is one. The message names it.
    """
    for file in files:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ValueError(f"{file.relative_to(folder)} in {folder} is a pipe or a device: put a file there.")
        if file.suffix in (".json", ".jinja", ".txt", ".md") and file.is_file() and file.stat().st_size > _MAX_TEXT:
            raise ValueError(f"{file.relative_to(folder)} in {folder} has over {_MAX_TEXT // 2**20} MiB: remove it.")


def check_layers(path: str | Path, **options: Any) -> None:
    """
    Refuse a config with more layers than any model has, before a class of transformers reads it.

    Args:
        path (`str` or `Path`):
            The folder of the model, or its name on the Hub.
        **options:
            Where the config is: the `revision`, the `cache_dir` and the like.

    Raises:
        `ValueError`: If there are too many.
    """
    file = cached_file(str(path), CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **options)
    try:
        config = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        # Who loads it says so.
        return
    for name, count in _integers(config):
        if _COUNTS_LAYERS.search(name) and count > MAX_LAYERS:
            raise ValueError(
                f"The config of {path} asks for more layers than any model has (`{name}`): mend config.json."
            )


def check_added_tokens(path: str | Path, **options: Any) -> None:
    """
    Refuse a tokenizer with more added tokens than any has, before a library reads it. The arguments are as above.

    Raises:
        `ValueError`: If there are too many.
    """
    for name in (FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False, **options)
        if file is not None and Path(file).read_bytes().count(b'"content"') > _MAX_ADDED:
            raise ValueError(f"{name} of {path} adds over {_MAX_ADDED:,} tokens, more than any model: remove them.")


def check_size(
    path: str | Path, config: PreTrainedConfig, shapes: Sequence[Sequence[int]] | None = None, **options: Any
) -> int:
    """
    Refuse a config that asks for a model of many times the size of its files.

    Args:
        path (`str` or `Path`):
            The folder of the model, or its name on the Hub.
        config (`PreTrainedConfig`):
            The config.
        shapes (`Sequence[Sequence[int]]`, *optional*):
            The shapes of the tensors in its files. Defaults to those of its safetensors.
        **options:
            Where the files are: the `revision`, the `cache_dir` and the like.

    Returns:
        `int`: The number of values of the model. 0 if it cannot be built.

    Raises:
        `ValueError`: If the model needs many times more memory than its files hold.
    """
    shapes = list(_shapes(weights_of_model(str(path), **options))) if shapes is None else shapes
    held = sum(torch.Size(shape).numel() for shape in shapes)
    for name, count in _integers(config.to_dict()):
        if _HAS_TENSORS.fullmatch(name) and count > len(shapes):
            raise ValueError(
                f"The config of {path} asks for {count} layers (`{name}`), but its files have {len(shapes)} tensors: "
                "mend config.json."
            )
    try:
        with torch.device("meta"), quietly():
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:
        # Who loads it says so.
        return 0
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    # A value of packed weights stands for up to 16.
    if needed > _FREE_VALUES + held * (16 if getattr(config, "quantization_config", None) else 2):
        raise ValueError(
            f"The config of {path} asks for a model of {needed:,} values, but its files hold {held:,}: mend "
            "config.json."
        )
    return needed


def check_memory(path: str | Path, num_values: int, dtype: torch.dtype, uses_gpus: bool) -> None:
    """
    Refuse a model that does not fit into memory, before its weights are read. The system would end the process without
    a word.

    Args:
        path (`str` or `Path`):
            The folder of the model, or its name on the Hub.
        num_values (`int`):
            The number of values of the model.
        dtype (`torch.dtype`):
            The type that they will have.
        uses_gpus (`bool`):
            Whether the weights may go to the memory of all GPUs too.

    Raises:
        `ValueError`: If the weights alone need more memory than is free.
    """
    needed, free = num_values * dtype.itemsize, psutil.virtual_memory().available
    if uses_gpus:
        free += sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    if needed > free:
        raise ValueError(
            f"The weights of {path} take {needed / 1e9:,.1f} GB in {str(dtype).removeprefix('torch.')}, but only "
            f"{free / 1e9:,.1f} GB of memory are free: free some, load fewer bits, or use a larger machine."
        )


def check_rank(path: str, adapter: PeftConfig, **options: Any) -> None:
    """
    Refuse an adapter whose config asks for more ranks than its tensors have.

    Args:
        path (`str`):
            The folder of the adapter, or its name on the Hub.
        adapter (`PeftConfig`):
            Its config.
        **options:
            Where the files are: the `revision`, the `cache_dir` and the like.

    Raises:
        `ValueError`: If a rank is larger than any tensor.
    """
    file = cached_file(path, ADAPTER_SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **options)
    largest = max((side for shape in _shapes([] if file is None else [file]) for side in shape), default=0)
    for name in ("r", "rank_pattern"):
        for _, rank in _integers(getattr(adapter, name, None)):
            if rank > largest:
                raise ValueError(f"The adapter {path} asks for a rank of {rank} (`{name}`): mend adapter_config.json.")


def check_growth(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Refuse a tokenizer that makes a text many times as long before it reads it, or when it writes one.

    Raises:
        `ValueError`: If one character can become over 100.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        step = getattr(getattr(tokenizer, "backend_tokenizer", None), part, None)
        if step is not None and (growth := _growth(json.loads(step.__getstate__()))) > _MAX_GROWTH:
            raise ValueError(f"its {part} makes up to {growth:,} characters of one")


def _growth(step: Any) -> int:
    """Return how many characters the replacements of a part of a tokenizer, one after another, make of one."""
    growth = 1
    if isinstance(step, dict):
        added = [step[name] for name in ("content", "prepend", "replacement") if isinstance(step.get(name), str)]
        growth = max([1, *map(len, added)])
    for inner in step.values() if isinstance(step, dict) else step if isinstance(step, list) else ():
        growth *= _growth(inner)
    return growth


def _integers(held: Any) -> Iterator[tuple[str, int]]:
    """Yield the integers of settings, however deeply they are nested, with the names under which they stand."""
    left = [("", held)]
    while left:
        name, value = left.pop()
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value
        elif isinstance(value, dict):
            left += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [("", inner) for inner in value]


def weights_of_model(path: str, **options: Any) -> list[str]:
    """
    Return the files of a model's weights. Those of the Hub are downloaded.

    Args:
        path (`str`):
            The folder of the model, or its name on the Hub.
        **options:
            Where the files are: the `revision`, the `cache_dir` and the like.
    """
    if Path(path).is_dir():
        return [str(file) for file in Path(path, options.get("subfolder", "")).glob("*.safetensors")]
    found = [
        cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)
        for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    ]
    if found[0] is not None:
        return get_checkpoint_shard_files(path, found[0], **options)[0]
    return [file for file in found if file is not None]


def _shapes(files: Iterable[str]) -> Iterator[list[int]]:
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"The weights of {file} cannot be read ({one_line(error)}). Download or save the model again."
            ) from error
        yield from shapes
