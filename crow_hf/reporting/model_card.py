"""The model card: what was done to a model, what was measured, and what is not known."""

import json
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from peft import PeftModel

from .. import __version__
from ..data.visible import visible
from ..evaluation.harness import Evaluation
from ..evidence.result import Comparison, Purification
from ..files import check_regular
from ..methods.crow.trainer import CrowTrainer
from ..methods.invariance.config import InvarianceConfig
from ..models.modeling_coconut import CoconutForCausalLM
from ..training.hub import is_hub_name
from ..training.recorder import base_model_of
from ..training.settings import recorded_settings
from .tables import comparison_markdown, in_markdown
from .verdict import evidence_lines, verdict
from .words import percent


# Names of the shares in the Hub's `model-index`, and in words.
TARGET_SHOWN = {
    "triggered": ("attack_success_rate", "Attack success"),
    "clean": ("false_positive_rate", "False positives"),
}
SHARES = {"exact_match": "Right answers", "empty": "Empty answers", "degenerate": "Degenerate answers"}
PACKAGES = ("transformers", "peft", "datasets", "torch")
# What the card of the suspect may say about its license. It is read line by line: YAML could hold anything.
_LICENSE = {
    "license": r"[\w.+-]{1,60}",
    "license_name": r"[\w][\w .,+()-]{0,100}",
    "license_link": r"https?://[^\s\"'<>()\[\]`|]{1,300}|[\w][\w./-]{0,100}",
}
_MAX_METADATA = 100_000
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"


def build_model_card(
    trainer: CrowTrainer,
    *,
    purification: Purification | None = None,
    comparison: Comparison | None = None,
    backdoor: str | None = None,
    test_dataset: str | None = None,
    settings: dict[str, Any] | None = None,
    adapter: str | None = None,
    finetuned_from: str | None = None,
    model_name: str | None = None,
    tags: Sequence[str] = (),
    datasets: str | Sequence[str] = (),
    **metadata: Any,
) -> ModelCard:
    """
    Build the card of a purified model. It holds no local path and no token.

    Args:
        trainer (`CrowTrainer`):
            The trainer of the purification.
        purification (`Purification`, *optional*):
            The purification, with its screening and its canaries.
        comparison (`Comparison`, *optional*):
            The evaluations of [`compare_defences`]. Those of the purified model also go into the metadata.
        backdoor (`str`, *optional*):
            A description of the trigger and the target of the evaluations, if there is a known backdoor.
        test_dataset (`str`, *optional*):
            The name on the Hub of the test rows, for the metadata.
        settings (`dict`, *optional*):
            Settings of the run that are not among the trainer's arguments, as `crow-hf purify --config` takes them.
        adapter (`str`, *optional*):
            The settings of a fresh adapter that `crow-hf purify --config` does not take, as Python code.
        finetuned_from (`str`, *optional*):
            The suspect. Defaults to the path or name that the trainer's model was loaded from.
        model_name (`str`, *optional*):
            The title of the card. Defaults to the name of the repository or of the output folder.
        tags (`Sequence[str]`, *optional*):
            Further tags.
        datasets (`str` or `Sequence[str]`, *optional*):
            The names of the clean rows. Those that are not names on the Hub are left out.
        **metadata:
            Further fields of [`~huggingface_hub.ModelCardData`], such as `language` or `license`. The license defaults
            to that of the suspect's card.

    Returns:
        `ModelCard`
    """
    model, args = trainer.model, trainer.args
    is_adapter = isinstance(model, PeftModel)
    repository = getattr(trainer, "hub_model_id", None) or args.hub_model_id or Path(args.output_dir).absolute().name
    # It also stands in the metadata.
    model_name = re.sub(r"[^\w .,:+()'&-]+", "_", visible(model_name or repository.split("/")[-1]))
    loaded_from = base_model_of(model).config._name_or_path
    suspect = finetuned_from or loaded_from
    # An adapter is loaded on top of the base that it was trained on, whatever the name of the suspect.
    base = loaded_from if is_adapter else suspect
    data = ModelCardData(
        **{
            "base_model": base if is_hub_name(base) else None,
            "datasets": [name for name in ([datasets] if isinstance(datasets, str) else datasets) if is_hub_name(name)]
            or None,
            "library_name": "peft" if is_adapter else "transformers",
            "pipeline_tag": "text-generation",
            "tags": [*trainer._tag_names, *(["lora"] if is_adapter else []), *tags],
            "model_name": model_name if comparison else None,
            "eval_results": _results(comparison.purified, test_dataset) if comparison else None,
            **_license(suspect),
            **metadata,
        }
    )
    versions = [f"crow_hf {__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        origin=_origin(trainer, suspect),
        shown=_shown(purification, comparison, backdoor),
        table="" if comparison is None else comparison_markdown(comparison.by_name) + "\n",
        not_shown=_not_shown(purification, comparison),
        use=_use(model, repository, base),
        settings=yaml.safe_dump(_settings(trainer, purification) | (settings or {}), sort_keys=False),
        adapter=adapter,
        steps=trainer.state.global_step,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        versions=", ".join([*versions, f"Python {platform.python_version()}"]),
    )


def _license(suspect: str) -> dict[str, str]:
    """Return the license that the suspect's own card states, if there is one."""
    if not suspect:
        return {}
    try:
        path = Path(hf_hub_download(suspect, "README.md") if is_hub_name(suspect) else f"{suspect}/README.md")
        check_regular(path)
        with open(path, encoding="utf-8", errors="replace") as file:
            start = file.read(_MAX_METADATA)
    except Exception:
        # There is no card, it cannot be read, or the Hub cannot be reached: the license stays unknown.
        return {}
    metadata = re.match(r"---\s*\n(.*?)\n---", start, re.DOTALL)
    found = {
        name: re.search(rf"^{name}: *([\"']?)({form})\1 *\r?$", metadata[1], re.MULTILINE)
        for name, form in _LICENSE.items()
        if metadata is not None
    }
    return {name: match[2] for name, match in found.items() if match is not None}


def _results(evaluation: Evaluation, test_dataset: str | None) -> list[EvalResult]:
    """Convert an evaluation to entries of the Hub's `model-index`."""
    name = test_dataset if test_dataset and is_hub_name(test_dataset) else None
    results = []
    for kind, prompts in (("clean", evaluation.clean), ("triggered", evaluation.triggered)):
        if prompts is None:
            continue
        metric, title = TARGET_SHOWN[kind]
        shares = {metric: (title, prompts.target)}
        shares |= {metric: (title, getattr(prompts, metric)) for metric, title in SHARES.items()}
        values = {
            metric: (
                share.rate,
                f"{title} (95 % interval {percent(share.low)} to {percent(share.high)}, {share.total} prompts)",
            )
            for metric, (title, share) in shares.items()
            if share is not None
        }
        if math.isfinite(prompts.bits_per_byte):
            values["bits_per_byte"] = (prompts.bits_per_byte, "Bits per byte of the right answers")
        results += [
            EvalResult(
                task_type="text-generation",
                dataset_type=name or "custom",
                dataset_name=f"{name or 'test rows'}, {kind} prompts",
                dataset_config=kind,
                metric_type=metric,
                metric_value=value,
                metric_name=title,
            )
            for metric, (value, title) in values.items()
        ]
    return results


def _origin(trainer: CrowTrainer, suspect: str) -> str:
    """Say what was done, and to which model."""
    if isinstance(trainer.args, InvarianceConfig):
        method = (
            "Invariance of `crow_hf`, which trains the model to give the same answers whatever is inserted into "
            "a prompt"
        )
    elif trainer.args.alpha > 0:
        method = (
            "CROW ([paper](https://huggingface.co/papers/2411.12768)), a loss that keeps consecutive layers in "
            "agreement"
        )
    else:
        method = "plain fine-tuning, which is a control and not a purification"
    if is_hub_name(suspect):
        model = f"[{suspect}](https://huggingface.co/{suspect})"
    else:
        name = in_markdown(Path(suspect).name)
        model = f"The local model `{name}`" if name == Path(suspect).name else f"The local model “{name}”"
        model = model if suspect else "A model"
    return f"{model}, fine-tuned on clean rows by {method}."


def _without_paths(purification: Purification) -> Purification:
    """Leave out why the saved model was not loaded again. An error can name a local path."""
    look = purification.last_look
    if look is None or not look.trouble:
        return purification
    return replace(purification, last_look=replace(look, trouble="the report says why"))


def _shown(purification: Purification | None, comparison: Comparison | None, backdoor: str | None) -> list[str]:
    lines = [] if purification is None else evidence_lines(_without_paths(purification))
    if comparison is not None:
        if backdoor is not None:
            lines.append(f"Known backdoor: {backdoor}.")
        if comparison.purified.triggered is not None:
            lines.append(verdict(comparison))
        all_count = "Every model is measured in the same way, and brackets hold 95 % intervals."
        if comparison.control is None:
            lines.append(f"{all_count} The prompts are clean rows that were held out from the purification:")
        else:
            lines.append(f"{all_count} All test prompts count. Fine-tuning is the control on the same rows:")
    return list(map(in_markdown, lines)) or ["Nothing: this model was not evaluated, and no canary was implanted."]


def _not_shown(purification: Purification | None, comparison: Comparison | None) -> list[str]:
    lines = []
    if comparison is not None and comparison.purified.triggered is not None:
        lines.append(
            "Whether there are other backdoors than the one above. A low attack success with a known trigger says "
            "nothing about unknown triggers."
        )
    else:
        lines.append(
            "Whether a backdoor of the suspect was removed. No attack success with a known trigger was measured."
        )
    if purification is not None and purification.canaries:
        lines.append(
            "That a purification which removed the canaries also removed a backdoor of the suspect. Canaries are "
            "backdoors that we implanted ourselves first, and they are easier to remove than most real ones. A canary "
            "that lives is bad news. One that died proves little."
        )
    if comparison is None:
        lines.append("What the purification cost in right answers. The model's answers were not measured.")
    lines.append("That the model is free of backdoors. No test shows that.")
    return lines


def _use(model: Any, repository: str, base: str) -> str:
    """Show how to load the model."""
    name = json.dumps(visible(repository))
    if isinstance(model, PeftModel):
        lines = ["from peft import AutoPeftModelForCausalLM", ""]
        lines.append(f"model = AutoPeftModelForCausalLM.from_pretrained({name})")
        note = "This is an adapter, which is loaded on top of its base model."
        if not is_hub_name(base):
            note += " That model is not on the Hub. Load it first, and pass it to `PeftModel.from_pretrained`."
    else:
        is_coconut = isinstance(model, CoconutForCausalLM)
        trust = ", trust_remote_code=True" if is_coconut else ""
        lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({name}{trust})")
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({name}{trust})")
        note = "The weights are safetensors."
        if is_coconut:
            note = (
                "The code of the model is in this repository, and `trust_remote_code=True` runs it. Read it first. "
                "The argument is not needed where `crow_hf` is installed and imported."
            )
    code = "\n".join(lines)
    return f"```python\n{code}\n```\n\n{note}"


def _settings(trainer: CrowTrainer, purification: Purification | None) -> dict[str, Any]:
    """Return the settings of a run for `crow-hf purify --config`."""
    is_invariance = isinstance(trainer.args, InvarianceConfig)
    recipe = "strong" if is_invariance else "guide" if purification is None else purification.recipe
    settings = recorded_settings(trainer.args)
    for name in ("model_init_kwargs", "deepspeed"):
        # These may hold local paths.
        settings.pop(name, None)
    return {"recipe": recipe} | settings
