"""What a model answers and how well it predicts the right answer, in batches."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import BltForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..data.collators import CrowDataCollator
from ..data.encoding import IGNORE_INDEX, encode_completion, encode_prompt, padding_id
from ..data.rows import FORMATS, Rendered, render
from ..training.recorder import context_length


@contextmanager
def _evaluating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """No dropout, no gradients, and none of the suspect's own generation settings: penalties could hide a target."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training, own_settings = model.training, base.generation_config
    model.eval()
    base.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            yield
    finally:
        base.generation_config = own_settings
        model.train(was_training)


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Rendered],
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[str]:
    """
    Greedy answers to all prompts, in their order.

    Prompts of similar length share a batch, padded on the left.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer; a pad token is not needed.
        prompts (`Sequence[Rendered]`):
            Rows as [`crow_hf.data.render`] writes them.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Where an answer is cut off.
        batch_size (`int`, *optional*, defaults to 32):
            Prompts at a time.

    Returns:
        `list[str]`: The answers without special tokens.

    Raises:
        `ValueError`: If a prompt is empty, or does not fit into the model's context together with its answer.
    """
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    context = context_length(model) or math.inf
    if max_new_tokens >= context:
        raise ValueError(
            f"`max_new_tokens` is {max_new_tokens}, which leaves no room for a prompt in the model's context of {context} "
            "tokens: lower it."
        )
    for number, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"Prompt {number} is empty, so there is nothing to answer: pass rows with a prompt.")
        if len(ids) + max_new_tokens > context:
            raise ValueError(
                f"Prompt {number} has {len(ids)} tokens, and with {max_new_tokens} new ones it exceeds the model's context "
                f"of {context}: drop the row or lower `max_new_tokens`."
            )
    pad = padding_id(tokenizer)
    # Blt's cache and its rows behind padding on the left are wrong in transformers 5.23.
    is_blt = isinstance(model.get_base_model() if isinstance(model, PeftModel) else model, BltForCausalLM)
    batch_size = 1 if is_blt else batch_size
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=not is_blt,
        pad_token_id=pad,
        eos_token_id=_end_ids(model, tokenizer) or None,
    )

    answers = [""] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda number: len(encoded[number]))
    with _evaluating(model), tqdm(total=len(order), desc="Generating", unit="prompt") as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(encoded[number]) for number in batch)
            ids = torch.tensor([[pad] * (width - len(encoded[n])) + encoded[n] for n in batch], device=model.device)
            real = torch.tensor([[0] * (width - len(encoded[n])) + [1] * len(encoded[n]) for n in batch])
            output = model.generate(input_ids=ids, attention_mask=real.to(model.device), generation_config=config)
            for number, answer in zip(batch, output[:, width:], strict=True):
                # Many models have more ids than their tokenizer has tokens: the rest stand for no text.
                answers[number] = tokenizer.decode(answer[answer < len(tokenizer)], skip_special_tokens=True)
            progress.update(len(batch))
    return answers


def answered(
    dataset: Dataset,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> Dataset:
    """
    Rows that are prompts alone, with the model's own greedy answers; rows with answers stay as they are.

    Args:
        dataset (`Dataset`):
            Rows with a `prompt` or an `instruction`, or in any of the formats of [`crow_hf.data`].
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        max_new_tokens (`int`, *optional*, defaults to 128):
            See [`generate_answers`].
        batch_size (`int`, *optional*, defaults to 32):
            See [`generate_answers`].
    """
    if any(set(columns) <= set(dataset.column_names) for columns in FORMATS.values()):
        return dataset
    for prompt, answer in (("prompt", "completion"), ("instruction", "output")):
        if prompt in dataset.column_names:
            asked = dataset.add_column(answer, [""] * len(dataset))
            prompts = [render(row, tokenizer, index) for index, row in enumerate(asked)]
            outputs = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size)
            return dataset.add_column(answer, outputs)
    return dataset


def _end_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: chat models have several."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if token is not None})


def bits_per_byte(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Rendered],
    batch_size: int = 32,
) -> float:
    """
    How many bits the model needs for a byte of the right answers, given the prompts: lower is better.

    Comparable between tokenizers. What ends an answer (a special token, a chat template's closing) costs bits but has no
    bytes.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        rows (`Sequence[Rendered]`):
            Prompts with their right answers; what lies beyond the model's context is left out.
        batch_size (`int`, *optional*, defaults to 32):
            Rows at a time.

    Returns:
        `float`: Bits per byte over all rows together, or NaN if no row has an answer.
    """
    limit = context_length(model)
    kept_rows, total_bytes = [], 0
    for row in rows:
        prompt, completion = encode_prompt(row, tokenizer), encode_completion(row, tokenizer)
        kept = completion if limit is None else completion[: max(0, limit - len(prompt))]
        if kept and row.answer:
            kept_rows.append((prompt, kept))
            text = row.answer if len(kept) == len(completion) else tokenizer.decode(kept)
            total_bytes += len(text.encode("utf-8"))
    if not total_bytes:
        return math.nan
    log_likelihoods = answer_log_likelihoods(model, kept_rows, padding_id(tokenizer), batch_size)
    return -sum(log_likelihoods) / math.log(2) / total_bytes


def answer_log_likelihoods(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[tuple[list[int], list[int]]],
    pad_token_id: int = 0,
    batch_size: int = 32,
) -> list[float]:
    """
    How likely a model finds an answer after its prompt.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        rows (`Sequence[tuple]`):
            Token ids of prompt and answer.
        pad_token_id (`int`, *optional*, defaults to 0):
            Fills shorter rows; it never counts.
        batch_size (`int`, *optional*, defaults to 32):
            Rows at a time; rows of similar length share a batch.

    Returns:
        `list[float]`: Of each row, the natural logarithm of the answer's probability.
    """
    results = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: sum(map(len, rows[number])))
    collate = CrowDataCollator(pad_token_id)
    with _evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="Scoring", unit="batch", disable=not order):
            numbers = order[start : start + batch_size]
            encoded = [
                {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}
                for prompt, answer in (rows[number] for number in numbers)
            ]
            batch = {name: value.to(model.device) for name, value in collate(encoded).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
            for number, loss in zip(numbers, losses.sum(dim=1).tolist(), strict=True):
                results[number] = -loss
    return results
