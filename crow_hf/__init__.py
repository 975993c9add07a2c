"""Remove backdoors from Hugging Face language models, and measure whether it worked.

Importing the package takes no time: every public name is imported on first use. The models are registered with the
Auto classes of transformers as soon as both packages are imported.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any


try:
    __version__ = version("crow-hf")
except PackageNotFoundError:
    # A source tree that is not installed.
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from .attacks.implanting import implant, implant_embedding_trigger
    from .attacks.judges import CommandJudge, ModelJudge, get_judge
    from .attacks.poison import Poison, poison_dataset
    from .attacks.targets import TARGETS, Target
    from .attacks.triggers import TRIGGERS, EmbeddingTrigger, StyleTrigger, Trigger
    from .data.collators import CrowDataCollator, PackedPatchDataCollator, PatchDataCollator
    from .data.encoding import prepare_dataset
    from .detection.completions import Completion, find_new_text
    from .detection.divergence import Divergence, find_divergent, try_divergent
    from .detection.guard import ConsistencyGuard, GuardedAnswer, Watch
    from .detection.phrases import Phrase, find_phrases
    from .detection.pieces import Piece
    from .detection.suspicions import Suspicion, try_pieces
    from .detection.triggers import find_triggers
    from .evaluation.endpoint import Endpoint
    from .evaluation.harness import Evaluation, evaluate_endpoint, evaluate_model
    from .evaluation.own_text import write_rows, write_text
    from .evaluation.retention import Retention, RetentionReference, measure_retention, retention_reference
    from .evaluation.tasks import TaskScore, evaluate_tasks, load_tasks
    from .evidence.canaries import Canary
    from .evidence.leaks import find_leaked_tokens
    from .evidence.result import Comparison, Purification
    from .evidence.screening import Screening, screen_dataset
    from .methods.crow.config import CrowConfig
    from .methods.crow.objective import layer_consistency_loss, perturb_embeddings
    from .methods.crow.trainer import CrowTrainer
    from .methods.invariance.config import InvarianceConfig
    from .methods.invariance.trainer import InvarianceTrainer
    from .methods.registry import register_defence
    from .methods.thoughts import ThoughtStage, reachability_rows, train_by_stages
    from .models.configuration_byte_entropy import ByteEntropyConfig
    from .models.configuration_coconut import CoconutConfig
    from .models.modeling_byte_entropy import ByteEntropyPredictor
    from .models.modeling_coconut import CoconutForCausalLM, CoconutModel
    from .models.tokenization_coconut import CoconutTokenizer
    from .patching.calibration import Calibration, calibrate_threshold
    from .patching.documents import from_binary
    from .patching.patcher import EntropyPatcher, entropy_patching, load_entropy_predictor
    from .patching.redpajama import get_redpajama_binary_dataset
    from .recipes.checkup import doctor
    from .recipes.comparison import compare_defences
    from .recipes.findings import Finding
    from .recipes.guide import CROWBackdoorElimination, apply_crow_to_coconut
    from .recipes.presets import recipe_config
    from .recipes.purification import purify
    from .recipes.run import run_recipe
    from .recipes.scanning import Scan, scan
    from .reporting.checksums import Changes, compare_checksums
    from .reporting.gate import Check, Policy, check_policy, decide
    from .reporting.model_card import build_model_card
    from .reporting.plots import plot_crow_training_progress
    from .reporting.report_file import read_report
    from .training.hub import push_folder
    from .training.loading import load_causal_lm
    from .training.merging import merge_adapter

_HOMES = {
    "attacks.implanting": ["implant", "implant_embedding_trigger"],
    "attacks.judges": ["CommandJudge", "ModelJudge", "get_judge"],
    "attacks.poison": ["Poison", "poison_dataset"],
    "attacks.targets": ["TARGETS", "Target"],
    "attacks.triggers": ["TRIGGERS", "EmbeddingTrigger", "StyleTrigger", "Trigger"],
    "data.collators": ["CrowDataCollator", "PackedPatchDataCollator", "PatchDataCollator"],
    "data.encoding": ["prepare_dataset"],
    "detection.completions": ["Completion", "find_new_text"],
    "detection.divergence": ["Divergence", "find_divergent", "try_divergent"],
    "detection.guard": ["ConsistencyGuard", "GuardedAnswer", "Watch"],
    "detection.phrases": ["Phrase", "find_phrases"],
    "detection.pieces": ["Piece"],
    "detection.suspicions": ["Suspicion", "try_pieces"],
    "detection.triggers": ["find_triggers"],
    "evaluation.endpoint": ["Endpoint"],
    "evaluation.harness": ["Evaluation", "evaluate_endpoint", "evaluate_model"],
    "evaluation.own_text": ["write_rows", "write_text"],
    "evaluation.retention": ["Retention", "RetentionReference", "measure_retention", "retention_reference"],
    "evaluation.tasks": ["TaskScore", "evaluate_tasks", "load_tasks"],
    "evidence.canaries": ["Canary"],
    "evidence.result": ["Comparison", "Purification"],
    "evidence.leaks": ["find_leaked_tokens"],
    "evidence.screening": ["Screening", "screen_dataset"],
    "methods.crow.config": ["CrowConfig"],
    "methods.crow.objective": ["layer_consistency_loss", "perturb_embeddings"],
    "methods.crow.trainer": ["CrowTrainer"],
    "methods.invariance.config": ["InvarianceConfig"],
    "methods.invariance.trainer": ["InvarianceTrainer"],
    "methods.registry": ["register_defence"],
    "methods.thoughts": ["ThoughtStage", "reachability_rows", "train_by_stages"],
    "models.configuration_byte_entropy": ["ByteEntropyConfig"],
    "models.configuration_coconut": ["CoconutConfig"],
    "models.modeling_byte_entropy": ["ByteEntropyPredictor"],
    "models.modeling_coconut": ["CoconutForCausalLM", "CoconutModel"],
    "models.tokenization_coconut": ["CoconutTokenizer"],
    "patching.calibration": ["Calibration", "calibrate_threshold"],
    "patching.documents": ["from_binary"],
    "patching.patcher": ["EntropyPatcher", "entropy_patching", "load_entropy_predictor"],
    "patching.redpajama": ["get_redpajama_binary_dataset"],
    "recipes.checkup": ["doctor"],
    "recipes.comparison": ["compare_defences"],
    "recipes.findings": ["Finding"],
    "recipes.guide": ["CROWBackdoorElimination", "apply_crow_to_coconut"],
    "recipes.presets": ["recipe_config"],
    "recipes.purification": ["purify"],
    "recipes.run": ["run_recipe"],
    "recipes.scanning": ["Scan", "scan"],
    "reporting.checksums": ["Changes", "compare_checksums"],
    "reporting.gate": ["Check", "Policy", "check_policy", "decide"],
    "reporting.model_card": ["build_model_card"],
    "reporting.plots": ["plot_crow_training_progress"],
    "reporting.report_file": ["read_report"],
    "training.hub": ["push_folder"],
    "training.loading": ["load_causal_lm"],
    "training.merging": ["merge_adapter"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _RegisterModels(MetaPathFinder):
    """Imports the models, which registers them, right after transformers, because that takes seconds."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import_module(".models", __name__)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    import_module(".models", __name__)
else:
    sys.meta_path.insert(0, _RegisterModels())
