"""Warns of prompts that put a model into a state in which no clean prompt puts it.

The state is the one from which the model predicts the first token of its answer. A backdoor moves it towards its
target, away from the states of clean prompts, and the distance to the nearest of them shows that. With a trusted model
beside it, the distance of the two predictions shows far more.
"""

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.rows import Rendered, add_empty_answers, render
from ..evaluation.generation import Answer, inference_mode, write_answers
from ..evaluation.scores import Proportion
from ..files import whole_files
from ..training.recorder import base_model_of
from .divergence import divergences


# As in arXiv 2204.06507, a few neighbours are steadier than one.
NUM_NEIGHBORS = 5
# Clean prompts whose states are computed again when a guard is loaded, and how well they agree in another precision.
NUM_PROBES, MIN_AGREEMENT = 4, 0.98
# States that are compared with all clean ones at a time.
MAX_COMPARED = 1_024
# What a reference model reads as the model does.
_READ_BY_BOTH = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
_STATES, _SETTINGS = "guard.safetensors", "guard.json"


@dataclass(frozen=True)
class GuardedAnswer:
    """
    An answer, and what the guard says of its prompt.

    Attributes:
        text (`str`):
            The answer, or the refusal that stands for it.
        score (`float`):
            How far the prompt led the model from the states of clean prompts, from 0 to 2. With a reference model, how
            far from that, in nats.
        is_alarm (`bool`):
            Whether that is further than the guard allows.
    """

    text: str
    score: float
    is_alarm: bool


@dataclass
class Watch:
    """
    What [`ConsistencyGuard.watch`] saw.

    Attributes:
        scores (`torch.Tensor` of shape `(B,)`, *optional*):
            The scores of the prompts of a batch. `None` until the `with` block ends.
        states (`torch.Tensor` of shape `(B, D)`, *optional*):
            The states of the model after the prompts, or of shape `(B, 1)` their distances from the reference model.
            `None` until it has read them.
    """

    scores: torch.Tensor | None = None
    states: torch.Tensor | None = None


class ConsistencyGuard:
    """
    Tells which prompts are consistent with clean ones, for a model that may have a backdoor.

    The guard keeps the states of a model after clean prompts. The score of a prompt is the mean cosine distance of its
    state to the nearest five of them, after their mean is subtracted. Clean prompts score above the threshold about as
    often as chosen, if they are drawn as the rows were. The guard reads a state that the model computes anyway.

    With a reference model, the score is KL(model || reference) of the first token of an answer. The reference model
    reads each prompt too, which doubles the cost of a prompt if it is as large, and notices far more.
    docs/is-this-input-triggered.md says which backdoors either notices.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        processing_class (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        states (`torch.Tensor` of shape `(N, D)`):
            The states after the clean prompts, or of shape `(N, 1)` their distances from the reference model.
        probes (`list[Rendered]`):
            The first clean prompts. They show whether a saved guard belongs to a model.
        false_alarm_rate (`float`, *optional*, defaults to 0.01):
            The share of clean prompts that may be alarms.
        reference (`PreTrainedModel` or `PeftModel`, *optional*):
            A model that is trusted and reads the same token ids, best the one that this model was made from.

    Attributes:
        threshold (`float`):
            The largest score that is no alarm.
        false_alarms (`Proportion`):
            The share of the clean prompts that are alarms. Each is scored by all the others.

    Raises:
        `ValueError`: If the rate is not between 0 and 1, if there are too few prompts for it, if the states are not
            finite, or if the reference model is the model itself.

    Example:

    ```python
    from crow_hf import ConsistencyGuard

    guard = ConsistencyGuard.fit(model, clean_rows, tokenizer, false_alarm_rate=0.2)
    for answer in guard.generate(rows, refusal="This prompt is blocked.", max_new_tokens=16):
        print(answer.score, answer.is_alarm, answer.text)
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        states: torch.Tensor,
        probes: list[Rendered],
        false_alarm_rate: float = 0.01,
        reference: PreTrainedModel | PeftModel | None = None,
    ):
        _check_enough(len(states), false_alarm_rate)
        _check_reference(model, reference)
        if not states.isfinite().all():
            raise ValueError("What the model predicts after clean prompts is not finite. Load it in float32.")
        self.model, self.processing_class, self.probes = model, processing_class, probes
        self.states, self.false_alarm_rate, self.reference = states.float(), false_alarm_rate, reference
        self._center = self.states.mean(dim=0)
        self._directions = normalize(self.states - self._center, dim=-1)
        scores = self._distance(self.states, is_clean=True)
        self.threshold = conformal_threshold(scores, false_alarm_rate)
        self.false_alarms = Proportion.of((scores > self.threshold).tolist())

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel | PeftModel,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        *,
        false_alarm_rate: float = 0.01,
        reference: PreTrainedModel | PeftModel | None = None,
        batch_size: int = 32,
    ) -> "ConsistencyGuard":
        """
        Learn where clean prompts lead a model.

        Args:
            model (`PreTrainedModel` or `PeftModel`):
                The model.
            dataset (`Dataset`):
                Rows with clean prompts, such as the guard will see. They need no answers. 1,000 prompts notice far
                more than 200.
            processing_class (`PreTrainedTokenizerBase`):
                The model's tokenizer.
            false_alarm_rate (`float`, *optional*, defaults to 0.01):
                The share of clean prompts that may be alarms. It needs at least `1 / false_alarm_rate - 1` prompts.
            reference (`PreTrainedModel` or `PeftModel`, *optional*):
                A model that is trusted and reads the same token ids, best the one that this model was made from.
            batch_size (`int`, *optional*, defaults to 32):
                Number of prompts per batch.

        Returns:
            [`ConsistencyGuard`]

        Raises:
            `ValueError`: If there are too few prompts, or a prompt is empty or does not fit into the model's context.
        """
        _check_reference(model, reference)
        # The same prompt twice would be its own nearest neighbour.
        prompts = list({each.prompt: each for each in _rendered(dataset, processing_class)}.values())
        _check_enough(len(prompts), false_alarm_rate)
        _, states = _read(model, processing_class, prompts, batch_size, reference=reference)
        return cls(model, processing_class, states, prompts[:NUM_PROBES], false_alarm_rate, reference)

    def score(self, dataset: Dataset, batch_size: int = 32) -> torch.Tensor:
        """
        Score prompts.

        Args:
            dataset (`Dataset`):
                Rows with prompts.
            batch_size (`int`, *optional*, defaults to 32):
                Number of prompts per batch.

        Returns:
            `torch.Tensor`: The scores, of shape `(N,)`. Those above `threshold` are alarms.

        Raises:
            `ValueError`: If a prompt is empty, or does not fit into the model's context.
        """
        prompts = _rendered(dataset, self.processing_class)
        _, states = _read(self.model, self.processing_class, prompts, batch_size, reference=self.reference)
        return self._distance(states)

    def generate(
        self,
        dataset: Dataset,
        refusal: str | None = None,
        max_new_tokens: int = 128,
        batch_size: int = 32,
    ) -> list[GuardedAnswer]:
        """
        Answer prompts, and say which of them are alarms.

        Args:
            dataset (`Dataset`):
                Rows with prompts.
            refusal (`str`, *optional*):
                What stands for the answers to prompts that are alarms. Without it, they are answered too.
            max_new_tokens (`int`, *optional*, defaults to 128):
                Maximum number of tokens of an answer.
            batch_size (`int`, *optional*, defaults to 32):
                Number of prompts per batch.

        Returns:
            `list[GuardedAnswer]`: The greedy answers, in the order of the rows.

        Raises:
            `ValueError`: If a prompt is empty, or does not fit into the model's context.
        """
        prompts = _rendered(dataset, self.processing_class)
        answers, states = _read(self.model, self.processing_class, prompts, batch_size, max_new_tokens, self.reference)
        guarded = []
        for answer, score in zip(answers, self._distance(states).tolist(), strict=True):
            # A score that is no number is an alarm.
            is_alarm = not score <= self.threshold
            is_refused = is_alarm and refusal is not None
            guarded.append(GuardedAnswer(refusal if is_refused else answer.plain, score, is_alarm))
        return guarded

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """
        Score the prompts of the first forward pass in the `with` block, such as that of `model.generate`.

        The rows must be padded on the left, as for generation. Nothing is computed twice.

        Yields:
            [`Watch`]: The scores. Those above `threshold` are alarms.
        """
        with _watching(self.model, self.reference) as watch:
            yield watch
        if watch.states is not None:
            watch.scores = self._distance(watch.states)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """
        Save the guard, without any model, as safetensors and JSON. A guard that is there already is replaced.

        The JSON file holds four of the clean prompts.

        Args:
            save_directory (`str` or `Path`):
                A folder. It is created if it does not exist.
        """
        with whole_files(save_directory) as folder:
            save_file({"states": self.states.contiguous()}, folder / _STATES)
            settings = {
                "false_alarm_rate": self.false_alarm_rate,
                "threshold": self.threshold,
                "false_alarms": self.false_alarms._asdict(),
                "has_reference": self.reference is not None,
                "probes": [[probe.prompt, probe.templated] for probe in self.probes],
            }
            (folder / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        save_directory: str | Path,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        reference: PreTrainedModel | PeftModel | None = None,
    ) -> "ConsistencyGuard":
        """
        Load a guard for the model that it was fitted on.

        Args:
            save_directory (`str` or `Path`):
                The folder that [`ConsistencyGuard.save_pretrained`] wrote.
            model (`PreTrainedModel` or `PeftModel`):
                The model.
            processing_class (`PreTrainedTokenizerBase`):
                The model's tokenizer.
            reference (`PreTrainedModel` or `PeftModel`, *optional*):
                The reference model, if the guard was fitted with one.

        Returns:
            [`ConsistencyGuard`]

        Raises:
            `ValueError`: If there is no guard in the folder, if it belongs to another model, or if only the guard or
                only the call has a reference model.
        """
        folder = Path(save_directory)
        try:
            settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            probes = [Rendered(str(prompt), "", "", bool(templated)) for prompt, templated in settings["probes"]]
            states, rate = load_file(folder / _STATES)["states"], float(settings["false_alarm_rate"])
            has_reference = bool(settings["has_reference"])
            guard = cls(model, processing_class, states, probes, rate, reference)
        except (OSError, KeyError, TypeError, ValueError, RecursionError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no guard that can be read. Fit one with `crow-hf guard`.") from error
        if has_reference != (reference is not None):
            done = "with a reference model: pass it too" if has_reference else "without a reference model: pass none"
            raise ValueError(f"The guard in {folder} was fitted {done}.")
        _, states = _read(model, processing_class, probes, NUM_PROBES, reference=reference)
        kept = guard.states[: len(states)]
        if not _agree(states, kept):
            raise ValueError(f"The guard in {folder} was fitted on another model or tokenizer. Fit it on this one.")
        return guard

    def _distance(self, states: torch.Tensor, is_clean: bool = False) -> torch.Tensor:
        """Return the mean cosine distance to the nearest clean states, of which a clean state itself is none."""
        if self.reference is not None:
            return states[:, 0]
        distances = [states.new_empty(0)]
        for start in range(0, len(states), MAX_COMPARED):
            part = normalize(states[start : start + MAX_COMPARED] - self._center, dim=-1)
            similarity = part @ self._directions.T
            if is_clean:
                similarity.diagonal(start).fill_(-torch.inf)
            distances.append(1 - similarity.topk(NUM_NEIGHBORS, dim=-1).values.mean(dim=-1))
        return torch.cat(distances)


def conformal_threshold(scores: torch.Tensor, rate: float) -> float:
    """
    Return the score that a further one exceeds about as often as chosen (split conformal prediction, arXiv
    2107.07511).

    Args:
        scores (`torch.Tensor`):
            Scores of N clean prompts, shape `(N,)`.
        rate (`float`):
            The share of clean prompts that may score higher.
    """
    rank = min(len(scores), math.ceil((1 - rate) * (len(scores) + 1)))
    return float(scores.sort().values[rank - 1])


def _check_reference(model: PreTrainedModel | PeftModel, reference: PreTrainedModel | PeftModel | None) -> None:
    if reference is model:
        raise ValueError("The reference model is the model itself. Pass another one, or none.")


def _check_enough(num_prompts: int, false_alarm_rate: float) -> None:
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"`false_alarm_rate` must be between 0 and 1, but is {false_alarm_rate}.")
    needed = max(NUM_NEIGHBORS + 1, math.ceil(1 / false_alarm_rate) - 1)
    if num_prompts < needed:
        raise ValueError(
            f"A rate of {false_alarm_rate:g} needs at least {needed} different clean prompts, but there are "
            f"{num_prompts}. Pass more rows, or a higher `false_alarm_rate`."
        )


def _agree(states: torch.Tensor, kept: torch.Tensor) -> bool:
    """Whether states, or distances from the reference model, are the same but for the precision of the models."""
    if states.shape != kept.shape:
        return False
    if states.shape[1:] == (1,):
        return bool((states - kept).norm() <= (1 - MIN_AGREEMENT) * (1 + kept.norm()))
    return bool(torch.cosine_similarity(states, kept).min() >= MIN_AGREEMENT)


@contextmanager
def _watching(
    model: PreTrainedModel | PeftModel, reference: PreTrainedModel | PeftModel | None = None
) -> Iterator[Watch]:
    """Take the states from which the model predicts the next token, in the first forward pass of the block."""
    watch, base = Watch(), base_model_of(model)

    def take(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if watch.states is None:
            watch.states = args[0][:, -1].detach().float().cpu()

    def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> None:
        if watch.states is None:
            given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            watch.states = _from_reference(outputs.logits[:, -1], reference, given)[:, None]

    handle = (
        base.get_output_embeddings().register_forward_pre_hook(take)
        if reference is None
        else base.register_forward_hook(compare, with_kwargs=True)
    )
    try:
        yield watch
    finally:
        handle.remove()


def _from_reference(logits: torch.Tensor, reference: Any, given: Mapping[str, Any]) -> torch.Tensor:
    """Let the reference model read what the model was given. Return how far its next token is, of shape `(B,)`."""
    takes = inspect.signature(base_model_of(reference).forward).parameters
    inputs = {name: given[name] for name in _READ_BY_BOTH if given.get(name) is not None and name in takes}
    inputs = {name: each.to(reference.device) if torch.is_tensor(each) else each for name, each in inputs.items()}
    with inference_mode(reference):
        others = reference(**inputs, use_cache=False).logits[:, -1]
    return divergences(logits.detach().float().cpu(), others.float().cpu())


def _rendered(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    return [render(row, tokenizer, index) for index, row in enumerate(add_empty_answers(dataset))]


def _read(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Rendered],
    batch_size: int,
    max_new_tokens: int = 1,
    reference: PreTrainedModel | PeftModel | None = None,
) -> tuple[list[Answer], torch.Tensor]:
    """Answer prompts. Return the answers, and the states after the prompts, of shape `(N, D)`, see [`Watch`]."""
    states: dict[int, torch.Tensor] = {}

    @contextmanager
    def watching(numbers: list[int]) -> Iterator[None]:
        with _watching(model, reference) as watch:
            yield
        states.update(zip(numbers, watch.states, strict=True))

    answers = write_answers(model, tokenizer, prompts, max_new_tokens, batch_size, around_batch=watching)
    return answers, torch.stack([states[number] for number in range(len(prompts))]) if prompts else torch.empty(0, 0)
