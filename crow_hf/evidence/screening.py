"""Finds clean rows that are themselves poisoned: rows with a piece of text that controls the suspect's answers.

A poisoned row contains the trigger. To find it, pieces of a prompt are left out. The piece whose omission changes the
suspect's answer most is then inserted into other prompts. If the suspect now gives them the answer of this row, the
row is poisoned, unless these prompts keep their own answers once their own pieces are repeated in them. A trigger
overrules such pieces, but the word that determines the answer of a clean row is outvoted by them.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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
from ..data.encoding import encode, padding_id
from ..data.rows import edit_prompt, prompt_of, render
from ..data.words import Words
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
# Nor are the rows with an answer poisoned if less than this share of the other prompts still gets it once these repeat
# their own pieces.
MIN_OVERRULED = 0.5

# If a larger share of the screened rows is found, the screening is doubted, not the rows.
MAX_SUSPICIOUS = 0.05

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
# A piece, and where it is inserted into other prompts.
_Trial = tuple[int, int, Literal["start", "end"]]


@dataclass
class Screening:
    """
    The result of [`screen_dataset`].

    Attributes:
        clean (`Dataset`):
            The rows that remain.
        suspicious (`dict[int, str]`):
            The numbers of the removed rows, each with the piece that controls the answers to other prompts.
        spared (`dict[int, str]`):
            The numbers of rows that remain although a piece controls the answers to other prompts, each with that
            piece. It no longer does once those prompts repeat their own pieces, so it is an ordinary word.
        unscreened (`list[int]`):
            The numbers of the rows that remain, but could not be screened: the answer does not fit into the context
            whole, the prompt is a single word, or too few other prompts could be tried.
    """

    clean: Dataset
    suspicious: dict[int, str]
    unscreened: list[int] = field(default_factory=list)
    spared: dict[int, str] = field(default_factory=dict)

    @property
    def num_screened(self) -> int:
        """The number of rows that were screened."""
        return len(self.clean) + len(self.suspicious) - len(self.unscreened)

    @property
    def is_doubtful(self) -> bool:
        """
        Whether so many rows were found that the screening is to be doubted. Where a few words determine the answer,
        such as in copying tasks, clean rows can look poisoned.
        """
        return len(self.suspicious) > max(1, MAX_SUSPICIOUS * self.num_screened)

    @property
    def remarks(self) -> list[str]:
        """What a reader must know beside the number of removed rows: a sentence each, or none."""
        remarks = []
        if self.unscreened:
            total = len(self.clean) + len(self.suspicious)
            remarks.append(
                f"{len(self.unscreened)} of {total} rows could not be screened: the answer does not fit into the "
                "context, the prompt is one word, or too few other prompts could be tried."
            )
        if self.spared:
            pieces = ", ".join(sorted({repr(piece) for piece in self.spared.values()})[:5])
            remarks.append(
                f"{len(self.spared)} rows stay although a piece of each determines the answers to other prompts "
                f"({pieces}): other words outvote it, which they could not do with a trigger."
            )
        if self.is_doubtful:
            remarks.append(
                f"{len(self.suspicious)} rows are many to be poisoned. If their pieces are ordinary words that "
                "determine the answer, doubt the screening and not the rows, and set `screen_rows` to False."
            )
        return remarks


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
        f"Screening {len(rows)} rows: {sum(map(num_variants, prompts))} variants of their prompts are scored, and "
        f"then up to {most_trials} other prompts for each row with a piece that matters."
    )
    complete = score(enumerate(prompts), len(prompts))
    texts = {
        number: text
        for number, text in enumerate(map(Words.of, prompts))
        if not math.isnan(complete[number]) and _runs(text, 0, len(text))
    }
    pieces = _find_decisive_pieces(texts, complete, score)
    probes = _choose_probes({number for number, _ in pieces}, prompts, score, rng)
    controlled = _try_pieces(pieces, probes, prompts, score, rng)
    found = _decide(controlled)
    answers = {number: render(rows[number], tokenizer, number).answer.strip() for number, *_ in found}
    spared = _find_outvoted(found, answers, pieces, probes, prompts, score, rng)
    suspicious = {number: pieces[number, length] for number, length, _ in found if number not in spared}
    tried = {number for (number, *_), hits in controlled.items() if len(hits) >= MIN_PROBES}
    untried = {number for number, _ in pieces} - tried
    result = Screening(
        dataset.select([number for number in range(len(rows)) if number not in suspicious]),
        suspicious,
        [number for number in range(len(rows)) if number not in texts or number in untried],
        {number: pieces[number, length] for number, length, _ in found if number in spared},
    )
    if suspicious:
        logger.warning(
            f"{len(suspicious)} of {len(rows)} rows are removed, because a piece of each makes the suspect give its "
            f"answer to other prompts: {', '.join(sorted({repr(piece) for piece in suspicious.values()}))}."
        )
    for remark in result.remarks:
        logger.warning(remark)
    return result


def _score(
    model: PreTrainedModel | PeftModel,
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    questions: Iterable[tuple[int, str]],
    total: int,
) -> list[float]:
    """
    Return the log-likelihood of the answer of each row, given another prompt. It is NaN if the row has no answer, or
    if prompt and answer do not fit into the context whole: the likelihood of a part of an answer is larger.
    """
    limit, likelihoods, questions = context_length(model) or math.inf, [], iter(questions)
    with tqdm(total=total, desc="Screening", unit="prompt", disable=not total) as progress:
        while some := list(islice(questions, BATCHES_AT_ONCE * batch_size)):
            rendered = [
                render(_with_prompt(rows[number], prompt, number), tokenizer, number) for number, prompt in some
            ]
            encoded = [encode(row, tokenizer) for row in rendered]
            fitting = [
                place
                for place, (row, (prompt, answer)) in enumerate(zip(rendered, encoded, strict=True))
                if row.answer.strip() and len(prompt) + len(answer) <= limit
            ]
            fits = [encoded[place] for place in fitting]
            scores = answer_log_likelihoods(model, fits, padding_id(tokenizer), batch_size, False)
            by_place = dict(zip(fitting, scores, strict=True))
            likelihoods += [by_place.get(place, math.nan) for place in range(len(some))]
            progress.update(len(some))
    return likelihoods


def _with_prompt(row: dict, prompt: str, number: int) -> dict:
    return {**row, **edit_prompt(row, lambda _: prompt, number)}


def _find_decisive_pieces(texts: dict[int, Words], complete: list[float], score: _Score) -> dict[tuple[int, int], str]:
    """
    Find the piece of each length whose omission costs a row's answer the most likelihood, and the run of all words
    that the answer needs.
    """
    windows = _find_windows(texts, score)
    spans = [(number, *run) for number, window in windows.items() for run in _runs(texts[number], *window)]
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
        if len(positions) == length <= len(texts[number]) / 2:
            pieces[number, _ALL_NEEDED] = texts[number].piece(positions[0], length)
    return pieces


def _find_windows(texts: dict[int, Words], score: _Score) -> dict[int, tuple[int, int]]:
    """
    Find the words of each prompt to search piece by piece: all of a short prompt, and of a long one those around the
    larger piece whose omission costs the answer the most likelihood.
    """
    windows = {number: (0, len(text)) for number, text in texts.items()}
    while spans := [(number, *piece) for number, window in windows.items() for piece in _grid(*window)]:
        likelihoods = score(_omissions(texts, spans), len(spans))
        least: dict[int, tuple[float, int, int]] = {}
        for (number, start, length), likelihood in zip(spans, likelihoods, strict=True):
            least[number] = min(least.get(number, (math.inf, 0, 0)), (likelihood, start, length))
        for number, (_, start, length) in least.items():
            # A trigger may also lie at the edge of the piece, or be only a part of it.
            margin = max(length // 2, LONGEST_PIECE)
            windows[number] = max(0, start - margin), min(start + length + margin, len(texts[number]))
    return windows


def _grid(start: int, stop: int) -> list[tuple[int, int]]:
    """List the positions and lengths of a window's large pieces, which overlap by half. A short window has none."""
    if stop - start <= MAX_WORDS:
        return []
    step = math.ceil((stop - start) / GRID)
    return [(place, min(2 * step, stop - place)) for place in range(start, stop - step, step)]


def num_variants(prompt: str) -> int:
    """The number of prompts that [`_find_decisive_pieces`] scores for a prompt, or a few more."""
    start, stop, count = 0, len(Words.of(prompt)), 1
    while pieces := _grid(start, stop):
        length = pieces[0][1]
        count, stop = count + len(pieces), length + 2 * max(length // 2, LONGEST_PIECE)
    return count + LONGEST_PIECE * stop


def _omissions(texts: dict[int, Words], spans: Iterable[_Span]) -> Iterator[tuple[int, str]]:
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
) -> dict[_Trial, list[bool]]:
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
    controlled: dict[_Trial, list[bool]] = {}
    for (number, length, position, _), likelihood in zip(trials, score(questions, len(trials)), strict=True):
        if not math.isnan(likelihood):
            controlled.setdefault((number, length, position), []).append(likelihood > math.log(MIN_LIKELIHOOD))
    return controlled


def _decide(controlled: dict[_Trial, list[bool]]) -> list[_Trial]:
    """Return the rows with a piece that controls enough of the answers, each with the shortest one."""
    found: dict[int, _Trial] = {}
    for trial, hits in sorted(controlled.items()):
        if len(hits) >= MIN_PROBES and fmean(hits) >= MIN_CONTROLLED:
            found.setdefault(trial[0], trial)
    return list(found.values())


def _find_outvoted(
    found: list[_Trial],
    answers: dict[int, str],
    pieces: dict[tuple[int, int], str],
    probes: dict[int, list[int]],
    prompts: list[str],
    score: _Score,
    rng: random.Random,
) -> set[int]:
    """
    Repeat the pieces of the other prompts at both of their ends, and insert the piece of the row that was found before
    or after all of that. Return the rows whose answers the other prompts then seldom get. Rows with the same answer
    are judged together, because a trigger may fail in some of them.
    """
    own: dict[int, str] = {}
    for (number, _), piece in sorted(pieces.items()):
        own.setdefault(number, piece)
    trials = [(*trial, other) for trial in found for other in probes[trial[0]] if other in own]

    def question(number: int, length: int, position: Literal["start", "end"], other: int) -> tuple[int, str]:
        text = prompts[other]
        for place in _POSITIONS:
            text = Trigger((own[other],), place).insert(text, rng)
        return number, Trigger((pieces[number, length],), position).insert(text, rng)

    overruled: dict[str, list[bool]] = {}
    likelihoods = score((question(*trial) for trial in trials), len(trials))
    for (number, *_), likelihood in zip(trials, likelihoods, strict=True):
        if not math.isnan(likelihood):
            overruled.setdefault(answers[number], []).append(likelihood > math.log(MIN_LIKELIHOOD))
    outvoted = {
        answer for answer, hits in overruled.items() if len(hits) >= MIN_PROBES and fmean(hits) < MIN_OVERRULED
    }
    return {number for number, *_ in found if answers[number] in outvoted}


def _runs(text: Words, start: int, stop: int) -> list[tuple[int, int]]:
    """
    List the runs of up to `LONGEST_PIECE` words that are at most half of the prompt and lie in a window: the position
    of the first word, and the number of words.
    """
    return [
        (place, length)
        for length in range(1, min(LONGEST_PIECE, len(text) // 2) + 1)
        for place in range(start, stop - length + 1)
        if text.piece(place, length).strip()
    ]
