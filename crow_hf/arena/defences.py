"""What the arena's defenders do to a suspect. Every method starts from a fresh copy of it and sees the same clean rows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..demo import demo_tokenizer
from ..evaluation.scores import Proportion
from ..evidence.canaries import Canary, canary_success, draw_canaries, implant_canaries, implant_steps
from ..methods.crow.config import CrowConfig
from ..methods.crow.published import ReferenceCrowTrainer
from ..methods.crow.trainer import CrowTrainer
from ..methods.invariance.config import InvarianceConfig
from ..methods.pruning import prune_by_magnitude, prune_by_wanda, quantize_weights
from ..recipes.presets import PAPER, control_config
from ..recipes.purification import purify
from ..training.loading import load_causal_lm
from .attacks import Suspect


SPARSITY = 0.35
# Before the name of a method: it starts from the suspect with canaries, as the strong recipe does.
CANARIES = "canaries, "
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# The arena saves results, not checkpoints, and prints a line for each run, not for each step.
_QUIET = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}


@dataclass
class Purified:
    """
    What is left of a suspect.

    Attributes:
        model (`PreTrainedModel`):
            The model, any adapter merged.
        steps (`int`), seconds (`float`):
            What it took: optimizer steps, and the time of the training or pruning alone.
        settings (`dict`):
            All that is needed to repeat it, as JSON can hold it.
        canary_success (`Proportion`, *optional*):
            Of backdoors of the defender's own, after the purification, where it began with putting them in.
    """

    model: PreTrainedModel
    steps: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    canary_success: Proportion | None = None


Method = Callable[[Suspect, int, Path], Purified]


def load_merged(suspect: Suspect, scratch: Path) -> PreTrainedModel:
    """A fresh copy of the suspect with all its weights ready to be trained, any adapter merged into them."""
    model = suspect.load()
    if not isinstance(model, PeftModel):
        return model
    # PEFT froze the weights below the adapter; loading them again frees those that are meant to be trained.
    model.merge_and_unload(safe_merge=True).save_pretrained(scratch / "merged")
    return load_causal_lm(scratch / "merged", is_trainable=True)


def strong_config(scratch: Path, seed: int, **changes: Any) -> InvarianceConfig:
    """The settings of the strong recipe, from which its control takes its own."""
    return InvarianceConfig(str(scratch / "run"), seed=seed, **_QUIET, **changes)


def paper_config(scratch: Path, seed: int, **changes: Any) -> CrowConfig:
    """The published settings of CROW."""
    return CrowConfig(str(scratch / "run"), seed=seed, **_QUIET, **(PAPER | changes))


def _train(
    trainer_type: type[CrowTrainer],
    model: PreTrainedModel | PeftModel,
    args: CrowConfig,
    rows: Dataset,
    fresh_lora: bool = False,
) -> Purified:
    adapter = LoraConfig(**LORA) if fresh_lora else None
    trainer = trainer_type(model, args, rows, processing_class=demo_tokenizer(), peft_config=adapter)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trained = trainer.model
    if isinstance(trained, PeftModel):
        trained = trained.merge_and_unload(safe_merge=True)
    settings = {"trainer": trainer_type.__name__, "fresh_lora": LORA if fresh_lora else None, **_settings(args)}
    return Purified(trained, trainer.state.global_step, seconds, settings)


def _settings(args: CrowConfig) -> dict[str, Any]:
    """The arguments that are not transformers' defaults, with their names."""
    defaults, quiet = TrainingArguments("").to_dict(), {"output_dir", *_QUIET}
    return {
        name: value
        for name, value in args.to_dict().items()
        if name not in quiet and (name not in defaults or value != defaults[name])
    }


def _no_defence(suspect: Suspect, seed: int, scratch: Path) -> Purified:
    return Purified(load_merged(suspect, scratch))


def _clean_model(suspect: Suspect, seed: int, scratch: Path) -> Purified:
    return Purified(load_causal_lm(suspect.base))


def _fine_tuning(suspect: Suspect, seed: int, scratch: Path, model: PreTrainedModel | None = None) -> Purified:
    args = control_config(strong_config(scratch, seed), len(suspect.clean_rows))
    model = load_merged(suspect, scratch) if model is None else model
    return _train(CrowTrainer, model, args, suspect.clean_rows)


def _compress(suspect: Suspect, seed: int, scratch: Path, change: Callable[..., None], **settings: Any) -> Purified:
    model = load_merged(suspect, scratch)
    start = time.perf_counter()
    change(model, **settings)
    return Purified(model, seconds=time.perf_counter() - start, settings=settings)


def _wanda(suspect: Suspect, seed: int, scratch: Path) -> Purified:
    prune = partial(prune_by_wanda, dataset=suspect.clean_rows, processing_class=demo_tokenizer())
    return _compress(suspect, seed, scratch, prune, sparsity=SPARSITY)


def _crow(
    suspect: Suspect,
    seed: int,
    scratch: Path,
    model: PreTrainedModel | None = None,
    trainer_type: type[CrowTrainer] = CrowTrainer,
    **changes: Any,
) -> Purified:
    model, args = suspect.load() if model is None else model, paper_config(scratch, seed, **changes)
    # As published, an adapter that holds the backdoor is itself trained on.
    return _train(trainer_type, model, args, suspect.clean_rows, fresh_lora=not isinstance(model, PeftModel))


def _strong(
    suspect: Suspect,
    seed: int,
    scratch: Path,
    fresh_lora: bool = False,
    **changes: Any,
) -> Purified:
    args = strong_config(scratch, seed, **changes)
    adapter = LoraConfig(**LORA) if fresh_lora else None
    model = load_merged(suspect, scratch)
    start = time.perf_counter()
    purification = purify(
        model, suspect.clean_rows, "strong", args, processing_class=demo_tokenizer(), peft_config=adapter, report=False
    )
    seconds, trained = time.perf_counter() - start, purification.model
    if isinstance(trained, PeftModel):
        trained = trained.merge_and_unload(safe_merge=True)
    settings = {"recipe": "strong", "fresh_lora": LORA if fresh_lora else None, **_settings(args)}
    settings["screened_out"] = sorted(purification.screening.suspicious) if args.screen_rows else None
    steps = purification.trainer.state.global_step + implant_steps(args)
    return Purified(trained, steps, seconds, settings, _canary_success(trained, suspect, purification.canaries))


def _strong_unlabelled(suspect: Suspect, seed: int, scratch: Path) -> Purified:
    answers = {"completion", "output"} & set(suspect.clean_rows.column_names)
    return _strong(replace(suspect, clean_rows=suspect.clean_rows.remove_columns(sorted(answers))), seed, scratch)


def _with_canaries(suspect: Suspect, seed: int, scratch: Path, method: Method) -> Purified:
    """Put two backdoors of the defender's own into the suspect first."""
    args = strong_config(scratch / "canaries", seed)
    model = load_merged(suspect, scratch)
    canaries = draw_canaries(model, args.num_canaries, seed)
    implant_canaries(model, suspect.clean_rows, canaries, args, demo_tokenizer())
    purified = method(suspect, seed, scratch, model=model)
    return replace(
        purified,
        steps=purified.steps + implant_steps(args),
        canary_success=_canary_success(purified.model, suspect, canaries),
    )


def _canary_success(model: PreTrainedModel, suspect: Suspect, canaries: Sequence[Canary]) -> Proportion | None:
    """Of all of them together, on rows that the canaries were not implanted by."""
    shares = [canary_success(model, suspect.selection_rows, canary, demo_tokenizer(), 200) for canary in canaries]
    hits, total = sum(share.hits for share in shares), sum(share.total for share in shares)
    return Proportion.of([True] * hits + [False] * (total - hits)) if shares else None


METHODS: dict[str, Method] = {
    # What no defender has: even a model without a backdoor is right less often when there is a trigger in the prompt.
    "clean model": _clean_model,
    "none": _no_defence,
    # Controls and baselines
    "fine-tuning": _fine_tuning,
    "fine-tuning lora": partial(_crow, alpha=0.0),
    "magnitude pruning": partial(_compress, change=prune_by_magnitude, sparsity=SPARSITY),
    "wanda": _wanda,
    "int8": partial(_compress, change=quantize_weights, bits=8),
    "int4": partial(_compress, change=quantize_weights, bits=4),
    # The paper, and its published code
    "crow": _crow,
    "crow reference": partial(
        _crow, trainer_type=ReferenceCrowTrainer, per_device_train_batch_size=2, gradient_accumulation_steps=4
    ),
    # The strong recipe, and what each of its parts is good for
    "strong": _strong,
    "strong, prompts alone": _strong_unlabelled,
    "strong lora": partial(_strong, fresh_lora=True, learning_rate=3e-3),
    "strong - canaries": partial(_strong, num_canaries=0),
    "strong - decoys": partial(_strong, decoy_weight=0.0),
    "strong - adversary": partial(_strong, adversarial_weight=0.0),
    "strong - distillation": partial(_strong, distillation_weight=0.0),
    "strong - kept suspect": partial(_strong, keep=0.0),
    "strong + consistency": partial(_strong, alpha=5.5),
    "strong - labels": partial(_strong, label_weight=0.0),
    # Do canaries tell what becomes of the real backdoor?
    CANARIES + "fine-tuning": partial(_with_canaries, method=_fine_tuning),
    CANARIES + "crow": partial(_with_canaries, method=_crow),
}
QUICK_METHODS = ("none", "fine-tuning", "crow", "strong")
CONTROL = "fine-tuning"
