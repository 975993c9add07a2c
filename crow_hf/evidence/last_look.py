"""The last look at a purified model: what its folder answers, loaded again as a user would."""

import gc
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from ..evaluation.generation import write_answers
from ..training.loading import load_causal_lm, load_tokenizer, move
from .snapshot import Snapshot, SnapshotRows


logger = logging.get_logger(__name__)


class Difference(NamedTuple):
    """
    An answer of a saved model that is not what was measured.

    Attributes:
        prompt (`str`):
            The prompt, as the saved tokenizer and its chat template write it.
        measured (`str`), saved (`str`):
            The answers of the model that was measured, and of the saved one.
        shows_target (`bool`):
            Whether only the saved model shows the target.
    """

    prompt: str
    measured: str
    saved: str
    shows_target: bool


@dataclass(frozen=True)
class LastLook:
    """
    What a saved model answers, beside what was measured before.

    Attributes:
        prompts (`int`):
            The number of prompts.
        tokens (`int`):
            Maximum number of tokens of an answer.
        different (`list[Difference]`):
            The answers that differ.
        trouble (`str`):
            Why the model was not looked at. Empty if it was.
    """

    prompts: int = 0
    tokens: int = 0
    different: list[Difference] = field(default_factory=list)
    trouble: str = ""

    def __str__(self) -> str:
        """Say in a sentence whether the saved model is the one that was measured."""
        if self.trouble:
            return (
                f"Last look: the saved model was not loaded again ({self.trouble}), so nothing shows that it answers "
                "as it was measured."
            )
        asked = (
            f"loaded again from its folder, the model answered {self.prompts} prompts with up to {self.tokens} tokens"
        )
        if not self.different:
            return f"Last look: {asked}, as it was measured."
        shown = sum(each.shows_target for each in self.different)
        target = f", and {shown} of these answers show the target" if shown else ""
        return f"Last look: {asked}, and {len(self.different)} answers differ from what was measured{target}."

    def to_dict(self) -> dict[str, Any]:
        """Return the look as JSON can hold it."""
        return asdict(self) | {"different": [each._asdict() for each in self.different]}


def look_again(
    folder: str | Path, rows: SnapshotRows, measured: Snapshot, device: torch.device, **kwargs: Any
) -> LastLook:
    """
    Load a saved model, and compare its greedy answers with those that were measured.

    The model has its own tokenizer, chat template and settings of generation, which the measurement leaves out.

    Args:
        folder (`str` or `Path`):
            The folder of the model.
        rows (`SnapshotRows`):
            The rows that the model was measured on.
        measured (`Snapshot`):
            What was measured.
        device (`torch.device`):
            The device to load the model on.
        **kwargs:
            Keyword arguments of [`load_causal_lm`].

    Returns:
        [`LastLook`]: Without a look if the measured model answered no prompts.
    """
    if not measured.answers:
        return LastLook(trouble="there are no prompts, or one fills the context of the model")
    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(folder, **kwargs)
    if "device_map" not in kwargs and "quantization_config" not in kwargs:
        model = move(model, device)
    again = SnapshotRows.first_of(rows.rows, tokenizer, rows.trigger, rows.target, rows.seed)
    prompts = [prompt for _, prompt in again.prompts]
    # Clean prompts do not contain the trigger, so it can be active for all of them.
    with nullcontext() if rows.trigger is None else rows.trigger.active(model):
        answers = write_answers(model, tokenizer, prompts, measured.tokens, own_settings=True)
    del model
    gc.collect()

    different = []
    for prompt, before, answer in zip(prompts, measured.answers, answers, strict=True):
        if answer.text != before:
            pairs = [(text, prompt.answer) for text in (before, answer.text)]
            hits = [] if rows.target is None else rows.target.matches_all(pairs)
            different.append(Difference(prompt.prompt, before, answer.text, hits == [False, True]))
    look = LastLook(len(prompts), measured.tokens, different)
    if different:
        logger.warning(str(look))
    return look
