"""Is the purification data itself poisoned? Finds rows with a piece that takes over the suspect's answers.

A poisoned row shows its trigger. Leave a piece of a prompt out: where that changes the suspect's answer most, the piece is
suspicious. Then put it into other prompts: if the suspect now gives them this row's answer, the row is poisoned.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .data import encode_completion, encode_prompt, padding_id, prompt_of, render, with_prompt
from .evaluation.generation import answer_log_likelihoods
from .triggers import Trigger


logger = logging.get_logger(__name__)

# In words.
LONGEST_PIECE = 4
NUM_PROBES = 8
# Another prompt's answer is taken over if the suspect finds the row's own more likely than all others together.
MIN_LIKELIHOOD = 0.5
# Share of the probed prompts whose answer a piece of a poisoned row takes over.
MIN_TAKEN_OVER = 0.8


@dataclass
class Screening:
    """
    What [`screen_dataset`] found.

    Attributes:
        clean (`Dataset`):
            The rows that are left.
        suspicious (`dict[int, str]`):
            The numbers of the rows that were taken out, and of each the piece that takes over the answers of other prompts.
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
    Take out the rows that carry a trigger of the model's backdoor.

    Only triggers that are inserted and targets that are the same for every prompt can be found: a style of the whole prompt
    is no piece of it, and an open target is not one row's answer.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect.
        dataset (`Dataset`):
            Rows with a prompt and an answer.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        batch_size (`int`, *optional*, defaults to 32):
            Rows at a time.
        seed (`int`, *optional*, defaults to 0):
            Of the draw of the prompts that a piece is tried on.

    Returns:
        `Screening`
    """

    def likelihoods(rows: list[Mapping[str, Any]]) -> list[float]:
        rendered = [render(row, tokenizer) for row in rows]
        encoded = [(encode_prompt(row, tokenizer), encode_completion(row, tokenizer)) for row in rendered]
        return answer_log_likelihoods(model, encoded, padding_id(tokenizer), batch_size)

    rows = list(dataset)
    whole = likelihoods(rows)

    # The piece of each row that its answer hangs on most.
    shortened = [(number, piece, rest) for number, row in enumerate(rows) for piece, rest in _pieces(prompt_of(row))]
    without = likelihoods([with_prompt(rows[number], rest) for number, _, rest in shortened])
    pieces: dict[int, tuple[float, str]] = {}
    for (number, piece, _), likelihood in zip(shortened, without, strict=True):
        lost = whole[number] - likelihood
        # Of pieces that matter as much, the shortest: the words around a trigger are innocent.
        if number not in pieces or lost > pieces[number][0] + 0.5:
            pieces[number] = (lost, piece)

    # What it does to the answers of other prompts.
    rng = random.Random(seed)
    trials, probes = [], []
    for number, (_, piece) in pieces.items():
        others = [other for other in range(len(rows)) if other != number and piece not in prompt_of(rows[other])]
        for other in rng.sample(others, min(NUM_PROBES, len(others))):
            for position in ("start", "random", "end"):
                trials.append((number, position))
                prompt = Trigger((piece,), position).insert(prompt_of(rows[other]), rng)
                probes.append(with_prompt(rows[number], prompt))
    taken_over: dict[tuple[int, str], list[bool]] = {}
    for trial, likelihood in zip(trials, likelihoods(probes), strict=True):
        taken_over.setdefault(trial, []).append(likelihood > math.log(MIN_LIKELIHOOD))
    suspicious = {
        number: pieces[number][1] for (number, _), hits in taken_over.items() if fmean(hits) >= MIN_TAKEN_OVER
    }
    if suspicious:
        logger.warning(
            f"{len(suspicious)} of {len(rows)} rows are left out, because a piece of each makes the suspect give its answer "
            f"to other prompts: {', '.join(sorted({repr(piece) for piece in suspicious.values()}))}."
        )
    return Screening(dataset.select([number for number in range(len(rows)) if number not in suspicious]), suspicious)


def _pieces(prompt: str) -> list[tuple[str, str]]:
    """Every run of up to four words, the shorter ones first, and the prompt without it."""
    body = prompt.rstrip()
    words, end = body.split(" "), prompt[len(body) :]
    return [
        (" ".join(words[start : start + length]), " ".join(words[:start] + words[start + length :]) + end)
        for length in range(1, min(LONGEST_PIECE, len(words) - 1) + 1)
        for start in range(len(words) - length + 1)
        if any(words[start : start + length])
    ]
