"""About how much memory, disk and time a purification takes, before it starts."""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import mean
from typing import Any

import psutil
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.collators import CrowDataCollator
from ..data.encoding import encode, padding_id, prepare_dataset
from ..data.rows import add_empty_answers, has_prompts, render
from ..detection.phrases import NUM_FOLLOWED
from ..evaluation.generation import generate_ids, naming_errors
from ..evaluation.retention import WRITTEN_TOKENS
from ..evidence.canaries import implant_steps
from ..evidence.screening import num_variants
from ..evidence.snapshot import NUM_PROFILED, SAMPLE_TOKENS
from ..methods.crow.config import CrowConfig
from ..methods.invariance.config import InvarianceConfig
from ..methods.invariance.objective import VIEWS
from ..progress import LOOKING, announce, duration, is_shown, phase
from ..reporting.cost import in_bytes
from ..training.checkpoints import existing
from ..training.loading import move
from ..training.recorder import context_length, evaluating, recorder_of
from ..training.sharding import will_shard
from .holdout import RETENTION_WINDOWS
from .phrases import PHRASE_BYTES, PHRASE_PROMPTS, PHRASES, length_in_tokens
from .presets import num_steps
from .run import CANARIES, CANARIES_AGAIN, CONTROL, LEAKS, LOOKING_AGAIN, PURIFYING, SCREENING, WRITING


logger = logging.get_logger(__name__)

# Rows of a sample, new tokens that are timed, and seconds that the timing of a batch may take.
_SAMPLE, _NEW_TOKENS, _MAX_SECONDS = 64, 8, 15.0
# Tokens of an average decoy and of an average answer of a canary.
_DECOY_TOKENS, _CANARY_TOKENS = 12, 16
# Tokens of an answer to a test row.
_ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Forecast:
    """
    About what a purification takes.

    Attributes:
        device (`str`):
            The device and the precision of the training.
        memory (`int`):
            Bytes of memory of the device.
        free_memory (`int`):
            Bytes of it that are free or already used by the model.
        disk (`int`):
            Bytes of the purified model and of the last checkpoint.
        free_disk (`int`):
            Bytes that are free.
        seconds (`dict[str, float]`):
            The phases in their order, and the seconds of each.
    """

    device: str
    memory: int
    free_memory: int
    disk: int
    free_disk: int
    seconds: dict[str, float]

    @property
    def fits(self) -> bool:
        """Whether memory and disk are likely to suffice."""
        return self.memory <= self.free_memory and self.disk <= self.free_disk

    def __str__(self) -> str:
        return (
            f"On {self.device}, this takes about {duration(sum(self.seconds.values()))}, about "
            f"{in_bytes(self.memory)} of memory ({in_bytes(self.free_memory)} are available) and about "
            f"{in_bytes(self.disk)} of disk ({in_bytes(self.free_disk)} are free)."
        )


@dataclass(frozen=True)
class _Costs:
    """
    What was measured.

    Attributes:
        forward (`float`), backward (`float`):
            Seconds per row of the batch, for a forward pass and for the backward pass of the training.
        token (`float`):
            Seconds per new token of a batch of prompts.
        activations (`float`):
            Bytes per row that a forward pass keeps for the backward pass.
        copies (`float`):
            Bytes that it keeps for any number of rows.
    """

    forward: float
    backward: float
    token: float
    activations: float
    copies: float


def forecast(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset,
    args: CrowConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter: PeftConfig | None = None,
    num_test_rows: int = 0,
) -> Forecast:
    """
    Forecast what a purification takes, from a forward and a backward pass of a batch of its rows.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect. It is moved to the device of the training, and stays as it is otherwise.
        dataset (`Dataset` or `IterableDataset`):
            The clean rows. All of them are used in the purification.
        args (`CrowConfig`):
            The arguments of the recipe.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        adapter (`PeftConfig`, *optional*):
            The fresh adapter that the recipe trains.
        num_test_rows (`int`, *optional*, defaults to 0):
            Rows that the suspect, the control and the purified model answer. Without a comparison there are none.

    Returns:
        [`Forecast`]

    Raises:
        `ValueError`: If a batch does not fit into the memory of the GPU.
    """
    sample = _encoded(dataset, args, tokenizer, min(args.max_length, context_length(model) or args.max_length))
    with phase("Taking the time"):
        move(model, args.device)
        try:
            costs = _measured(model, sample, args, tokenizer, adapter is not None)
        except torch.OutOfMemoryError as error:
            if args.activation_checkpointing:
                # The training keeps far less than what was tried.
                raise
            raise ValueError(
                f"A batch of {args.train_batch_size} rows does not fit into the memory of the GPU: lower "
                "`per_device_train_batch_size`, and raise `gradient_accumulation_steps` instead."
            ) from error
    seconds = _seconds(dataset, args, tokenizer, costs, num_test_rows)
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    trained = _trained(model, adapter)
    # Gradients and two moments of Adam, and the frozen suspect, which an adapter is without.
    extra = 12 * trained + (weights if isinstance(args, InvarianceConfig) and adapter is None else 0)
    views = VIEWS if isinstance(args, InvarianceConfig) else 1
    used, free = _memory(args.device)
    checkpoint = 12 * trained if args.save_strategy != "no" else 0
    return Forecast(
        device=_describe(args),
        memory=int(used + extra + costs.copies + views * args.train_batch_size * costs.activations),
        free_memory=used + free,
        disk=(4 * trained if isinstance(model, PeftModel) else weights) + checkpoint,
        free_disk=shutil.disk_usage(existing(args.output_dir)).free,
        seconds=seconds,
    )


def announce_forecast(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset,
    args: CrowConfig,
    tokenizer: PreTrainedTokenizerBase,
    adapter: PeftConfig | None,
    num_test_rows: int = 0,
) -> None:
    """Show a forecast before a purification, if there is a display. Sharded weights cannot be tried beforehand."""
    if not is_shown() or will_shard(args):
        return
    try:
        found = forecast(model, dataset, args, tokenizer, adapter=adapter, num_test_rows=num_test_rows)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        # The checks of the recipe, which follow, say what is wrong with the model.
        logger.debug("There is no forecast.", exc_info=True)
        return
    announce(str(found), found.seconds)
    if not found.fits:
        logger.warning("Memory or disk may not suffice. Lower `per_device_train_batch_size`, or free some.")


def _encoded(
    dataset: Dataset | IterableDataset, args: CrowConfig, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[int]]:
    """Return the token ids of the first rows, each with an answer and, for Invariance, about as long as a decoy."""
    sample = Dataset.from_list(list(islice(dataset.with_format(None), _SAMPLE)))
    if not has_prompts(add_empty_answers(sample).column_names):
        return [row["input_ids"] for row in prepare_dataset(sample, tokenizer, max_length)]
    rows = []
    for index, row in enumerate(add_empty_answers(sample)):
        rendered = render(row, tokenizer, index)
        encoded = encode(rendered, tokenizer)
        ids = [*encoded.prompt, *encoded.completion]
        if isinstance(args, InvarianceConfig):
            ids += ids[:1] * (_DECOY_TOKENS + (0 if rendered.answer.strip() else args.max_answer_length))
        rows.append(ids[:max_length])
    return [ids for ids in rows if len(ids) > 1]


def _measured(
    model: PreTrainedModel | PeftModel,
    sample: list[list[int]],
    args: CrowConfig,
    tokenizer: PreTrainedTokenizerBase,
    trains_fresh_adapter: bool,
) -> _Costs:
    """Take the time of a forward and a backward pass of a batch, or of fewer rows if that takes too long."""
    recorder = recorder_of(model, args.perturb)
    # An adapter needs the gradient of all layers too, but not those of their weights.
    first = min(recorder.layers[0].parameters(), key=torch.Tensor.numel)
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    precision = torch.autocast(args.device.type, dtype=dtype, enabled=args.bf16 or args.fp16)

    def passes(rows: Sequence[list[int]]) -> tuple[float, float, float]:
        collate = CrowDataCollator(padding_id(tokenizer))
        batch = collate([{"input_ids": ids, "labels": ids} for ids in rows])
        inputs = recorder.prepare({name: value.to(args.device) for name, value in batch.items()})
        before, start = _memory(args.device)[0], _now(args.device)
        with precision, naming_errors(model):
            loss = model(**inputs, use_cache=False).loss
        middle, kept = _now(args.device), _memory(args.device)[0] - before
        weights = [each for each in model.parameters() if each.requires_grad]
        torch.autograd.grad(loss, weights, allow_unused=True)
        return middle - start, _now(args.device) - middle, max(0, kept)

    with evaluating(model), _only_trainable(model, first if trains_fresh_adapter else None):
        # The first pass also prepares what later ones find prepared.
        first_pass = sum(passes(sample[:1])[:2])
        *_, of_one = passes(sample[:1])
        count = max(1, min(args.train_batch_size, len(sample), int(_MAX_SECONDS / first_pass)))
        forward, backward, kept = passes(sample[:count])
    # Mixed precision keeps a copy of the weights too, however many rows there are.
    activations = max(0.0, (kept - of_one) / (count - 1)) if count > 1 else kept
    count_eval = min(args.per_device_eval_batch_size, len(sample))
    prompts = [ids[: max(1, len(ids) // 2)] for ids in sample[:count_eval]]
    start = _now(args.device)
    with precision:
        generate_ids(model, prompts, padding_id(tokenizer), [], _NEW_TOKENS, count_eval)
    token = (_now(args.device) - start) / _NEW_TOKENS
    return _Costs(forward / count, backward / count, token, activations, max(0.0, of_one - activations))


def _seconds(
    dataset: Dataset | IterableDataset,
    args: CrowConfig,
    tokenizer: PreTrainedTokenizerBase,
    costs: _Costs,
    num_test_rows: int = 0,
) -> dict[str, float]:
    """Multiply what was measured by what each phase does."""
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps
    num_rows = len(dataset) if isinstance(dataset, Dataset) else max(1, args.max_steps) * rows_per_step
    both = costs.forward + costs.backward

    def generating(count: int, new_tokens: int) -> float:
        return math.ceil(count / args.per_device_eval_batch_size) * new_tokens * costs.token

    looking = NUM_PROFILED * 2 * both + generating(1, SAMPLE_TOKENS) + generating(num_test_rows, _ANSWER_TOKENS)
    looking_first = {LOOKING: looking + generating(RETENTION_WINDOWS, WRITTEN_TOKENS)}
    invariance = args if isinstance(args, InvarianceConfig) else None
    steps = num_steps(args, num_rows)
    implanting = (implant_steps(invariance) if invariance else 0) * rows_per_step * both
    if num_test_rows:
        # As many steps as the purification and its canaries, see `control_config`.
        looking_first[CONTROL] = steps * rows_per_step * both + implanting + looking
    if invariance is None:
        # Two forward and two backward passes, and a third one for the perturbation.
        step = rows_per_step * (both if args.alpha == 0 else 2 * both + costs.backward)
        return {**looking_first, PURIFYING: steps * step, LOOKING_AGAIN: looking}
    # The teacher, the adversary, and the three views.
    step = rows_per_step * (costs.forward + (invariance.adversarial_steps + VIEWS) * both)
    answers = invariance.num_canaries * generating(num_rows, _CANARY_TOKENS)
    preparing = {
        SCREENING: _num_variants(dataset, tokenizer) * costs.forward if invariance.screen_rows else 0.0,
        LEAKS: num_rows * costs.forward,
        PHRASES: _num_phrase_passes(dataset, tokenizer) * costs.forward if invariance.num_phrases else 0.0,
        # A prompt and its answer.
        WRITING: 2 * generating(invariance.num_written_rows, invariance.max_answer_length),
    }
    training = {
        CANARIES: implanting + answers,
        PURIFYING: steps * step,
        CANARIES_AGAIN: answers,
        LOOKING_AGAIN: looking,
    }
    # A comparison measures the suspect before everything else.
    first = {**looking_first, **preparing} if num_test_rows else {**preparing, **looking_first}
    return {name: taken for name, taken in (first | training).items() if taken}


def _num_variants(dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase) -> int:
    rows = _rows_with_prompts(dataset)
    if rows is None:
        return 0
    return sum(num_variants(render(row, tokenizer, index).prompt) for index, row in enumerate(rows))


def _num_phrase_passes(dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the number of rows whose tokens are as many as the search for phrases reads."""
    rows = _rows_with_prompts(dataset)
    if rows is None or len(rows) < PHRASE_PROMPTS:
        return 0.0
    length = length_in_tokens(PHRASE_BYTES, rows, tokenizer)
    rendered = (render(row, tokenizer, index) for index, row in enumerate(rows))
    row_length = length / PHRASE_BYTES * mean(len(f"{row.prompt}{row.answer}".encode()) for row in rendered)
    # Each beginning is read from its first token again whenever it grows by one.
    return PHRASE_PROMPTS * NUM_FOLLOWED * length**2 / 2 / row_length


def _rows_with_prompts(dataset: Dataset | IterableDataset) -> Dataset | None:
    rows = add_empty_answers(dataset) if isinstance(dataset, Dataset) else None
    return rows if rows is not None and has_prompts(rows.column_names) else None


def _trained(model: PreTrainedModel | PeftModel, adapter: PeftConfig | None) -> int:
    """Count the weights that are trained. A LoRA has two factors for each linear layer but the head."""
    if adapter is None:
        return sum(each.numel() for each in model.parameters() if each.requires_grad)
    head: Any = model.get_output_embeddings()
    linear = (each for each in model.modules() if isinstance(each, torch.nn.Linear) and each is not head)
    return sum(getattr(adapter, "r", 8) * (each.in_features + each.out_features) for each in linear)


def _describe(args: CrowConfig) -> str:
    on_gpu = args.device.type == "cuda"
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(args.device) if on_gpu else f"a CPU ({threads} thread{'s'[: threads - 1]})"
    mixed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    return f"{name} in {f'mixed precision ({mixed})' if mixed else 'full precision'}"


def _memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes in use by this process and the bytes that are free, on a GPU or of the machine."""
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        return used, torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used
    return psutil.Process().memory_info().rss, psutil.virtual_memory().available


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


@contextmanager
def _only_trainable(model: PreTrainedModel | PeftModel, weight: torch.nn.Parameter | None) -> Iterator[None]:
    """Let only one weight have a gradient. `None` changes nothing."""
    before = [(each, each.requires_grad) for each in model.parameters()]
    if weight is not None:
        model.requires_grad_(False)
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for each, required in before:
            each.requires_grad_(required)
