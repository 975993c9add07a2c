"""The model card: what was done to a model, what was shown of it, and what was not."""

import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel

from .. import __version__
from ..evaluation.harness import FINE_TUNING, NO_DEFENCE, Evaluation
from ..methods.crow.config import CrowConfig
from ..methods.invariance.config import InvarianceConfig
from ..models.modeling_coconut import CoconutForCausalLM
from .tables import comparison_markdown, percent
from .verdict import evidence, verdict


if TYPE_CHECKING:
    from ..evidence.result import Purification
    from ..methods.crow.trainer import CrowTrainer


# Of the inherited training arguments, those that a repetition needs.
SETTINGS = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "seed"),
)
# Names of the shares in the Hub's `model-index`, and in words.
TARGET_SHOWN = {
    "triggered": ("attack_success_rate", "Attack success"),
    "clean": ("false_positive_rate", "False positives"),
}
SHARES = {"exact_match": "Right answers", "empty": "Empty answers", "degenerate": "Degenerate answers"}
PACKAGES = ("transformers", "peft", "datasets", "torch")

TEMPLATE = """\
---
{{ card_data }}
---

# {{ model_name }}

{{ origin }}

## What was shown

{% for line in shown %}{{ line }}

{% endfor %}{{ table }}
## What was not shown

{% for line in not_shown %}- {{ line }}
{% endfor %}
## Use

{{ use }}

## Repeat it

```bash
crow-hf purify --config settings.yaml --model SUSPECT --dataset CLEAN_ROWS --output_dir OUTPUT
```

with this `settings.yaml`:

```yaml
{{ settings }}```

It took {{ steps }} optimizer steps of {{ batch_size }} rows, on weights in {{ dtype }}, with {{ versions }}.

## Cite

CROW is Min, Pham, Li and Sun, *CROW: Eliminating Backdoors from Large Language Models via Internal Consistency Regularization*,
ICML 2025, [arXiv 2411.12768](https://huggingface.co/papers/2411.12768).
"""


def build_model_card(
    trainer: "CrowTrainer",
    *,
    purification: "Purification | None" = None,
    evaluations: dict[str, Evaluation] | None = None,
    backdoor: str | None = None,
    test_dataset: str | None = None,
    settings: dict[str, Any] | None = None,
    finetuned_from: str | None = None,
    model_name: str | None = None,
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    **metadata: Any,
) -> ModelCard:
    """
    The card of a purified model. No path of this machine and no token is in it.

    Args:
        trainer (`CrowTrainer`):
            Of the purification.
        purification (`Purification`, *optional*):
            With the screening and the canaries: see [`purify`].
        evaluations (`dict[str, Evaluation]`, *optional*):
            Of [`compare_defences`], or others by the names of their models; the last one is that of this model, and stands in
            the metadata.
        backdoor (`str`, *optional*):
            What the evaluations' trigger and target are, if there is one.
        test_dataset (`str`, *optional*):
            The rows of the evaluations, for the metadata: a name on the Hub.
        settings (`dict`, *optional*):
            Settings of the run that are not among the trainer's arguments, as they go into `crow-hf purify --config`.
        finetuned_from (`str`, *optional*):
            The suspect; by default what the trainer's model was loaded from.
        model_name (`str`, *optional*):
            By default the name of the repository or the output directory.
        tags (`Sequence[str]`, *optional*):
            Further tags.
        datasets (`Sequence[str]`, *optional*):
            The clean rows; those that are no dataset on the Hub are left out.
        **metadata:
            Further fields of [`~huggingface_hub.ModelCardData`], such as `language` or `license`, which is by default what the
            suspect's own card says.
    """
    model, args = trainer.model, trainer.args
    is_adapter = isinstance(model, PeftModel)
    repository = getattr(trainer, "hub_model_id", None) or args.hub_model_id or Path(args.output_dir).absolute().name
    model_name = model_name or repository.split("/")[-1]
    loaded_from = model.get_base_model().config._name_or_path if is_adapter else model.config._name_or_path
    suspect = finetuned_from or loaded_from
    # An adapter is loaded on top of what it was trained on, whatever name the suspect goes by.
    base = loaded_from if is_adapter else suspect
    data = ModelCardData(
        **{
            "base_model": base if _is_hub_name(base) else None,
            "datasets": [name for name in datasets if _is_hub_name(name)] or None,
            "library_name": "peft" if is_adapter else "transformers",
            "pipeline_tag": "text-generation",
            "tags": [*trainer._tag_names, *(["lora"] if is_adapter else []), *tags],
            "model_name": model_name if evaluations else None,
            "eval_results": _results(list(evaluations.values())[-1], test_dataset) if evaluations else None,
            **_license(suspect),
            **metadata,
        }
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        model_name=model_name,
        origin=_origin(trainer, suspect),
        shown=_shown(purification, evaluations, backdoor),
        table="" if not evaluations else comparison_markdown(evaluations) + "\n",
        not_shown=_not_shown(purification, evaluations),
        use=_use(model, repository, base),
        settings=yaml.safe_dump(_settings(args, purification) | (settings or {}), sort_keys=False),
        steps=trainer.state.global_step,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        versions=", ".join(
            [f"crow_hf {__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]
            + [f"Python {platform.python_version()}"]
        ),
    )


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not Path(name).exists()


def _license(suspect: str) -> dict[str, str]:
    """What the suspect's own card says of its license."""
    if not suspect:
        return {}
    card = suspect if _is_hub_name(suspect) else Path(suspect) / "README.md"
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception:
        # No card, none that can be read, or no Hub: then it is unknown.
        return {}
    return {name: data.get(name) for name in ("license", "license_name", "license_link") if data.get(name)}


def _results(evaluation: Evaluation, test_dataset: str | None) -> list[EvalResult]:
    """An evaluation in the form of the Hub's `model-index`."""
    name = test_dataset if test_dataset and _is_hub_name(test_dataset) else None
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


def _origin(trainer: "CrowTrainer", suspect: str) -> str:
    """What was done, and to which model."""
    if isinstance(trainer.args, InvarianceConfig):
        method = 'the recipe "strong" of `crow_hf`: it gives the same answers, whatever is inserted into the prompt'
    elif trainer.args.alpha > 0:
        method = "CROW ([paper](https://huggingface.co/papers/2411.12768)), a loss that keeps consecutive layers in agreement"
    else:
        method = "plain fine-tuning, which is the control of a purification and no purification"
    if _is_hub_name(suspect):
        model = f"[{suspect}](https://huggingface.co/{suspect})"
    else:
        model = f"The local model `{Path(suspect).name}`" if suspect else "A model"
    return f"{model}, fine-tuned on clean rows by {method}."


def _shown(
    purification: "Purification | None", evaluations: dict[str, Evaluation] | None, backdoor: str | None
) -> list[str]:
    lines = [] if purification is None else evidence(purification)
    if evaluations:
        if backdoor is not None:
            lines.append(f"A known backdoor, for a drill: {backdoor}.")
        if _is_triggered(evaluations) and {NO_DEFENCE, FINE_TUNING} <= evaluations.keys():
            lines.append(verdict(evaluations))
        control = ", and fine-tuning is the control on the same rows" if FINE_TUNING in evaluations else ""
        lines.append(f"All test prompts, each model in the same way; brackets hold 95 % intervals{control}:")
    return lines or ["Nothing: no evaluation belongs to this card, and no canary was put in."]


def _not_shown(purification: "Purification | None", evaluations: dict[str, Evaluation] | None) -> list[str]:
    lines = []
    if evaluations and _is_triggered(evaluations):
        lines.append(
            "Whether there are other backdoors than the one above: low attack success with a known trigger says nothing of "
            "triggers that nobody knows."
        )
    else:
        lines.append(
            "Whether a backdoor of the suspect was removed: no attack success with a known trigger was measured."
        )
    if purification is not None and purification.canaries:
        lines.append(
            "That what removed the canaries also removed a backdoor of the suspect: they are backdoors of our own, put into it "
            "first, and easier to remove than most real ones. One that lives is bad news; one that died proves little."
        )
    if not evaluations:
        lines.append("What the purification cost: the model's answers were not measured.")
    lines.append("That the model is free of backdoors. No test shows that.")
    return lines


def _is_triggered(evaluations: dict[str, Evaluation]) -> bool:
    return list(evaluations.values())[-1].triggered is not None


def _use(model: Any, repository: str, base: str) -> str:
    """How to load what lies in the repository."""
    if isinstance(model, PeftModel):
        code = f'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("{repository}")'
        note = "This is an adapter, and is loaded on top of its base model."
        if not _is_hub_name(base):
            note += " That is not on the Hub: load it first, and give it to `PeftModel.from_pretrained`."
    else:
        is_coconut = isinstance(model, CoconutForCausalLM)
        code = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n" + "\n".join(
            f'{name} = {cls}.from_pretrained("{repository}"{", trust_remote_code=True" if is_coconut else ""})'
            for name, cls in (("model", "AutoModelForCausalLM"), ("tokenizer", "AutoTokenizer"))
        )
        note = "The weights are safetensors."
        if is_coconut:
            note = (
                "The model's code lies in this repository, and `trust_remote_code=True` runs it: read it first. Where `crow_hf` is "
                "installed and imported, leave that argument out."
            )
    return f"```python\n{code}\n```\n\n{note}"


def _settings(args: CrowConfig, purification: "Purification | None") -> dict[str, Any]:
    """The arguments of a run as YAML can hold them, without those that say where it ran and what it may reach."""
    recipe = (
        "strong" if isinstance(args, InvarianceConfig) else "guide" if purification is None else purification.recipe
    )
    own = CrowConfig.__annotations__ | (InvarianceConfig.__annotations__ if recipe == "strong" else {})
    values = args.to_dict()
    # Keyword arguments of `from_pretrained` may hold a token.
    names = [name for name in own if name in values and name not in ("model_init_kwargs", "logging_steps")]
    return {"recipe": recipe} | {name: values[name] for name in dict.fromkeys([*names, *SETTINGS])}
