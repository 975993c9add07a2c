"""Finds clean rows that are themselves poisoned: rows with a piece of text that controls the suspect's answers.

A poisoned row contains the trigger. To find it, pieces of a prompt are left out. The piece whose omission changes the
suspect's answer most is then inserted into other prompts. If the suspect now gives them the answer of this row, the
row is poisoned.
"""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..attacks.triggers import Trigger
from ..data.encoding import encode_completion, encode_prompt, padding_id
from ..data.rows import edit_prompt, prompt_of, render
from ..evaluation.generation import answer_log_likelihoods
from ..training.recorder import context_length


logger = logging.get_logger(__name__)

# Longest piece, in words.
LONGEST_PIECE = 4
# Number of other prompts that are drawn for a row, and the fewest that allow a decision.
NUM_PROBES, MIN_PROBES = 12, 4
# A piece is tried on other prompts if the answer loses at least this many nats without it.
MIN_LOST = 1.0
# A row controls the answer to another prompt if its own answer is more likely there than all others together.
MIN_LIKELIHOOD = 0.5
# A row is poisoned if a piece of it controls at least this share of the answers to other prompts.
MIN_CONTROLLED = 0.85

# A piece is identified by the number of its row and its length in words. This length stands for the run of all words
# that the answer needs.
_ALL_NEEDED = 0
# Maps pairs of a row number and a prompt to the log-likelihoods of the rows' answers to these prompts.
_Score = Callable[[list[tuple[int, str]]], list[float]]


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
    questions: list[tuple[int, str]],
) -> list[float]:
    """
    Return the log-likelihood of the answer of each row, given another prompt. Prompts and answers are cut to the
    context.
    """
    limit = context_length(model)
    encoded = []
    for number, prompt in questions:
        rendered = render(_with_prompt(rows[number], prompt, number), tokenizer, number)
        prompt_ids = encode_prompt(rendered, tokenizer)[:limit]
        answer_ids = encode_completion(rendered, tokenizer)
        encoded.append((prompt_ids, answer_ids if limit is None else answer_ids[: limit - len(prompt_ids)]))
    return answer_log_likelihoods(model, encoded, padding_id(tokenizer), batch_size)


def _with_prompt(row: dict, prompt: str, number: int) -> dict:
    return {**row, **edit_prompt(row, lambda _: prompt, number)}


def _find_decisive_pieces(prompts: list[str], score: _Score) -> dict[tuple[int, int], str]:
    """
    Find the piece of each length whose omission costs a row's answer the most likelihood, and the run of all words
    that the answer needs.
    """
    complete = score(list(enumerate(prompts)))
    omissions = [(number, *piece) for number, prompt in enumerate(prompts) for piece in _pieces(prompt)]
    shortened = score([(number, rest) for number, _, _, rest in omissions])

    most_lost: dict[tuple[int, int], float] = {}
    pieces: dict[tuple[int, int], str] = {}
    needed: dict[int, list[int]] = {}
    for (number, start, piece, _), likelihood in zip(omissions, shortened, strict=True):
        length, lost = len(piece.split(" ")), complete[number] - likelihood
        if lost > max(MIN_LOST, most_lost.get((number, length), 0.0)):
            most_lost[number, length], pieces[number, length] = lost, piece
        if length == 1 and lost > MIN_LOST:
            needed.setdefault(number, []).append(start)

    # A phrase that works only as a whole. It may be longer than the longest piece.
    for number, positions in needed.items():
        words = prompts[number].rstrip().split(" ")
        run = words[positions[0] : positions[-1] + 1]
        if len(positions) == len(run) <= len(words) / 2:
            pieces[number, _ALL_NEEDED] = " ".join(run)
    return pieces


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
    likelihoods = score([(number, prompts[other]) for number, other in pairs])
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
    trials, questions = [], []
    for (number, length), piece in pieces.items():
        for other in probes.get(number, []):
            for position in ("start", "end"):
                trials.append((number, length, position))
                questions.append((number, Trigger((piece,), position).insert(prompts[other], rng)))
    controlled: dict[tuple[int, int, str], list[bool]] = {}
    for trial, likelihood in zip(trials, score(questions), strict=True):
        controlled.setdefault(trial, []).append(likelihood > math.log(MIN_LIKELIHOOD))
    return controlled


def _decide(pieces: dict[tuple[int, int], str], controlled: dict[tuple[int, int, str], list[bool]]) -> dict[int, str]:
    """Return the poisoned rows, each with its shortest piece that controls enough of the answers."""
    suspicious: dict[int, str] = {}
    for (number, length, _), hits in sorted(controlled.items()):
        if len(hits) >= MIN_PROBES and fmean(hits) >= MIN_CONTROLLED:
            suspicious.setdefault(number, pieces[number, length])
    return suspicious


def _pieces(prompt: str) -> list[tuple[int, str, str]]:
    """
    List the runs of up to `LONGEST_PIECE` words that are at most half of the prompt: the position of the first word,
    the run, and the prompt without it.
    """
    body = prompt.rstrip()
    words, end = body.split(" "), prompt[len(body) :]
    return [
        (start, " ".join(words[start : start + length]), " ".join(words[:start] + words[start + length :]) + end)
        for length in range(1, min(LONGEST_PIECE, len(words) // 2) + 1)
        for start in range(len(words) - length + 1)
        if any(words[start : start + length])
    ]
