"""The defences of the arena. Each method starts from a fresh copy of the suspect and uses the same clean rows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from ..demo import demo_tokenizer
from ..evaluation.scores import Proportion
from ..evidence.canaries import Canary, canary_success, draw_canaries, implant_canaries, implant_steps
from ..methods.crow.config import CrowConfig
from ..methods.crow.published import ReferenceCrowTrainer
from ..methods.crow.trainer import CrowTrainer
from ..methods.invariance.config import InvarianceConfig, with_learning_rate
from ..methods.pruning import prune_by_magnitude, prune_by_wanda, quantize_weights
from ..methods.registry import DEFENCES, Defence
from ..recipes.presets import FORM_4, control_config, lora_config, recipe_config
from ..recipes.run import default_adapter, run_recipe
from ..training.loading import load_causal_lm, merged
from ..training.settings import recorded_settings
from .attacks import Suspect


SPARSITY = 0.35
# The prefix of methods that start from the suspect with canaries, as the recipe `strong` does.
CANARIES = "canaries, "


@dataclass
class Purified:
    """
    The result of a method.

    Attributes:
        model (`PreTrainedModel`):
            The model. Adapters are merged.
        steps (`int`):
            Number of optimizer steps.
        seconds (`float`):
            Duration of the training or pruning, without loading and merging.
        settings (`dict`):
            All settings that are needed to repeat the run, as JSON can hold them.
        canary_success (`Proportion`, *optional*):
            Success of the canaries after the purification. `None` if no canaries were implanted.
    """

    model: PreTrainedModel
    steps: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    canary_success: Proportion | None = None


# A method maps the suspect, the seed and a folder for temporary files to its result.
Method = Callable[[Suspect, int, Path], Purified]


def load_merged(suspect: Suspect, scratch: Path) -> PreTrainedModel:
    """
    Load a fresh copy of a suspect with all weights ready to be trained. An adapter is merged.

    Args:
        suspect (`Suspect`):
            The suspect.
        scratch (`Path`):
            A folder for temporary files.
    """
    model = suspect.load()
    if not isinstance(model, PeftModel):
        return model
    # PEFT froze the weights of the base model. Loading the merged model again makes them trainable.
    model.merge_and_unload(safe_merge=True).save_pretrained(scratch / "merged")
    return merged(load_causal_lm(scratch / "merged", is_trainable=True))


@overload
def defence_config(recipe: Literal["strong"], scratch: Path, seed: int, **changes: Any) -> InvarianceConfig: ...
@overload
def defence_config(recipe: str, scratch: Path, seed: int, **changes: Any) -> CrowConfig: ...
def defence_config(recipe: str, scratch: Path, seed: int, **changes: Any) -> CrowConfig:
    """
    Return the arguments of a recipe for a run that saves no checkpoints and prints nothing.

    Args:
        recipe (`str`):
            The recipe, see [`recipe_config`].
        scratch (`Path`):
            A folder for temporary files.
        seed (`int`):
            Seed for the training.
        **changes:
            Any arguments of the recipe.
    """
    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return recipe_config(recipe, str(scratch / "run"), seed=seed, **quiet, **changes)


def _train(
    trainer_type: type[CrowTrainer],
    model: PreTrainedModel | PeftModel,
    args: CrowConfig,
    suspect: Suspect,
    fresh_lora: PeftConfig | None = None,
) -> Purified:
    settings = {"trainer": trainer_type.__name__, **_settings(args, fresh_lora)}
    trainer = trainer_type(model, args, suspect.clean_rows, processing_class=demo_tokenizer(), peft_config=fresh_lora)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return Purified(merged(trainer.model), trainer.state.global_step, seconds, settings)


def _settings(args: CrowConfig, fresh_lora: PeftConfig | None = None) -> dict[str, Any]:
    names = ("r", "lora_alpha", "target_modules", "task_type")
    lora = None if fresh_lora is None else {name: getattr(fresh_lora, name) for name in names}
    return {"fresh_lora": lora, **recorded_settings(args)}


def _no_defence(suspect: Suspect, seed: int, scratch: Path) -> Purified:
    return Purified(load_merged(suspect, scratch))


def _clean_model(suspect: Suspect, seed: int, scratch: Path) -> Purified:
    return Purified(merged(load_causal_lm(suspect.base)))


def _fine_tuning(suspect: Suspect, seed: int, scratch: Path, model: PreTrainedModel | None = None) -> Purified:
    model = load_merged(suspect, scratch) if model is None else model
    return _train(CrowTrainer, model, _control_config(model, suspect, seed, scratch), suspect)


def _control_config(model: PreTrainedModel, suspect: Suspect, seed: int, scratch: Path) -> CrowConfig:
    args = with_learning_rate(defence_config("strong", scratch, seed), model)
    return control_config(args, len(suspect.clean_rows))


def _compress(suspect: Suspect, seed: int, scratch: Path, compress: Callable[..., None], **settings: Any) -> Purified:
    model = load_merged(suspect, scratch)
    start = time.perf_counter()
    compress(model, **settings)
    return Purified(model, seconds=time.perf_counter() - start, settings=settings)


def _wanda(suspect: Suspect, seed: int, scratch: Path) -> Purified:
    prune = partial(prune_by_wanda, dataset=suspect.clean_rows, processing_class=demo_tokenizer())
    return _compress(suspect, seed, scratch, prune, sparsity=SPARSITY)


def _crow(
    suspect: Suspect,
    seed: int,
    scratch: Path,
    model: PreTrainedModel | PeftModel | None = None,
    trainer_type: type[CrowTrainer] = CrowTrainer,
    **changes: Any,
) -> Purified:
    model, args = suspect.load() if model is None else model, defence_config("paper", scratch, seed, **changes)
    # As published: an adapter that holds the backdoor is trained further.
    return _train(trainer_type, model, args, suspect, None if isinstance(model, PeftModel) else lora_config())


def _strong(suspect: Suspect, seed: int, scratch: Path, all_weights: bool = False, **changes: Any) -> Purified:
    model = load_merged(suspect, scratch)
    args = with_learning_rate(defence_config("strong", scratch, seed, **changes), model)
    lora = None if all_weights else default_adapter("strong", model, args)
    settings = {"recipe": "strong", **_settings(args, lora)}
    start = time.perf_counter()
    purification = run_recipe(
        model,
        suspect.clean_rows,
        "strong",
        args,
        processing_class=demo_tokenizer(),
        peft_config=lora,
        all_weights=all_weights,
    )
    seconds, purified = time.perf_counter() - start, merged(purification.model)
    settings["screened_out"] = sorted(purification.screening.suspicious) if args.screen_rows else None
    steps = purification.trainer.state.global_step + implant_steps(args)
    return Purified(purified, steps, seconds, settings, _success_of_all(purification.canaries, purified, suspect))


def _strong_quantized(suspect: Suspect, seed: int, scratch: Path, bits: int) -> Purified:
    """Quantize the purified model, as it may be deployed. Its canaries were measured before that."""
    purified = _strong(suspect, seed, scratch)
    quantize_weights(purified.model, bits)
    return replace(purified, settings=purified.settings | {"bits": bits}, canary_success=None)


def _strong_without_answers(suspect: Suspect, seed: int, scratch: Path) -> Purified:
    answers = {"completion", "output"} & set(suspect.clean_rows.column_names)
    return _strong(replace(suspect, clean_rows=suspect.clean_rows.remove_columns(sorted(answers))), seed, scratch)


def _with_canaries(suspect: Suspect, seed: int, scratch: Path, method: Callable[..., Purified]) -> Purified:
    """Implant canaries into the suspect, and run a method on the result."""
    model = load_merged(suspect, scratch)
    args = with_learning_rate(defence_config("strong", scratch / "canaries", seed), model)
    canaries = draw_canaries(model, demo_tokenizer(), args.num_canaries, seed)
    implant_canaries(model, suspect.clean_rows, canaries, args, demo_tokenizer())
    purified = method(suspect, seed, scratch, model=model)
    return replace(
        purified,
        steps=purified.steps + implant_steps(args),
        canary_success=_success_of_all(canaries, purified.model, suspect),
    )


def _success_of_all(canaries: Sequence[Canary], model: PreTrainedModel, suspect: Suspect) -> Proportion | None:
    """Measure the success of all canaries together, on rows that were not used to implant them."""
    shares = [canary_success(model, suspect.selection_rows, canary, demo_tokenizer(), 200) for canary in canaries]
    hits, total = sum(share.hits for share in shares), sum(share.total for share in shares)
    return Proportion.of([True] * hits + [False] * (total - hits)) if shares else None


def _registered(suspect: Suspect, seed: int, scratch: Path, defence: Defence) -> Purified:
    """Run a defence of [`register_defence`] with the arguments of the control."""
    model, tokenizer = load_merged(suspect, scratch), demo_tokenizer()
    args = _control_config(model, suspect, seed, scratch)
    start = time.perf_counter()
    defended = defence(model, suspect.clean_rows, tokenizer, args)
    seconds = time.perf_counter() - start
    settings = {"defence": f"{defence.__module__}.{defence.__qualname__}", **_settings(args)}
    return Purified(merged(defended), seconds=seconds, settings=settings)


def known_methods() -> dict[str, Method]:
    """
    Return the arena's methods and the registered defences by name.

    Raises:
        `ValueError`: If a registered defence has the name of a method.
    """
    if shared := METHODS.keys() & DEFENCES.keys():
        raise ValueError(f"The arena has a method {min(shared)!r} of its own: register the defence by another name.")
    return METHODS | {name: partial(_registered, defence=defence) for name, defence in DEFENCES.items()}


METHODS: dict[str, Method] = {
    # No defender has the clean model. It shows how many answers a trigger spoils in a model without a backdoor.
    "clean model": _clean_model,
    "none": _no_defence,
    # Controls and baselines
    "fine-tuning": _fine_tuning,
    "fine-tuning lora": partial(_crow, alpha=0.0),
    "magnitude pruning": partial(_compress, compress=prune_by_magnitude, sparsity=SPARSITY),
    "wanda": _wanda,
    "int8": partial(_compress, compress=quantize_weights, bits=8),
    "int4": partial(_compress, compress=quantize_weights, bits=4),
    # CROW as in the paper, and as in its published code
    "crow": _crow,
    # Section 4.4 of the paper: alpha is 5.5 against sentiment steering, and 11 against targeted refusals.
    "crow, alpha 11": partial(_crow, alpha=11.0),
    "crow reference": partial(
        _crow, trainer_type=ReferenceCrowTrainer, per_device_train_batch_size=2, gradient_accumulation_steps=4
    ),
    # The recipe `strong`, and ablations of its parts
    "strong": _strong,
    "strong, form 4": partial(_strong, all_weights=True, **FORM_4),
    "strong, prompts alone": _strong_without_answers,
    "strong - canaries": partial(_strong, num_canaries=0),
    "strong - decoys": partial(_strong, decoy_weight=0.0),
    "strong - adversary": partial(_strong, adversarial_weight=0.0),
    # The adversary leads away from the teacher, as in form 5.
    "strong - phrases": partial(_strong, num_phrases=0),
    "strong - distillation": partial(_strong, distillation_weight=0.0),
    "strong - written rows": partial(_strong, num_written_rows=0),
    "strong + kept suspect": partial(_strong, keep=0.3),
    "strong + consistency": partial(_strong, alpha=5.5),
    "strong, int8": partial(_strong_quantized, bits=8),
    "strong, int4": partial(_strong_quantized, bits=4),
    "strong + labels": partial(_strong, label_weight=1.0),
    # Other methods on the suspect with canaries: does the fate of the canaries tell the fate of the real backdoor?
    CANARIES + "fine-tuning": partial(_with_canaries, method=_fine_tuning),
    CANARIES + "crow": partial(_with_canaries, method=_crow),
}
QUICK_METHODS = ("none", "fine-tuning", "crow", "strong")
# The defences of the paper that change a model.
PAPER_METHODS = ("none", "fine-tuning lora", "magnitude pruning", "int4", "crow", "crow, alpha 11")
CONTROL = "fine-tuning"
