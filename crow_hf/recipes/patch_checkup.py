"""The checks of `doctor()` on byte-latent models: are their parts complete, and are their patches sensible?"""

import re
from collections.abc import Iterator
from dataclasses import asdict
from operator import attrgetter
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..models.boundaries import ENOUGH_BYTES, USUAL_PATCH_SIZES
from ..models.modeling_byte_entropy import NATS_PER_BIT, ByteEntropyPredictor
from ..models.modeling_coconut import CoconutForCausalLM
from ..patching.calibration import calibrate_threshold
from ..patching.patcher import UNTRAINED_BITS, EntropyPatcher
from ..training.recorder import base_model_of, embedding_table, frozen_modules
from .findings import Finding


# More patches of a single byte than this share of all patches are a warning.
MAX_ONE_BYTE_PATCHES = 0.5
# English text, for models without rows to check them on.
PROSE = (
    "The ferry was late again. On the pier a woman in a grey coat counted the gulls aloud, and when she came to "
    "thirty she began anew, as if the number had been wrong. Nobody minded; most of those who waited had seen her "
    "there every Friday since the spring. At last the bell rang from the other shore, the rope was thrown, and the "
    "first cars rolled slowly down the ramp.\n"
    "Inside it smelled of coffee and wet wool. A boy read the timetable to his sister, one hour after the other, and "
    "she corrected him whenever he left out a word. It takes forty minutes to cross, unless there is fog.\n"
)
# Number of bytes to measure the entropy predictor on.
_MAX_BYTES = 50_000
_COMPONENTS = (
    "latent_transformer",
    "latent_transformer.entropy_predictor",
    "latent_transformer.backbone",
    "binary_patch_module",
    "local_encoder",
    "local_decoder",
)


def missing_components(model: PreTrainedModel | PeftModel) -> list[str]:
    """
    List the components of a byte-latent model that a model does not have.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Any model.

    Returns:
        `list[str]`: The missing components by their attribute names, such as `"latent_transformer.entropy_predictor"`.
    """
    return [name for name in _COMPONENTS if _component(model, name) is None]


def _component(model: nn.Module, name: str) -> Any:
    try:
        return attrgetter(name)(model)
    except AttributeError:
        return None


def check_components(model: CoconutForCausalLM) -> Finding:
    """Check that no component of a byte-latent model is missing."""
    if missing := missing_components(model):
        remedy = "Build the model with `CoconutForCausalLM.from_backbone`, which creates all components."
        return Finding("components", "problem", f"The model has no `{missing[0]}`.", remedy)
    return Finding("components", "ok", "The model has all components of a byte-latent model.")


def check_frozen_predictor(model: PreTrainedModel | PeftModel) -> Iterator[Finding]:
    """Check that training leaves the entropy predictor unchanged, if the model has one."""
    pattern = frozen_modules(model)
    if pattern is None:
        return
    predictor = [module for name, module in base_model_of(model).named_modules() if re.fullmatch(pattern, name)]
    if tuned := sum(isinstance(module, BaseTunerLayer) for module in predictor):
        yield Finding(
            "LoRA",
            "problem",
            f"The adapter changes {tuned} layers of the entropy predictor, so training changes the patches.",
            f"Create the adapter again with `exclude_modules={pattern!r}`, or pass `peft_config` to `CrowTrainer`, "
            "which excludes them.",
        )
        return
    if isinstance(model, PeftModel):
        yield Finding("LoRA", "ok", "The adapter does not change the entropy predictor.")
    else:
        linear = sum(isinstance(module, nn.Linear) for module in predictor)
        yield Finding(
            "LoRA",
            "ok",
            f"`CrowTrainer` excludes the {linear} linear layers of the entropy predictor from a LoRA on 'all-linear'.",
            f"With PEFT alone, pass `exclude_modules={pattern!r}`. Otherwise the LoRA includes them.",
        )
    if any(weight.requires_grad for module in predictor for weight in module.parameters()):
        yield Finding(
            "frozen parts",
            "warning",
            "The entropy predictor is not frozen. It receives no gradient, so training in several processes fails.",
            "Call `requires_grad_(False)` on it, in a Coconut on `model.latent_transformer.entropy_predictor`.",
        )


def check_patches(model: CoconutForCausalLM, documents: list[bytes]) -> Iterator[Finding]:
    """
    Check that the entropy predictor fits and is trained, and that the thresholds give patches of a usual size.

    Args:
        model (`CoconutForCausalLM`):
            The model.
        documents (`list[bytes]`):
            The bytes of the rows. An English text replaces them if they are too few to judge the thresholds.

    Yields:
        [`Finding`]
    """
    rule, predictor = model.binary_patch_module.rule, model.latent_transformer.entropy_predictor
    if rule.needs_entropies:
        finding = _check_predictor(predictor, documents)
        yield finding
        if finding.level == "problem":
            return
    enough = sum(map(len, documents)) >= ENOUGH_BYTES
    yield _check_thresholds(model, documents if enough else [PROSE.encode()])


def _check_predictor(predictor: ByteEntropyPredictor, documents: list[bytes]) -> Finding:
    remedy = "Use `load_entropy_predictor()`, or train a predictor on your bytes. Then train the model on its patches."
    vocabulary = embedding_table(predictor).shape[0]
    if not isinstance(predictor, ByteEntropyPredictor) or vocabulary != 256:
        found = f"{type(predictor).__name__} has a vocabulary of {vocabulary} instead of the 256 bytes."
        return Finding("entropy predictor", "problem", found, remedy)
    bits = {"English": _bits_per_byte(predictor, [PROSE.encode()])}
    if any(len(document) > 1 for document in documents):
        bits["the rows"] = _bits_per_byte(predictor, documents)
    measured = ", ".join(f"{value:.2f} on {name}" for name, value in bits.items())
    found = f"Bits per byte: {measured}. Guessing needs 8."
    if min(bits.values()) > UNTRAINED_BITS:
        return Finding("entropy predictor", "problem", f"The predictor looks untrained. {found}", remedy)
    if bits.get("the rows", 0) > UNTRAINED_BITS:
        remedy = (
            "Train a predictor on bytes like these (`examples/train_entropy_predictor.py`). Then train the model on "
            "its patches."
        )
        found = f"The predictor has not learned bytes like those of these rows. {found}"
        return Finding("entropy predictor", "warning", found, remedy)
    return Finding("entropy predictor", "ok", found)


def _check_thresholds(model: CoconutForCausalLM, documents: list[bytes]) -> Finding:
    rule, predictor = model.binary_patch_module.rule, model.latent_transformer.entropy_predictor
    settings = asdict(rule)
    patcher = EntropyPatcher(predictor, **settings, add_special_tokens=False)
    lengths = torch.tensor([length for patched in patcher.patch(documents) for length in patched.patch_lengths])
    mean, longest = lengths.float().mean().item(), lengths.max().item()
    one_byte = (lengths == 1).float().mean().item()
    found = f"Patches have {mean:.1f} bytes on average. {one_byte:.0%} have one byte, and the longest has {longest}."
    if not USUAL_PATCH_SIZES[0] <= mean <= USUAL_PATCH_SIZES[1] or one_byte > MAX_ONE_BYTE_PATCHES:
        if not rule.needs_entropies:
            return Finding("thresholds", "warning", found, "Change `config.max_patch_length` or the patch rule.")
        better = calibrate_threshold(documents, predictor, **settings)
        remedy = (
            f"Set `model.binary_patch_module.threshold = {better.threshold:.4g}` and `.relative_threshold = "
            f"{better.relative_threshold:.4g}`, which give {better.patch_size:.1f} bytes here. Then train the model "
            "on these patches."
        )
        return Finding("thresholds", "warning", found, remedy)
    window = model.local_encoder.config.sliding_window
    if window is not None and longest > window:
        remedy = f"Set `config.max_patch_length` to {window} or less, because the encoder attends to {window} bytes."
        return Finding("thresholds", "warning", found, remedy)
    return Finding("thresholds", "ok", found)


@torch.no_grad()
def _bits_per_byte(predictor: ByteEntropyPredictor, documents: list[bytes]) -> float:
    """Return the cross-entropy of the bytes, given the bytes before them in the same context of the predictor."""
    context, nats, count, left = predictor.config.max_position_embeddings, 0.0, 0, _MAX_BYTES
    for document in documents:
        data = torch.tensor(list(document[:left]), device=predictor.device)
        left -= len(data)
        for part in data.split(context) if len(data) else ():
            if len(part) > 1:
                nats += predictor(part[None], labels=part[None], use_cache=False).loss.item() * (len(part) - 1)
                count += len(part) - 1
    return nats / NATS_PER_BIT / count
