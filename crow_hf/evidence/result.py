"""The results of the recipes: a purified model, and a purification beside its controls."""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..evaluation.harness import Evaluation
from ..evaluation.retention import Retention
from ..methods.crow.trainer import CrowTrainer
from ..methods.invariance.trainer import InvarianceTrainer
from .canaries import Canary
from .last_look import LastLook
from .screening import Screening
from .snapshot import Snapshot


# The name of the suspect's evaluation in tables.
NO_DEFENCE = "no defence"


@dataclass
class Purification:
    """
    A purified model and the evidence about it.

    Attributes:
        model (`PreTrainedModel` or `PeftModel`):
            The purified model. It is a `PeftModel` if an adapter was trained and not merged.
        recipe (`str`):
            The name of the recipe, see [`recipe_config`].
        trainer (`CrowTrainer`):
            The trainer, with its arguments and its log.
        screening (`Screening`, *optional*):
            The clean rows that were left out because they carry a trigger. `None` if the rows were not screened.
        canaries (`list[Canary]`):
            Backdoors that were implanted before the purification, with their success before and after it.
        snapshots (`dict[str, Snapshot]`):
            Answers and layer profiles of `"suspect"` and `"purified"`, and of `"control"` in a comparison. Empty if
            none were taken.
        retention ([`Retention`], *optional*):
            What the purified model has kept of the suspect. `None` if it was not measured.
        kept (`float`):
            Share of the suspect's weights that was mixed into the purified weights, by `keep` and `max_kl`.
        phrases (`list[str]`):
            What the suspect knows by heart. The adversary led to it.
        dropped_settings (`list[str]`):
            Settings of the suspect that the purified model does not have, because they choose words or run code.
        chat_template (`list[str]`):
            What the suspect's chat template could do to prompts, whatever the weights are, see [`read_template`].
        last_look ([`LastLook`], *optional*):
            What the saved model answers, loaded again from its folder. `None` if it was not loaded again.
        held_out (`dict[str, Evaluation]`):
            Evaluations of `"suspect"`, `"purified"` and perhaps `quantized` on clean rows that were held out. Empty if
            there are none.
        quantized (`str`, *optional*):
            The name of the evaluations of the saved model with quantized weights, such as `"purified, nf4"`. `None` if
            there are none.
        report (`dict`, *optional*):
            The content of `report.json`, with the keys of [`crow_hf.reporting.record`]. `None` if there is no report.
        hub_url (`str`, *optional*):
            The address of the pushed repository. `None` if the model was not pushed.
        adapter (`PeftConfig`, *optional*):
            The adapter that was trained, which may have been merged since. `None` if all weights were trained.
    """

    model: PreTrainedModel | PeftModel
    recipe: str
    trainer: CrowTrainer
    screening: Screening | None = None
    canaries: list[Canary] = field(default_factory=list)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    retention: Retention | None = None
    kept: float = 0.0
    phrases: list[str] = field(default_factory=list)
    dropped_settings: list[str] = field(default_factory=list)
    chat_template: list[str] = field(default_factory=list)
    last_look: LastLook | None = None
    held_out: dict[str, Evaluation] = field(default_factory=dict)
    quantized: str | None = None
    report: dict[str, Any] | None = None
    hub_url: str | None = None
    adapter: PeftConfig | None = None

    @property
    def method(self) -> str:
        """The name of the method that the recipe runs: `"CROW"` or `"Invariance"`."""
        return "Invariance" if isinstance(self.trainer, InvarianceTrainer) else "CROW"


@dataclass
class Comparison:
    """
    The evaluations of a purified model and of its controls, all on the same test rows.

    Attributes:
        suspect (`Evaluation`):
            The suspect model, without a defence.
        control (`Evaluation`, *optional*):
            The suspect after plain fine-tuning with the same rows, number of steps and learning rate. `None` on
            held-out rows.
        purified (`Evaluation`):
            The purified model.
        others (`dict[str, Evaluation]`):
            Further models by their names, for example a model that never had a backdoor.
        purification (`Purification`, *optional*):
            The purification that produced the purified model.
    """

    suspect: Evaluation
    control: Evaluation | None
    purified: Evaluation
    others: dict[str, Evaluation] = field(default_factory=dict)
    purification: Purification | None = None

    @classmethod
    def on_held_out_rows(cls, purification: Purification) -> "Comparison | None":
        """Return the suspect beside the purified model on held-out rows, or `None` if there are none."""
        held_out = purification.held_out
        if not held_out:
            return None
        others = {name: each for name, each in held_out.items() if name not in ("suspect", "purified")}
        return cls(held_out["suspect"], None, held_out["purified"], others, purification)

    @property
    def by_role(self) -> dict[str, Evaluation]:
        """All evaluations by `"suspect"`, `"control"`, the names of the others, and `"purified"`."""
        control = {} if self.control is None else {"control": self.control}
        return {"suspect": self.suspect, **control, **self.others, "purified": self.purified}

    @property
    def by_name(self) -> dict[str, Evaluation]:
        """All evaluations by the names that tables show, the purified model last."""
        purified = "purified" if self.purification is None else self.purification.method
        names = {"suspect": NO_DEFENCE, "control": "fine-tuning", "purified": purified}
        return {names.get(role, role): evaluation for role, evaluation in self.by_role.items()}
