"""What a model does on a few rows: its answers, and how far apart its layers are."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attacks.poison import Poison
from ..attacks.targets import BaseTarget
from ..attacks.triggers import BaseTrigger
from ..data.encoding import encode_prompt
from ..data.rows import Rendered, add_empty_answers, has_prompts, render
from ..evaluation.generation import write_answers
from ..evaluation.layer_profile import LayerProfile, layer_profile
from ..methods.crow.config import CrowConfig
from ..training.recorder import context_length


# The layers are compared on the first 32 rows, and the answers to the first 5 are shown.
NUM_PROFILED, NUM_SAMPLES = 32, 5
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class SnapshotRows:
    """
    The rows that every model of a report is shown.

    Attributes:
        rows (`Dataset`):
            Clean rows, for the layer profile.
        prompts (`list[tuple[bool, Rendered]]`):
            The prompts to answer, and whether each one carries the trigger. Empty if the rows have no prompts.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of the models.
        trigger (`BaseTrigger`, *optional*):
            A known trigger.
        target (`BaseTarget`, *optional*):
            The target of that trigger.
        seed (`int`):
            Seed for the positions of the trigger.
    """

    rows: Dataset
    prompts: list[tuple[bool, Rendered]]
    tokenizer: PreTrainedTokenizerBase
    trigger: BaseTrigger | None
    target: BaseTarget | None
    seed: int

    @classmethod
    def first_of(
        cls,
        dataset: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        trigger: BaseTrigger | None = None,
        target: BaseTarget | None = None,
        seed: int = 0,
    ) -> "SnapshotRows":
        """
        Take the first rows of a dataset.

        Args:
            dataset (`Dataset` or `IterableDataset`):
                Clean rows in any of the formats of [`crow_hf.data`].
            tokenizer (`PreTrainedTokenizerBase`):
                The tokenizer of the models.
            trigger (`BaseTrigger`, *optional*):
                A known trigger. With it, the prompts are shown a second time with the trigger.
            target (`BaseTarget`, *optional*):
                The target of that trigger.
            seed (`int`, *optional*, defaults to 0):
                Seed for the positions of the trigger.
        """
        rows = add_empty_answers(Dataset.from_list(list(islice(dataset.with_format(None), NUM_PROFILED))))
        prompts: list[tuple[bool, Rendered]] = []
        if has_prompts(rows.column_names):
            shown = rows.select(range(min(NUM_SAMPLES, len(rows))))
            prompts += [(False, render(row, tokenizer, index)) for index, row in enumerate(shown)]
            if trigger is not None:
                triggered = shown.map(Poison(trigger, seed=seed), with_indices=True)
                prompts += [(True, render(row, tokenizer, index)) for index, row in enumerate(triggered)]
        return cls(rows, prompts, tokenizer, trigger, target, seed)


@dataclass(frozen=True)
class Snapshot:
    """
    What one model does on [`SnapshotRows`].

    Attributes:
        profile (`LayerProfile`):
            The distances between consecutive layers.
        answers (`list[str]`, *optional*):
            The answers to the prompts, with their special tokens. `None` if a prompt fills the context of the model.
        tokens (`int`):
            The length to which each answer is cut: 64 tokens, or what the context of the model allows.
    """

    profile: LayerProfile
    answers: list[str] | None
    tokens: int = SAMPLE_TOKENS


def snapshot(model: PreTrainedModel | PeftModel, rows: SnapshotRows, args: CrowConfig) -> Snapshot:
    """
    Record what a model does on some rows. The model is not changed.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        rows (`SnapshotRows`):
            The rows and prompts.
        args (`CrowConfig`):
            The arguments of the purification: the FGSM step, the batch size and the longest row.

    Returns:
        [`Snapshot`]
    """
    profile = layer_profile(
        model,
        rows.tokenizer,
        rows.rows,
        rows.trigger,
        epsilon=args.epsilon,
        epsilon_mode=args.epsilon_mode,
        layers=args.consistency_layers,
        perturb=args.perturb,
        max_length=args.max_length,
        # A batch of this size fits into memory in training.
        batch_size=args.per_device_train_batch_size,
        seed=rows.seed,
    )
    longest = max((len(encode_prompt(prompt, rows.tokenizer)) for _, prompt in rows.prompts), default=0)
    room = min(SAMPLE_TOKENS, (context_length(model) or math.inf) - longest)
    if room <= 0:
        return Snapshot(profile, None)
    # Clean prompts do not contain the trigger, so it can be active for all of them.
    with nullcontext() if rows.trigger is None else rows.trigger.active(model):
        prompts = [prompt for _, prompt in rows.prompts]
        answers = write_answers(model, rows.tokenizer, prompts, int(room))
    return Snapshot(profile, [answer.text for answer in answers], int(room))
