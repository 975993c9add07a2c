"""Remove backdoors from Hugging Face language models, and measure whether it worked.

Every public name is imported on first use, so `import crow_hf` itself imports nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_HOMES = {
    "objective": ["layer_consistency_loss", "perturb_embeddings"],
    "config": ["CrowConfig"],
    "trainer": ["CrowTrainer"],
    "data": ["CrowDataCollator", "prepare_dataset"],
    "loading": ["load_causal_lm"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
