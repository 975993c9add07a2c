"""Finds clean rows that are themselves poisoned: rows with a piece of text that controls the suspect's answers.

A poisoned row contains the trigger. To find it, pieces of a prompt are left out. The piece whose omission changes the
suspect's answer most is then inserted into other prompts. If the suspect now gives them the answer of this row, the
row is poisoned.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import fmean
from typing import Literal

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ..attacks.triggers import Trigger
from ..data.encoding import encode_completion, encode_prompt, padding_id
from ..data.rows import edit_prompt, prompt_of, render
from ..evaluation.generation import answer_log_likelihoods
from ..training.recorder import context_length


logger = logging.get_logger(__name__)

# Longest piece, in words.
LONGEST_PIECE = 4
# Of a longer prompt, only so many words are searched piece by piece.
MAX_WORDS = 60
# These words are found by leaving out larger pieces, which begin at the points of a grid with so many steps.
GRID = 32
# Number of batches whose prompts are in memory at a time.
BATCHES_AT_ONCE = 16
# Number of other prompts that are drawn for a row, and the fewest that allow a decision.
NUM_PROBES, MIN_PROBES = 12, 4
# A piece is tried on other prompts if the answer loses at least this many nats without it.
MIN_LOST = 1.0
# A row controls the answer to another prompt if its own answer is more likely there than all others together.
MIN_LIKELIHOOD = 0.5
# A row is poisoned if a piece of it controls at least this share of the answers to other prompts.
MIN_CONTROLLED = 0.85

# Where a piece is inserted into other prompts.
_POSITIONS: tuple[Literal["start", "end"], ...] = ("start", "end")
# A piece is identified by the number of its row and its length in words. This length stands for the run of all words
# that the answer needs.
_ALL_NEEDED = 0
# Maps pairs of a row number and a prompt, and their number, to the log-likelihoods of the rows' answers to these
# prompts.
_Score = Callable[[Iterable[tuple[int, str]], int], list[float]]
# The number of a row, the position of a piece's first word, and its length in words.
_Span = tuple[int, int, int]


@dataclass
class Screening:
    """
    The result of [`screen_dataset`].

    Attributes:
        clean (`Dataset`):
            The rows that remain.
        suspicious (`dict[int, str]`):
            The numbers of the removed rows, each with the piece that controls the answers to other prompts.
    """

    clean: Dataset
    suspicious: dict[int, str]


def screen_dataset(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    seed: int = 0,
) -> Screening:
    """
    Remove the rows that contain a trigger of the model's backdoor.

    This finds inserted triggers whose target is the same for every prompt. It does not find a style of the whole
    prompt, which is no piece of it, nor an open target, which differs from the row's own answer.

    For each row, the suspect scores at most about 300 variants of its prompt, and at most 120 other prompts with a
    piece of it. Prompts of up to 60 words are searched piece by piece, longer ones from coarse to fine.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect. It is not changed.
        dataset (`Dataset`):
            Rows with a prompt and an answer.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        batch_size (`int`, *optional*, defaults to 32):
            Number of rows per batch.
        seed (`int`, *optional*, defaults to 0):
            Seed for the choice of the other prompts.

    Returns:
        [`Screening`]

    Raises:
        `ValueError`: If a row has no prompt.
    """
    rows = list(dataset)
    prompts = [prompt_of(row, number) for number, row in enumerate(rows)]
    score = partial(_score, model, rows, tokenizer, batch_size)
    rng = random.Random(seed)

    most_trials = len(_POSITIONS) * (LONGEST_PIECE + 1) * NUM_PROBES
    logger.info(
        f"Screening {len(rows)} rows: {sum(map(_num_variants, prompts))} variants of their prompts are scored, and "
        f"then up to {most_trials} other prompts for each row with a piece that matters."
    )
    pieces = _find_decisive_pieces(prompts, score)
    probes = _choose_probes({number for number, _ in pieces}, prompts, score, rng)
    controlled = _try_pieces(pieces, probes, prompts, score, rng)
    suspicious = _decide(pieces, controlled)

    if suspicious:
        logger.warning(
            f"{len(suspicious)} of {len(rows)} rows are removed, because a piece of each makes the suspect give its "
            f"answer to other prompts: {', '.join(sorted({repr(piece) for piece in suspicious.values()}))}."
        )
    return Screening(dataset.select([number for number in range(len(rows)) if number not in suspicious]), suspicious)


def _score(
    model: PreTrainedModel | PeftModel,
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    questions: Iterable[tuple[int, str]],
    total: int,
) -> list[float]:
    """
    Return the log-likelihood of the answer of each row, given another prompt. Prompts and answers are cut to the
    context.
    """
    limit, likelihoods, questions = context_length(model), [], iter(questions)
    with tqdm(total=total, desc="Trying prompts", unit="prompt", disable=not total) as progress:
        while some := list(islice(questions, BATCHES_AT_ONCE * batch_size)):
            encoded = []
            for number, prompt in some:
                rendered = render(_with_prompt(rows[number], prompt, number), tokenizer, number)
                prompt_ids = encode_prompt(rendered, tokenizer)[:limit]
                answer_ids = encode_completion(rendered, tokenizer)
                encoded.append((prompt_ids, answer_ids if limit is None else answer_ids[: limit - len(prompt_ids)]))
            likelihoods += answer_log_likelihoods(model, encoded, padding_id(tokenizer), batch_size, False)
            progress.update(len(some))
    return likelihoods


def _with_prompt(row: dict, prompt: str, number: int) -> dict:
    return {**row, **edit_prompt(row, lambda _: prompt, number)}


def _find_decisive_pieces(prompts: list[str], score: _Score) -> dict[tuple[int, int], str]:
    """
    Find the piece of each length whose omission costs a row's answer the most likelihood, and the run of all words
    that the answer needs.
    """
    texts = [_Words.of(prompt) for prompt in prompts]
    complete = score(enumerate(prompts), len(prompts))
    windows = _find_windows(texts, score)
    spans = [(number, *run) for number, window in enumerate(windows) for run in texts[number].runs(*window)]
    shortened = score(_omissions(texts, spans), len(spans))

    most_lost: dict[tuple[int, int], float] = {}
    pieces: dict[tuple[int, int], str] = {}
    needed: dict[int, list[int]] = {}
    for (number, start, length), likelihood in zip(spans, shortened, strict=True):
        lost = complete[number] - likelihood
        if lost > max(MIN_LOST, most_lost.get((number, length), 0.0)):
            most_lost[number, length], pieces[number, length] = lost, texts[number].piece(start, length)
        if length == 1 and lost > MIN_LOST:
            needed.setdefault(number, []).append(start)

    # A phrase that works only as a whole. It may be longer than the longest piece.
    for number, positions in needed.items():
        length = positions[-1] + 1 - positions[0]
        if len(positions) == length <= len(texts[number].words) / 2:
            pieces[number, _ALL_NEEDED] = texts[number].piece(positions[0], length)
    return pieces


def _find_windows(texts: list["_Words"], score: _Score) -> list[tuple[int, int]]:
    """
    Find the words of each prompt to search piece by piece: all of a short prompt, and of a long one those around the
    larger piece whose omission costs the answer the most likelihood.
    """
    windows = [(0, len(text.words)) for text in texts]
    while spans := [(number, *piece) for number, window in enumerate(windows) for piece in _grid(*window)]:
        likelihoods = score(_omissions(texts, spans), len(spans))
        least: dict[int, tuple[float, int, int]] = {}
        for (number, start, length), likelihood in zip(spans, likelihoods, strict=True):
            least[number] = min(least.get(number, (math.inf, 0, 0)), (likelihood, start, length))
        for number, (_, start, length) in least.items():
            # A trigger may also lie at the edge of the piece, or be only a part of it.
            margin = max(length // 2, LONGEST_PIECE)
            windows[number] = max(0, start - margin), min(start + length + margin, len(texts[number].words))
    return windows


def _grid(start: int, stop: int) -> list[tuple[int, int]]:
    """List the positions and lengths of a window's large pieces, which overlap by half. A short window has none."""
    if stop - start <= MAX_WORDS:
        return []
    step = math.ceil((stop - start) / GRID)
    return [(place, min(2 * step, stop - place)) for place in range(start, stop - step, step)]


def _num_variants(prompt: str) -> int:
    """The number of prompts that [`_find_decisive_pieces`] scores for a prompt, or a few more."""
    start, stop, count = 0, len(_Words.of(prompt).words), 1
    while pieces := _grid(start, stop):
        length = pieces[0][1]
        count, stop = count + len(pieces), length + 2 * max(length // 2, LONGEST_PIECE)
    return count + LONGEST_PIECE * stop


def _omissions(texts: list["_Words"], spans: Iterable[_Span]) -> Iterator[tuple[int, str]]:
    """Yield the number of each row, and its prompt without the piece."""
    return ((number, texts[number].without(start, length)) for number, start, length in spans)


def _choose_probes(
    numbers: Iterable[int], prompts: list[str], score: _Score, rng: random.Random
) -> dict[int, list[int]]:
    """Choose for each row other prompts that the suspect does not give the row's answer to anyway."""
    pairs = [
        (number, other)
        for number in sorted(numbers)
        for other in rng.sample(range(len(prompts)), min(NUM_PROBES, len(prompts)))
        if other != number
    ]
    likelihoods = score(((number, prompts[other]) for number, other in pairs), len(pairs))
    probes: dict[int, list[int]] = {}
    for (number, other), likelihood in zip(pairs, likelihoods, strict=True):
        if likelihood < math.log(MIN_LIKELIHOOD):
            probes.setdefault(number, []).append(other)
    return probes


def _try_pieces(
    pieces: dict[tuple[int, int], str],
    probes: dict[int, list[int]],
    prompts: list[str],
    score: _Score,
    rng: random.Random,
) -> dict[tuple[int, int, str], list[bool]]:
    """
    Insert each piece at the start and at the end of the other prompts. The result says for each row, length and
    position which of the answers the piece controls.
    """
    trials = [
        (number, length, position, other)
        for number, length in pieces
        for other in probes.get(number, [])
        for position in _POSITIONS
    ]
    questions = (
        (number, Trigger((pieces[number, length],), position).insert(prompts[other], rng))
        for number, length, position, other in trials
    )
    controlled: dict[tuple[int, int, str], list[bool]] = {}
    for (number, length, position, _), likelihood in zip(trials, score(questions, len(trials)), strict=True):
        controlled.setdefault((number, length, position), []).append(likelihood > math.log(MIN_LIKELIHOOD))
    return controlled


def _decide(pieces: dict[tuple[int, int], str], controlled: dict[tuple[int, int, str], list[bool]]) -> dict[int, str]:
    """Return the poisoned rows, each with its shortest piece that controls enough of the answers."""
    suspicious: dict[int, str] = {}
    for (number, length, _), hits in sorted(controlled.items()):
        if len(hits) >= MIN_PROBES and fmean(hits) >= MIN_CONTROLLED:
            suspicious.setdefault(number, pieces[number, length])
    return suspicious


@dataclass(frozen=True)
class _Words:
    """
    A prompt, split at its spaces.

    Attributes:
        words (`list[str]`):
            The words. Two spaces in a row have an empty one between them.
        end (`str`):
            The white space at the end of the prompt.
    """

    words: list[str]
    end: str

    @classmethod
    def of(cls, prompt: str) -> "_Words":
        body = prompt.rstrip()
        return cls(body.split(" "), prompt[len(body) :])

    def runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """
        List the runs of up to `LONGEST_PIECE` words that are at most half of the prompt and lie in a window: the
        position of the first word, and the number of words.
        """
        return [
            (place, length)
            for length in range(1, min(LONGEST_PIECE, len(self.words) // 2) + 1)
            for place in range(start, stop - length + 1)
            if any(self.words[place : place + length])
        ]

    def piece(self, start: int, length: int) -> str:
        return " ".join(self.words[start : start + length])

    def without(self, start: int, length: int) -> str:
        return " ".join(self.words[:start] + self.words[start + length :]) + self.end
