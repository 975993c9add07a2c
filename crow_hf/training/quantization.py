"""The forms in which a saved model may be deployed, with weights of few bits."""

from typing import Any

from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available


# Arguments of BitsAndBytesConfig.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


def quantized(name: str | None) -> dict[str, Any]:
    """
    Return the keyword arguments of [`load_causal_lm`] that quantize a model while it is loaded.

    Args:
        name (`str`, *optional*):
            `"nf4"` or `"int8"`, as bitsandbytes rounds. Without it, nothing is quantized.

    Raises:
        `ValueError`: For other names, or if bitsandbytes is not installed.
    """
    if name is None:
        return {}
    if name not in QUANTIZATIONS:
        raise ValueError(f"`quantization` must be one of {', '.join(QUANTIZATIONS)}, got {name!r}.")
    if not is_bitsandbytes_available():
        raise ValueError(f"The quantization {name} takes bitsandbytes: `pip install crow-hf[qlora]`.")
    return {"quantization_config": BitsAndBytesConfig(**QUANTIZATIONS[name])}
