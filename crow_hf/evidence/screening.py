"""Is the purification data itself poisoned? Finds rows with a piece that takes over the suspect's answers.

A poisoned row shows its trigger. Leave a piece of a prompt out: where that changes the suspect's answer most, the piece is
suspicious. Then put it into other prompts: if the suspect now gives them this row's answer, the row is poisoned.
"""

import math
import random
from dataclasses import dataclass
from statistics import fmean

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..attacks.triggers import Trigger
from ..data.encoding import encode_completion, encode_prompt, padding_id
from ..data.rows import prompt_of, render, with_prompt
from ..evaluation.generation import answer_log_likelihoods
from ..training.recorder import context_length


logger = logging.get_logger(__name__)

# In words.
LONGEST_PIECE = 4
NUM_PROBES, MIN_PROBES = 12, 4
# Nats that an answer must lose with a piece left out for that piece to be tried.
MIN_LOST = 1.0
# Another prompt's answer is taken over if the suspect finds the row's own more likely than all others together.
MIN_LIKELIHOOD = 0.5
# Share of the probed prompts whose answer a piece of a poisoned row takes over.
MIN_TAKEN_OVER = 0.85


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

    limit = context_length(model)

    def likelihoods(questions: list[tuple[int, str]]) -> list[float]:
        """How likely the suspect gives the answer of a row to a prompt."""
        encoded = []
        for number, prompt in questions:
            rendered = render(with_prompt(rows[number], prompt), tokenizer, number)
            prompt_ids = encode_prompt(rendered, tokenizer)[:limit]
            answer_ids = encode_completion(rendered, tokenizer)
            encoded.append((prompt_ids, answer_ids if limit is None else answer_ids[: limit - len(prompt_ids)]))
        return answer_log_likelihoods(model, encoded, padding_id(tokenizer), batch_size)

    rows = list(dataset)
    prompts = [prompt_of(row) for row in rows]
    rng = random.Random(seed)

    # The piece of each length that a row's answer hangs on most, and, under length 0, the words that it needs one and all.
    whole = likelihoods(list(enumerate(prompts)))
    left_out = [(number, *piece) for number, prompt in enumerate(prompts) for piece in _pieces(prompt)]
    without = likelihoods([(number, rest) for number, _, _, rest in left_out])
    pieces: dict[tuple[int, int], tuple[float, str]] = {}
    needed: dict[int, list[int]] = {}
    for (number, start, piece, _), likelihood in zip(left_out, without, strict=True):
        length, lost = len(piece.split(" ")), whole[number] - likelihood
        if lost > max(MIN_LOST, pieces.get((number, length), (0.0, ""))[0]):
            pieces[number, length] = (lost, piece)
        if length == 1 and lost > MIN_LOST:
            needed.setdefault(number, []).append(start)
    for number, places in needed.items():
        words = prompts[number].rstrip().split(" ")
        run = words[places[0] : places[-1] + 1]
        if len(places) == len(run) <= len(words) / 2:
            pieces[number, 0] = (MIN_LOST, " ".join(run))

    # Other prompts that the suspect does not give this answer to anyway.
    pairs = [
        (number, other)
        for number in sorted({number for number, _ in pieces})
        for other in rng.sample(range(len(rows)), min(NUM_PROBES, len(rows)))
        if other != number
    ]
    others: dict[int, list[int]] = {}
    for (number, other), likelihood in zip(
        pairs, likelihoods([(number, prompts[other]) for number, other in pairs]), strict=True
    ):
        if likelihood < math.log(MIN_LIKELIHOOD):
            others.setdefault(number, []).append(other)

    # What the piece makes of them.
    trials, questions = [], []
    for (number, length), (_, piece) in pieces.items():
        for other in others.get(number, []):
            for position in ("start", "end"):
                trials.append((number, length, position))
                questions.append((number, Trigger((piece,), position).insert(prompts[other], rng)))
    taken_over: dict[tuple[int, int, str], list[bool]] = {}
    for trial, likelihood in zip(trials, likelihoods(questions), strict=True):
        taken_over.setdefault(trial, []).append(likelihood > math.log(MIN_LIKELIHOOD))
    suspicious: dict[int, str] = {}
    for (number, length, _), hits in sorted(taken_over.items()):
        if len(hits) >= MIN_PROBES and fmean(hits) >= MIN_TAKEN_OVER:
            suspicious.setdefault(number, pieces[number, length][1])
    if suspicious:
        logger.warning(
            f"{len(suspicious)} of {len(rows)} rows are left out, because a piece of each makes the suspect give its answer "
            f"to other prompts: {', '.join(sorted({repr(piece) for piece in suspicious.values()}))}."
        )
    return Screening(dataset.select([number for number in range(len(rows)) if number not in suspicious]), suspicious)


def _pieces(prompt: str) -> list[tuple[int, str, str]]:
    """Every run of up to four words, if it is at most half of the prompt: where it begins, itself, and the prompt without it."""
    body = prompt.rstrip()
    words, end = body.split(" "), prompt[len(body) :]
    return [
        (start, " ".join(words[start : start + length]), " ".join(words[:start] + words[start + length :]) + end)
        for length in range(1, min(LONGEST_PIECE, len(words) // 2) + 1)
        for start in range(len(words) - length + 1)
        if any(words[start : start + length])
    ]
