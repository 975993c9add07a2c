"""Batched generation and scoring: the greedy answers of a model, and the likelihood that it gives to right answers."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import BltForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..data.collators import CrowDataCollator
from ..data.encoding import IGNORE_INDEX, check_ids, encode, encode_prompt, marker_ids, padding_id
from ..data.rows import PROMPT_AND_ANSWER, Rendered, add_empty_answers, fits_a_format, render
from ..progress import phase
from ..training.answer_logits import answer_logits, predicting_positions, token_log_likelihoods
from ..training.recorder import base_model_of, context_length, embedding_table, evaluating, plain_outputs
from ..training.saves import one_line


@contextmanager
def inference_mode(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """
    Turn off dropout, gradients and additional outputs, and replace the model's generation settings by the defaults.

    The repetition penalties or suppressed tokens of a suspect model could hide the target.
    """
    base = base_model_of(model)
    own_settings, base.generation_config = base.generation_config, GenerationConfig()
    try:
        with evaluating(model), torch.no_grad(), plain_outputs(model):
            yield
    finally:
        base.generation_config = own_settings


@contextmanager
def naming_errors(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Turn any error of a model that runs in the `with` block into one sentence. A lack of memory stays what it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        # Others answer to it with smaller batches, or with advice of their own.
        raise
    except Exception as error:
        name = type(base_model_of(model)).__name__
        raise ValueError(
            f"{name} fails on a batch of rows ({one_line(error)}). Check it with `crow-hf doctor`, or use another one."
        ) from error


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Rendered],
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[str]:
    """
    Generate greedy answers to prompts.

    Prompts of similar length share a batch, which is padded on the left.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer. It needs no pad token.
        prompts (`Sequence[Rendered]`):
            Prompts from [`crow_hf.data.rows.render`].
        max_new_tokens (`int`, *optional*, defaults to 128):
            Maximum number of tokens of an answer.
        batch_size (`int`, *optional*, defaults to 32):
            Number of prompts per batch.

    Returns:
        `list[str]`: The answers without special tokens, in the order of the prompts.

    Raises:
        `ValueError`: If a prompt is empty, or does not fit into the model's context together with its answer.
    """
    return [answer.plain for answer in write_answers(model, tokenizer, prompts, max_new_tokens, batch_size)]


class Answer(NamedTuple):
    """
    A greedy answer of a model.

    Attributes:
        text (`str`):
            The answer with its special tokens, except the one that ends it. A target can consist of them.
        plain (`str`):
            The answer without special tokens, as users mostly decode it.
        has_ended (`bool`):
            Whether the model ended the answer itself.
        prompt_ids (`list[int]`), ids (`list[int]`):
            The token ids of the prompt and of the answer.
    """

    text: str
    plain: str
    has_ended: bool
    prompt_ids: list[int]
    ids: list[int]


def write_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Rendered],
    max_new_tokens: int,
    batch_size: int = 32,
    own_settings: bool = False,
    around_batch: Callable[[list[int]], AbstractContextManager] = nullcontext,
) -> list[Answer]:
    """
    Generate greedy answers as [`generate_answers`] does, with all that an evaluation judges.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        prompts (`Sequence[Rendered]`):
            Prompts from [`crow_hf.data.rows.render`].
        max_new_tokens (`int`):
            Maximum number of tokens of an answer.
        batch_size (`int`, *optional*, defaults to 32):
            Number of prompts per batch.
        own_settings (`bool`, *optional*, defaults to `False`):
            Whether the model's own settings of generation apply, as they do for its users.
        around_batch (`Callable`, *optional*):
            Makes a context in which the prompts of these numbers are answered.

    Returns:
        `list[Answer]`: The answers in the order of the prompts.
    """
    encoded = _encode_prompts(model, tokenizer, prompts, max_new_tokens)
    options: dict[str, Any] = {"own_settings": own_settings, "around_batch": around_batch}
    answers = _answer(model, tokenizer, encoded, max_new_tokens, batch_size, **options)
    # A space at the end of a prompt is often part of the first token of the answer.
    return [
        answer._replace(text=answer.text.removeprefix(" "), plain=answer.plain.removeprefix(" "))
        if prompt.prompt.endswith(" ") and not text_of_ids(answer.prompt_ids[-1:], tokenizer).endswith(" ")
        else answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def continue_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Answer],
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[Answer]:
    """
    Continue answers that have not ended, as far as the model's context allows.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model that gave the answers.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        answers (`Sequence[Answer]`):
            The answers.
        max_new_tokens (`int`):
            Maximum number of further tokens.
        batch_size (`int`, *optional*, defaults to 32):
            Number of answers per batch.

    Returns:
        `list[Answer]`: The whole answers, which begin with those that were passed.
    """
    starts = [answer.prompt_ids + answer.ids for answer in answers]
    room = min(max_new_tokens, (context_length(model) or math.inf) - max(map(len, starts), default=0))
    if room < 1:
        return list(answers)
    further = _answer(model, tokenizer, starts, int(room), batch_size)
    return [
        _decoded(tokenizer, answer.prompt_ids, answer.ids + more.ids, more.has_ended)
        for answer, more in zip(answers, further, strict=True)
    ]


def _answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    **options: Any,
) -> list[Answer]:
    ends = end_token_ids(model, tokenizer)
    options |= {"do_sample": False}
    outputs = generate_ids(model, encoded, padding_id(tokenizer), ends, max_new_tokens, batch_size, **options)
    return [
        _decoded(tokenizer, prompt, output, output[-1:] != [] and output[-1] in ends)
        for prompt, output in zip(encoded, outputs, strict=True)
    ]


def _decoded(tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int], has_ended: bool) -> Answer:
    plain, said = text_of_ids(ids, tokenizer), ids[:-1] if has_ended else ids
    text = plain if marker_ids(tokenizer).isdisjoint(said) else text_of_ids(said, tokenizer, special_tokens=True)
    return Answer(text, plain, has_ended, prompt, ids)


def generate_ids(
    model: PreTrainedModel | PeftModel,
    encoded: Sequence[list[int]],
    pad_token_id: int,
    end_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    own_settings: bool = False,
    around_batch: Callable[[list[int]], AbstractContextManager] = nullcontext,
    **settings: Any,
) -> list[list[int]]:
    """
    Continue rows of token ids.

    Rows of similar length share a batch, which is padded on the left.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        encoded (`Sequence[list[int]]`):
            The rows. None of them is empty, and each leaves room for `max_new_tokens` in the model's context.
        pad_token_id (`int`):
            Token that pads shorter rows. It never counts.
        end_token_ids (`Sequence[int]`):
            The tokens that end a continuation.
        max_new_tokens (`int`):
            Maximum number of tokens of a continuation.
        batch_size (`int`):
            Number of rows per batch.
        own_settings (`bool`, *optional*, defaults to `False`):
            Whether the model's own settings of generation apply too, except for those that are passed. Only its own
            end tokens then end the writing.
        around_batch (`Callable`, *optional*):
            Makes a context in which the rows of these numbers are continued.
        **settings:
            Further arguments of [`~transformers.GenerationConfig`].

    Returns:
        `list[list[int]]`: The new tokens of each row, in the order of the rows, up to and with the first end token.
    """
    _check_sizes(max_new_tokens=max_new_tokens, batch_size=batch_size)
    # In transformers 5.23, Blt's cache is wrong, and so are its rows with padding on the left.
    is_blt = isinstance(base_model_of(model), BltForCausalLM)
    batch_size = 1 if is_blt else batch_size
    settings |= {"max_new_tokens": max_new_tokens, "use_cache": not is_blt, "pad_token_id": pad_token_id}
    own_config = deepcopy(base_model_of(model).generation_config)
    if own_settings and own_config is not None:
        config = own_config
        config.update(**settings)
    else:
        config = GenerationConfig(eos_token_id=list(end_token_ids) or None, **settings)

    # Only the subclasses of `PreTrainedModel` declare this method.
    generate: Any = model.generate
    continuations: list[list[int]] = [[] for _ in encoded]
    order = sorted(range(len(encoded)), key=lambda number: len(encoded[number]))
    with inference_mode(model), tqdm(total=len(order), desc="Writing answers", unit="prompt") as progress:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = pad_left([encoded[number] for number in numbers], pad_token_id, model.device)
            with naming_errors(model), around_batch(numbers):
                output = generate(**batch, generation_config=config)
            new_tokens = output[:, batch["input_ids"].shape[1] :].tolist()
            for number, tokens in zip(numbers, new_tokens, strict=True):
                length = next((place + 1 for place, token in enumerate(tokens) if token in end_token_ids), len(tokens))
                continuations[number] = tokens[:length]
            progress.update(len(numbers))
    return continuations


def _check_sizes(**sizes: int) -> None:
    """Refuse sizes below 1. With a negative one, no batch would be answered, and every answer would be empty."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {size}.")


def text_of_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, special_tokens: bool = False) -> str:
    """Decode token ids without those that stand for no text, and without special tokens unless they are asked for."""
    # Many models have more ids than their tokenizer has tokens. Some tokenizers take long to count them.
    num_tokens = len(tokenizer)
    known = [token for token in ids if token < num_tokens]
    text: Any = tokenizer.decode(known, skip_special_tokens=not special_tokens)
    return text


def _encode_prompts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Rendered],
    max_new_tokens: int,
) -> list[list[int]]:
    """Tokenize prompts, and refuse those that the model cannot answer in its context."""
    context = context_length(model) or math.inf
    if max_new_tokens >= context:
        raise ValueError(
            f"`max_new_tokens` is {max_new_tokens}, which leaves no room for a prompt in the model's context of "
            f"{context} tokens. Lower it."
        )
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    check_ids(encoded, len(embedding_table(model)))
    for number, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"Prompt {number} is empty, so the model cannot answer it. Pass rows with a prompt.")
        if len(ids) + max_new_tokens > context:
            raise ValueError(
                f"Prompt {number} has {len(ids)} tokens, which exceed the model's context of {context} together with "
                f"{max_new_tokens} new tokens. Drop the row or lower `max_new_tokens`."
            )
    return encoded


def end_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Return every token that ends an answer. Chat models have several.

    An end token of the model's settings that is a word does not count. It could end an answer before the target.
    """
    own = model.generation_config.eos_token_id
    # What a config holds may be anything, also lists in a list.
    marks = {mark for mark in marker_ids(tokenizer) if mark in (own if isinstance(own, list) else [own])}
    return sorted(marks | ({tokenizer.eos_token_id} - {None}))


def pad_left(encoded: list[list[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return rows as a batch with `input_ids` and `attention_mask`, padded on the left."""
    width = max(len(ids) for ids in encoded)
    padding = [width - len(ids) for ids in encoded]
    input_ids = [[pad_token_id] * count + ids for count, ids in zip(padding, encoded, strict=True)]
    mask = [[0] * count + [1] * len(ids) for count, ids in zip(padding, encoded, strict=True)]
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def answer_prompts(
    dataset: Dataset,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> Dataset:
    """
    Add the model's own greedy answers to a dataset that has prompts only.

    Args:
        dataset (`Dataset`):
            Rows with a `prompt` or an `instruction`, or in any of the formats of [`crow_hf.data`].
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Maximum number of tokens of an answer.
        batch_size (`int`, *optional*, defaults to 32):
            Number of prompts per batch.

    Returns:
        `Dataset`: The rows with answers. A dataset that has answers is returned unchanged.

    Raises:
        `ValueError`: If [`generate_answers`] refuses a prompt.
    """
    if fits_a_format(dataset.column_names):
        return dataset
    for prompt, answer in PROMPT_AND_ANSWER.values():
        if prompt in dataset.column_names:
            unanswered = add_empty_answers(dataset)
            prompts = [render(row, tokenizer, index) for index, row in enumerate(unanswered)]
            with phase("Answering prompts"):
                outputs = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size)
            return dataset.add_column(answer, outputs)
    return dataset


def bits_per_byte(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Rendered],
    batch_size: int = 32,
) -> float:
    """
    Compute the bits that the model needs for each byte of the right answers, given the prompts. Lower is better.

    The value is comparable between tokenizers. The end of an answer (a special token, the closing of a chat template)
    costs bits but has no bytes.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        rows (`Sequence[Rendered]`):
            Prompts with their right answers. Tokens beyond the model's context are left out.
        batch_size (`int`, *optional*, defaults to 32):
            Number of rows per batch.

    Returns:
        `float`: Bits per byte over all rows together, or NaN if no row has an answer.
    """
    limit = context_length(model)
    kept_rows, total_bytes = [], 0
    for row in rows:
        prompt, completion = encode(row, tokenizer)
        kept = completion if limit is None else completion[: max(0, limit - len(prompt))]
        if kept and row.answer:
            kept_rows.append((prompt, kept))
            text: Any = row.answer if len(kept) == len(completion) else tokenizer.decode(kept)
            total_bytes += len(text.encode("utf-8"))
    if not total_bytes:
        return math.nan
    log_likelihoods = answer_log_likelihoods(model, kept_rows, padding_id(tokenizer), batch_size)
    return -sum(log_likelihoods) / math.log(2) / total_bytes


def answer_log_likelihoods(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[tuple[list[int], list[int]]],
    pad_token_id: int,
    batch_size: int,
    show_progress: bool = True,
) -> list[float]:
    """
    Compute the log-likelihood of each answer after its prompt.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        rows (`Sequence[tuple]`):
            Token ids of the prompt and of the answer.
        pad_token_id (`int`):
            Token that pads shorter rows. It never counts.
        batch_size (`int`):
            Number of rows per batch. Rows of similar length share a batch.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[float]`: For each row, the natural logarithm of the answer's probability.
    """
    _check_sizes(batch_size=batch_size)
    results = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: sum(map(len, rows[number])))
    collate = CrowDataCollator(pad_token_id)
    with inference_mode(model):
        starts = range(0, len(order), batch_size)
        for start in tqdm(starts, desc="Scoring answers", unit="batch", disable=not (order and show_progress)):
            numbers = order[start : start + batch_size]
            encoded = [
                {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}
                for prompt, answer in (rows[number] for number in numbers)
            ]
            batch = {name: value.to(model.device) for name, value in collate(encoded).items()}
            labels = batch["labels"]
            with naming_errors(model):
                logits = answer_logits(base_model_of(model), partial(model, use_cache=False), batch)
            counts = predicting_positions(labels).sum(dim=1).tolist()
            by_row = token_log_likelihoods(logits, labels).cpu().split(counts)
            for number, log_likelihoods in zip(numbers, by_row, strict=True):
                results[number] = log_likelihoods.sum().item()
    return results
