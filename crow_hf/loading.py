"""Loading a suspect model: safetensors only, no remote code, adapters on top of their base."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_causal_lm(path: str | Path, is_trainable: bool = False, **kwargs: Any) -> PreTrainedModel | PeftModel:
    """
    Load a causal LM, or an adapter and the base model it names, from safetensors only.

    A pickle runs code when it is read, and the model is under suspicion.

    Args:
        path (`str` or `Path`):
            A folder or a repository on the Hub, with a model or a PEFT adapter.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether an adapter is loaded to be trained on. Without effect on a model.
        **kwargs:
            For `from_pretrained` of the (base) model, `revision` or `dtype` for instance.

    Returns:
        `PreTrainedModel` or `PeftModel`

    Raises:
        `ValueError`: If the path is a folder without a model, or with pickled weights only.
    """
    folder = Path(path)
    if folder.is_dir():
        _check_folder(folder)
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **kwargs)
    base = load_causal_lm(PeftConfig.from_pretrained(path).base_model_name_or_path, **kwargs)
    return PeftModel.from_pretrained(base, path, is_trainable=is_trainable, use_safetensors=True)


def _check_folder(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} holds no model: it has neither a config.json nor an adapter_config.json.")
    files = [file for file in folder.iterdir() if file.is_file()]
    if any(file.suffix == ".safetensors" for file in files):
        return
    if any(file.suffix in PICKLES and not file.name.startswith("training_args") for file in files):
        raise ValueError(
            f"{folder} holds pickled weights only, which run code when they are read: convert them to safetensors on a "
            "machine you can lose."
        )
    raise ValueError(f"{folder} holds no weights: there is no .safetensors file in it.")
