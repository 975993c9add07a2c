"""
What a model forgot: how far its distribution has moved from that of a reference model, on answers and on running text.

The reference is the suspect, which a purification changes in place. So its distributions are kept: for each token, the
log-probabilities of the 1,024 most likely tokens, and all other tokens together as one event. The KL divergence of
these distributions is exact for tokenizers of up to 1,024 tokens. For larger ones it is a lower bound.
"""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoding import IGNORE_INDEX, encode_completion, encode_prompt, prepare_dataset
from ..data.rows import add_empty_answers, edit_answer, find_format, render
from ..models.byte_vocabulary import is_byte
from ..models.tokenization_coconut import CoconutTokenizer
from ..progress import LOOKING, phase
from ..training.recorder import context_length
from .generation import generate_answers, text_of_ids
from .own_text import first_tokens, write_text
from .predictions import Passage, predict
from .scores import upper_end_of_ratio


TOP_TOKENS = 1024
# Limits that make the measurement cheap: rows, windows of text, tokens per window and per answer. A window that the
# model writes itself is shorter, because writing takes more time than reading.
MAX_ROWS, MAX_WINDOWS, WINDOW_TOKENS, MAX_ANSWER_TOKENS, WRITTEN_TOKENS = 32, 32, 512, 512, 256
# No token covers so many characters on average. The rest of a long text is not tokenized.
_CHARACTERS_PER_TOKEN = 16

PASSED, WRITTEN = "passed", "written by the reference"
OTHER_VOCABULARY = (
    "The reference has a tokenizer with another vocabulary, so the two models cannot be compared. Pass the model that "
    "this one was made from."
)


class CoarseDistributions(NamedTuple):
    """
    The distributions of T tokens over their K most likely values, on the CPU.

    Attributes:
        token_ids (`torch.Tensor`):
            The most likely tokens, int32 of shape `(T, K)`.
        log_probs (`torch.Tensor`):
            Their log-probabilities in nats, float32 of shape `(T, K)`.
        rest (`torch.Tensor`):
            The log-probability of all other tokens together, float32 of shape `(T,)`.
    """

    token_ids: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor


@dataclass(frozen=True)
class RetentionReference:
    """
    What the reference model says on answers and on running text, see [`retention_reference`].

    It takes 8 KiB for each token, which is at most 256 MiB with the default limits.

    Attributes:
        answers (`list[tuple]`):
            A [`Passage`] with its [`CoarseDistributions`] for each answer.
        texts (`list[tuple]`):
            A [`Passage`] with its [`CoarseDistributions`] for each window of running text.
        text_log_likelihoods (`list[float]`):
            The natural logarithm of the probability of each window of running text.
        text_bytes (`int`):
            The number of bytes of the running text.
        text_source (`str`):
            `"passed"` or `"written by the reference"`.
        vocabulary (`str`):
            A hash of the tokenizer's tokens and ids.
    """

    answers: list[tuple[Passage, CoarseDistributions]]
    texts: list[tuple[Passage, CoarseDistributions]]
    text_log_likelihoods: list[float]
    text_bytes: int
    text_source: str
    vocabulary: str


@dataclass(frozen=True)
class Retention:
    """
    How much of a reference model's distribution a model has kept.

    Attributes:
        answer_kl (`float`, *optional*):
            KL(reference || model) in nats per token, the mean over the tokens of the answers. For tokenizers of more
            than 1,024 tokens, it is a lower bound. `None` if there are no answers.
        text_kl (`float`, *optional*):
            The same on running text. `None` if there is none.
        text_bits_per_byte (`float`):
            Bits that the model needs for each byte of the running text. NaN if the text has no bytes.
        reference_text_bits_per_byte (`float`):
            Bits that the reference needs for each byte.
        num_answer_tokens (`int`), num_text_tokens (`int`):
            Numbers of compared tokens.
        text_source (`str`):
            `"passed"` or `"written by the reference"`.
        answer_kl_high (`float`, *optional*), text_kl_high (`float`), text_bits_ratio_high (`float`):
            The upper ends of the 95 % intervals over the answers or windows, see [`upper_end_of_ratio`].
    """

    answer_kl: float | None
    text_kl: float | None
    text_bits_per_byte: float
    reference_text_bits_per_byte: float
    num_answer_tokens: int
    num_text_tokens: int
    text_source: str
    answer_kl_high: float | None
    text_kl_high: float
    text_bits_ratio_high: float

    @property
    def largest_kl(self) -> float:
        """
        The larger of the divergences on answers and on running text, in nats per token. Infinity if one is NaN, or if
        there are neither answers nor text.
        """
        known = [kl for kl in (self.answer_kl, self.text_kl) if kl is not None]
        return math.inf if any(map(math.isnan, known)) else max(known, default=math.inf)

    @property
    def text_bits_ratio(self) -> float:
        """Bits per byte of the running text, relative to the reference: 1 if nothing was forgotten."""
        reference = self.reference_text_bits_per_byte
        return self.text_bits_per_byte / reference if reference else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON-serializable values. NaN and infinity become `None`."""
        values = vars(self) | {"text_bits_ratio": self.text_bits_ratio}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


@phase(LOOKING)
def retention_reference(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | IterableDataset,
    text: Sequence[str] | Dataset | None = None,
    *,
    batch_size: int = 32,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    max_windows: int = MAX_WINDOWS,
    max_new_tokens: int = 128,
) -> RetentionReference:
    """
    Record what a model says on the answers of clean rows and on running text, to compare other models with it.

    The model is not changed and not needed any more afterwards.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The reference, usually the suspect.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        dataset (`Dataset` or `IterableDataset`):
            Clean rows in any of the formats of [`crow_hf.data`]. Rows without an answer are left out. If no row has an
            answer, the model's own greedy answers are used. Answers are cut to 512 tokens.
        text (`Sequence[str]` or `Dataset`, *optional*):
            Running text: texts, or rows with the column `text`. They are joined by line feeds, and cut into windows of
            at most 512 tokens or the model's context, of which the first `max_windows` are used. Defaults to
            `max_windows` texts of at most 256 tokens that the model writes itself, see [`write_text`].
        batch_size (`int`, *optional*, defaults to 32):
            Number of rows per batch. Batches of more than 4,096 tokens are split.
        seed (`int`, *optional*, defaults to 0):
            Seed for the texts that the model writes.
        max_rows (`int`, *optional*, defaults to 32):
            Number of rows, the first ones.
        max_windows (`int`, *optional*, defaults to 32):
            Number of windows of text. 0 leaves running text out.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Maximum number of tokens of the model's own greedy answers.

    Returns:
        [`RetentionReference`]

    Raises:
        `ValueError`: If `text` is empty, or a dataset without a column `text`.
    """
    rows = add_empty_answers(Dataset.from_list(list(islice(dataset.with_format(None), max_rows))))
    answers = _answers(model, tokenizer, rows, max_new_tokens, batch_size)
    if text is None:
        # A recipe may train on texts that the suspect wrote with the same seed.
        own_seed = int.from_bytes(hashlib.sha256(f"retention-{seed}".encode()).digest()[:4])
        options = WRITTEN_TOKENS, own_seed, batch_size
        written = write_text(model, tokenizer, max_windows, *options) if max_windows else []
        windows = [Passage(each.start + each.ids, len(each.start)) for each in written]
        num_bytes = sum(_count_bytes(each.ids, tokenizer) for each in written)
    else:
        windows, num_bytes = _windows(model, tokenizer, text, max_windows)
    answers, windows = (sorted(passages, key=lambda passage: len(passage.ids)) for passages in (answers, windows))
    coarse = [_coarse(logits, len(tokenizer)) for _, logits in predict(model, tokenizer, answers, batch_size)]
    log_likelihoods, coarse_of_text = [], []
    for passage, logits in predict(model, tokenizer, windows, batch_size):
        coarse_of_text.append(_coarse(logits, len(tokenizer)))
        log_likelihoods.append(_log_likelihood(passage, logits))
    return RetentionReference(
        answers=list(zip(answers, coarse, strict=True)),
        texts=list(zip(windows, coarse_of_text, strict=True)),
        text_log_likelihoods=log_likelihoods,
        text_bytes=num_bytes,
        text_source=WRITTEN if text is None else PASSED,
        vocabulary=_hash_of_vocabulary(tokenizer),
    )


def measure_retention(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: RetentionReference,
    batch_size: int = 32,
) -> Retention:
    """
    Measure how far a model's distribution has moved from that of the reference.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, such as the purified one.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        reference ([`RetentionReference`]):
            What the reference said.
        batch_size (`int`, *optional*, defaults to 32):
            Number of rows per batch.

    Returns:
        [`Retention`]

    Raises:
        `ValueError`: If the tokenizer has another vocabulary than that of the reference.
    """
    if _hash_of_vocabulary(tokenizer) != reference.vocabulary:
        raise ValueError(OTHER_VOCABULARY)
    answers, texts = ([passage for passage, _ in said] for said in (reference.answers, reference.texts))
    divergences, divergences_of_text, log_likelihoods = [], [], []
    predicted = predict(model, tokenizer, answers, batch_size)
    for (_, coarse), (_, logits) in zip(reference.answers, predicted, strict=True):
        divergences.append(_divergence(coarse, logits))
    predicted = predict(model, tokenizer, texts, batch_size)
    for (_, coarse), (passage, logits) in zip(reference.texts, predicted, strict=True):
        divergences_of_text.append(_divergence(coarse, logits))
        log_likelihoods.append(_log_likelihood(passage, logits))
    lengths, text_lengths = ([each.num_tokens for each in passages] for passages in (answers, texts))
    before = reference.text_log_likelihoods
    return Retention(
        # Rounding can make a sum of zeros negative. As the second argument of `max`, 0 does not hide a NaN.
        answer_kl=max(sum(divergences) / sum(lengths), 0.0) if lengths else None,
        text_kl=max(sum(divergences_of_text) / sum(text_lengths), 0.0) if text_lengths else None,
        text_bits_per_byte=_bits_per_byte(sum(log_likelihoods), reference.text_bytes),
        reference_text_bits_per_byte=_bits_per_byte(sum(before), reference.text_bytes),
        num_answer_tokens=sum(lengths),
        num_text_tokens=sum(text_lengths),
        text_source=reference.text_source,
        answer_kl_high=upper_end_of_ratio(divergences, lengths) if lengths else None,
        text_kl_high=upper_end_of_ratio(divergences_of_text, text_lengths),
        text_bits_ratio_high=upper_end_of_ratio(log_likelihoods, before) if sum(before) else math.nan,
    )


def check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase) -> None:
    """
    Check that the distributions of two models can be compared.

    Raises:
        `ValueError`: If their tokenizers have different vocabularies.
    """
    if tokenizer.get_vocab() != reference.get_vocab():
        raise ValueError(OTHER_VOCABULARY)


def _answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    max_new_tokens: int,
    batch_size: int,
) -> list[Passage]:
    """Return the answers of rows after their prompts, or the model's own answers if no row has one."""
    limit = context_length(model)
    if find_format(rows.column_names) == "tokens":
        encoded = prepare_dataset(rows, None, limit or sys.maxsize, "dataset")
        # The labels of a row are taken as one answer, from the first of them to the last.
        labelled = [[place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX] for row in encoded]
        return [_cut(row["input_ids"][: p[-1] + 1], p[0], limit) for row, p in zip(encoded, labelled, strict=True)]
    rendered = [render(row, tokenizer, index) for index, row in enumerate(rows)]
    if not any(row.answer for row in rendered):
        longest = (limit or math.inf) - max_new_tokens
        numbers = [n for n, row in enumerate(rendered) if 0 < len(encode_prompt(row, tokenizer)) <= longest]
        prompts = [rendered[number] for number in numbers]
        outputs = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size) if prompts else []
        answered = [
            rows[number] | edit_answer(rows[number], partial(_replaced, by=output))
            for number, output in zip(numbers, outputs, strict=True)
        ]
        rendered = [render(row, tokenizer) for row in answered]
    passages = []
    for row in rendered:
        prompt = encode_prompt(row, tokenizer)
        if row.answer and (limit is None or len(prompt) < limit):
            passages.append(_cut(prompt + encode_completion(row, tokenizer), len(prompt), limit))
    return [passage for passage in passages if passage.num_tokens > 0]


def _replaced(answer: str, by: str) -> str:
    return by


def _cut(ids: list[int], first: int, limit: int | None) -> Passage:
    # Nothing predicts the first token of all.
    first = max(1, first)
    return Passage(ids[: min(limit or sys.maxsize, first + MAX_ANSWER_TOKENS)], first)


def _windows(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[str] | Dataset,
    max_windows: int,
) -> tuple[list[Passage], int]:
    """Cut text into windows, each of which begins with the start token, and count their bytes together."""
    if isinstance(text, Dataset):
        if "text" not in text.column_names:
            raise ValueError(f"Running text needs the column `text`, but the rows have {sorted(text.column_names)}.")
        text = text["text"]
    if isinstance(text, str):
        raise ValueError("`text` takes several texts, or a Dataset: put a single one into a list.")
    stream, longest = "", max_windows * WINDOW_TOKENS * _CHARACTERS_PER_TOKEN
    for part in text:
        stream += f"\n{part}" if stream else part
        if len(stream) >= longest:
            break
    if not stream.strip():
        raise ValueError("The running text is empty: pass at least one text that is not.")
    whole, start = stream, first_tokens(tokenizer)
    ids = list(tokenizer(whole[:longest], add_special_tokens=False)["input_ids"])
    size = min(WINDOW_TOKENS, context_length(model) or WINDOW_TOKENS) - len(start)
    used = ids[: max_windows * size]
    num_bytes = len(whole.encode()) if len(used) == len(ids) else _count_bytes(used, tokenizer)
    return [Passage(start + used[at : at + size], len(start)) for at in range(0, len(used), size)], num_bytes


def _count_bytes(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the bytes of the text that token ids stand for. Special tokens have none."""
    if isinstance(tokenizer, CoconutTokenizer):
        return int(is_byte(torch.tensor(ids)).sum())
    # The bytes of a cut character are decoded to one replacement character of three bytes.
    return len(text_of_ids(ids, tokenizer).replace("\ufffd", "?").encode())


def _log_likelihood(passage: Passage, logits: torch.Tensor) -> float:
    labels = torch.tensor(passage.ids[passage.first :], device=logits.device)
    return -cross_entropy(logits, labels, reduction="none").cpu().double().sum().item()


def _coarse(logits: torch.Tensor, num_tokens: int) -> CoarseDistributions:
    """
    Keep the most likely tokens of distributions.

    Args:
        logits (`torch.Tensor`):
            Shape `(T, V)`.
        num_tokens (`int`):
            The number of tokens of the tokenizer. Models may have more ids, whose number can differ between two models
            with the same tokenizer. They always belong to the rest.
    """
    known = logits[:, :num_tokens]
    token_ids = known.topk(min(TOP_TOKENS, known.shape[1])).indices
    return CoarseDistributions(token_ids.int().cpu(), *_grouped(logits, token_ids))


def _grouped(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of some tokens `(T, K)`, and that of all others together `(T,)`, on the CPU."""
    normalizer = logits.logsumexp(-1)
    others = logits.scatter(1, token_ids, -math.inf).logsumexp(-1)
    return (logits.gather(1, token_ids) - normalizer[:, None]).cpu(), (others - normalizer).cpu()


def _divergence(coarse: CoarseDistributions, logits: torch.Tensor) -> float:
    """Sum KL(reference || model) over the tokens, in nats."""
    log_q, rest_q = _grouped(logits, coarse.token_ids.long().to(logits.device))
    log_p = torch.cat([coarse.log_probs, coarse.rest[:, None]], dim=1).double()
    log_q = torch.cat([log_q, rest_q[:, None]], dim=1).double()
    terms = log_p.exp() * (log_p - log_q)
    # An event that the reference excludes costs nothing. There is no rest if all tokens are kept.
    return terms.where(log_p > -math.inf, 0.0).sum().item()


def _bits_per_byte(log_likelihood: float, num_bytes: int) -> float:
    return -log_likelihood / math.log(2) / num_bytes if num_bytes else math.nan


def _hash_of_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
