"""evidence.result"""

from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel

from ..evaluation.harness import Evaluation
from ..methods.crow.trainer import CrowTrainer
from ..reporting.record import Record
from .canaries import Canary
from .screening import Screening


@dataclass
class Purification:
    """
    A purified model, and what is known about it.

    Attributes:
        model (`PreTrainedModel` or `PeftModel`):
            The purified model; an adapter that was trained is still one.
        recipe (`str`):
            One of [`RECIPES`].
        trainer (`CrowTrainer`):
            With the arguments and the log.
        screening (`Screening`, *optional*):
            Which clean rows were left out because they carry a trigger.
        canaries (`list[Canary]`):
            Known backdoors that were put into the suspect first, and whether the purification removed them.
        report (`dict`, *optional*):
            What `report.json` holds, by the keys of [`crow_hf.run_record`]; `None` if no report was asked for.
    """

    model: PreTrainedModel | PeftModel
    recipe: str
    trainer: CrowTrainer
    screening: Screening | None
    canaries: list[Canary]
    report: Record | None = None


@dataclass
class Comparison:
    """
    A purification beside its controls.

    Attributes:
        evaluations (`dict[str, Evaluation]`):
            By the names `"no defence"`, `"fine-tuning"` (the same rows, number of steps and learning rate), and last `"CROW"` or
            `"strong recipe"`.
        purification (`Purification`):
            With the purified model and the log.
    """

    evaluations: dict[str, Evaluation]
    purification: Purification

    @property
    def trainer(self) -> CrowTrainer:
        """Of the purification."""
        return self.purification.trainer
