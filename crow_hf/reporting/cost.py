"""What a purification took: memory, and the disk before and after it."""

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from ..training.gguf import split_gguf


# Files of weights, by the end of their names.
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def peak_memory(device: torch.device) -> int | None:
    """
    Return the largest number of bytes in use so far: on a GPU those of PyTorch, and otherwise those of the process.

    Args:
        device (`torch.device`):
            The device of the training.

    Returns:
        `int`: `None` on Windows without a GPU, which does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    # Linux counts in KiB, and macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size_of_weights(name: str, **options: Any) -> int | None:
    """
    Return the bytes of the files of weights of a model.

    Args:
        name (`str`):
            A folder, or a name on the Hub, whose files are looked up in the cache.
        **options:
            The `revision` and the `cache_dir` that the model was loaded with.

    Returns:
        `int`: `None` if there is no such folder, or no weights in it.
    """
    folder = folder_of_model(name, **options)
    if folder is None:
        return None
    files = [folder / gguf] if (gguf := split_gguf(name)[1]) else folder.iterdir()
    return sum(file.stat().st_size for file in files if file.suffix in _WEIGHTS) or None


def folder_of_model(name: str, **options: Any) -> Path | None:
    """
    Return the folder on this machine that holds the files of a model. Arguments are those of [`size_of_weights`].

    Returns:
        `Path`: `None` if there is no such folder, nor files of such a model in the cache.
    """
    if not name:
        return None
    name, gguf = split_gguf(name)
    if Path(name).is_dir():
        return Path(name)
    for config in ("config.json", "adapter_config.json") if gguf is None else (gguf,):
        if isinstance(cached := _in_cache(name, config, options), str):
            return Path(cached).parent
    return None


def _in_cache(name: str, file: str, options: dict[str, Any]) -> object:
    try:
        return try_to_load_from_cache(name, file, **options)
    except ValueError:
        # Not a name on the Hub.
        return None


def in_bytes(count: float) -> str:
    """Format a number of bytes: `1500000` becomes `1.5 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} bytes" if unit == "bytes" else f"{count:,.1f} {unit}"
