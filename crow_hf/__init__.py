"""Remove backdoors from Hugging Face language models, and measure whether it worked.

Importing the package registers its models with the Auto classes; every other public name is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import models


__version__ = "0.1.0"

if TYPE_CHECKING:
    from .backdoors import Poison, implant, implant_embedding_trigger, poison_dataset
    from .canaries import Canary
    from .checkup import Finding, doctor
    from .config import CrowConfig, InvarianceConfig
    from .data import CrowDataCollator, PackedPatchDataCollator, PatchDataCollator, prepare_dataset
    from .evaluation.harness import Evaluation, evaluate_model
    from .guide import CROWBackdoorElimination, apply_crow_to_coconut
    from .hub import push_folder
    from .invariance_trainer import InvarianceTrainer
    from .loading import load_causal_lm
    from .models.configuration_byte_entropy import ByteEntropyConfig
    from .models.configuration_coconut import CoconutConfig
    from .models.modeling_byte_entropy import ByteEntropyPredictor
    from .models.modeling_coconut import CoconutForCausalLM, CoconutModel
    from .models.tokenization_coconut import CoconutTokenizer
    from .objective import layer_consistency_loss, perturb_embeddings
    from .patching import (
        Calibration,
        EntropyPatcher,
        calibrate_threshold,
        entropy_patching,
        from_binary,
        load_entropy_predictor,
    )
    from .plots import plot_crow_training_progress
    from .recipes import Comparison, Purification, compare_defences, purify, recipe_config
    from .redpajama import get_redpajama_binary_dataset
    from .screening import Screening, screen_dataset
    from .thoughts import ThoughtStage, reachability_rows, train_by_stages
    from .trainer import CrowTrainer
    from .triggers import TARGETS, TRIGGERS, EmbeddingTrigger, StyleTrigger, Target, Trigger

_HOMES = {
    "backdoors": ["Poison", "implant", "implant_embedding_trigger", "poison_dataset"],
    "canaries": ["Canary"],
    "checkup": ["Finding", "doctor"],
    "config": ["CrowConfig", "InvarianceConfig"],
    "data": ["CrowDataCollator", "PackedPatchDataCollator", "PatchDataCollator", "prepare_dataset"],
    "evaluation.harness": ["Evaluation", "evaluate_model"],
    "guide": ["CROWBackdoorElimination", "apply_crow_to_coconut"],
    "hub": ["push_folder"],
    "invariance_trainer": ["InvarianceTrainer"],
    "loading": ["load_causal_lm"],
    "models.configuration_byte_entropy": ["ByteEntropyConfig"],
    "models.configuration_coconut": ["CoconutConfig"],
    "models.modeling_byte_entropy": ["ByteEntropyPredictor"],
    "models.modeling_coconut": ["CoconutForCausalLM", "CoconutModel"],
    "models.tokenization_coconut": ["CoconutTokenizer"],
    "objective": ["layer_consistency_loss", "perturb_embeddings"],
    "patching": [
        "Calibration",
        "EntropyPatcher",
        "calibrate_threshold",
        "entropy_patching",
        "from_binary",
        "load_entropy_predictor",
    ],
    "plots": ["plot_crow_training_progress"],
    "recipes": ["Comparison", "Purification", "compare_defences", "purify", "recipe_config"],
    "redpajama": ["get_redpajama_binary_dataset"],
    "screening": ["Screening", "screen_dataset"],
    "thoughts": ["ThoughtStage", "reachability_rows", "train_by_stages"],
    "trainer": ["CrowTrainer"],
    "triggers": ["TARGETS", "TRIGGERS", "EmbeddingTrigger", "StyleTrigger", "Target", "Trigger"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
