"""evidence.snapshot"""

import math
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attacks.poison import Poison
from ..attacks.targets import BaseTarget
from ..attacks.triggers import BaseTrigger
from ..data.encoding import encode_prompt
from ..data.rows import Rendered, find_format, render
from ..evaluation.generation import generate_answers
from ..evaluation.harness import with_answers
from ..evaluation.layer_profile import LayerProfile, layer_profile
from ..evaluation.scores import is_exact_match
from ..methods.crow.config import CrowConfig
from ..models.byte_vocabulary import BYTE_OFFSET
from ..models.modeling_coconut import CoconutForCausalLM
from ..patching.patcher import EntropyPatcher
from ..training.recorder import context_length


if TYPE_CHECKING:
    pass

from ..reporting.record import Record, base_model_of


# How many of the first rows the layers are compared on, and how many answers are shown.
NUM_PROFILED, NUM_SAMPLES = 32, 5
SAMPLE_TOKENS = 64


class Witness:
    """
    Looks at several models in the same way: at their layers, and at what they answer.

    Args:
        rows (`Dataset` or `IterableDataset`):
            Clean rows; the first ones are looked at.
        tokenizer (`PreTrainedTokenizerBase`):
            The models'.
        args (`CrowConfig`):
            Of the purification: the FGSM step, the batch size, the longest row.
        trigger (`BaseTrigger`, *optional*):
            A known trigger.
        target (`BaseTarget`, *optional*):
            What it makes a model say.
        seed (`int`, *optional*, defaults to 0):
            Of the places where the trigger is put.

    Attributes:
        profiles (`dict[str, LayerProfile]`):
            By the model's name, in the order in which they were looked at.
    """

    def __init__(
        self,
        rows: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        args: CrowConfig,
        trigger: BaseTrigger | None = None,
        target: BaseTarget | None = None,
        seed: int = 0,
    ) -> None:
        self.rows = with_answers(Dataset.from_list(list(islice(rows.with_format(None), NUM_PROFILED))))
        self.tokenizer, self.args, self.trigger, self.target, self.seed = tokenizer, args, trigger, target, seed
        self.profiles: dict[str, LayerProfile] = {}
        self._prompts = self._prompts_to_show()
        self._answers: dict[str, list[str]] = {}

    def look(self, name: str, model: PreTrainedModel | PeftModel) -> None:
        """Keep the layer profile of a model, and its answers, cut short."""
        args = self.args
        self.profiles[name] = layer_profile(
            model,
            self.tokenizer,
            self.rows,
            self.trigger,
            epsilon=args.epsilon,
            epsilon_mode=args.epsilon_mode,
            layers=args.consistency_layers,
            perturb=args.perturb,
            max_length=args.max_length,
            # What fits into memory in training.
            batch_size=args.per_device_train_batch_size,
            seed=self.seed,
        )
        longest = max((len(encode_prompt(prompt, self.tokenizer)) for _, prompt in self._prompts), default=0)
        room = min(SAMPLE_TOKENS, (context_length(model) or math.inf) - longest)
        if room > 0:
            # Clean prompts hold no trigger that it could be active on.
            with nullcontext() if self.trigger is None else self.trigger.active(model):
                prompts = [prompt for _, prompt in self._prompts]
                self._answers[name] = generate_answers(model, self.tokenizer, prompts, room)

    def samples(self) -> list[Record]:
        """The prompts with the answers of all models; none if a prompt fills the context."""
        return [
            {
                "prompt": prompt.prompt,
                "triggered": triggered,
                "answers": [self._judged(name, said[number], prompt.answer) for name, said in self._answers.items()],
            }
            for number, (triggered, prompt) in enumerate(self._prompts)
            if self._answers
        ]

    def patches(self, model: PreTrainedModel | PeftModel) -> list[Record] | None:
        """How a Coconut cuts the first sample prompt, and the same prompt with the trigger."""
        base = base_model_of(model)
        if not isinstance(base, CoconutForCausalLM):
            return None
        rule = asdict(base.binary_patch_module.rule)
        patcher = EntropyPatcher(base.latent_transformer.entropy_predictor, **rule)
        kinds = dict(reversed(self._prompts))
        texts = [
            bytes(t - BYTE_OFFSET for t in encode_prompt(kinds[kind], self.tokenizer) if 0 <= t - BYTE_OFFSET < 256)
            for kind in sorted(kinds)
        ]
        return [
            {name: None if values is None else values.tolist() for name, values in vars(document).items()}
            for document in patcher.patch(texts)
        ]

    def _prompts_to_show(self) -> list[tuple[bool, Rendered]]:
        """The first prompts, and whether the trigger is in them; none where rows have no prompt."""
        if find_format(self.rows.column_names) in ("tokens", "text"):
            return []
        rows = self.rows.select(range(min(NUM_SAMPLES, len(self.rows))))
        prompts = [(False, render(row, self.tokenizer, index)) for index, row in enumerate(rows)]
        if self.trigger is not None:
            triggered = rows.map(Poison(self.trigger, seed=self.seed), with_indices=True)
            prompts += [(True, render(row, self.tokenizer, index)) for index, row in enumerate(triggered)]
        return prompts

    def _judged(self, model: str, text: str, right: str) -> Record:
        shows_target = None if self.target is None else self.target.matches(text, right)
        return {
            "model": model,
            "text": text,
            "shows_target": shows_target,
            "is_right": is_exact_match(text, right) if right else None,
        }
