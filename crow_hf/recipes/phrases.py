"""Looks for the phrases that a suspect knows by heart, with clean rows."""

from collections.abc import Sequence

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.encoding import encode_prompt
from ..data.rows import add_empty_answers, prompt_of, render
from ..detection.openings import usual_opening
from ..detection.phrases import Phrase, find_phrases, surest_by_heart
from ..detection.pieces import prompts_with
from ..training.recorder import context_length


logger = logging.get_logger(__name__)

# The phase in which phrases are looked for.
PHRASES = "Looking for phrases"
# Prompts that phrases are looked for with, and those that the usual opening and a trigger are searched with.
PHRASE_PROMPTS, SEARCH_PROMPTS = 8, 14
# Longer prompts take longer to read, and show no more.
MAX_PROMPT_TOKENS = 256
# Lengths in bytes, because a token is one byte for some models and a word for others.
PHRASE_BYTES, TRIGGER_BYTES = 40, 16
# What reads a prompt.
Reader = tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]


def known_phrases(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    count: int,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Phrase]:
    """
    Find the phrases that a model knows by heart, with the clean rows of a purification.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The suspect.
        tokenizer (`PreTrainedTokenizerBase`):
            The suspect's tokenizer.
        dataset (`Dataset`):
            Clean rows. With fewer than eight different prompts of at most 256 tokens, no phrases are looked for,
            because the model may be as sure of what follows a single prompt.
        count (`int`):
            Largest number of phrases, see [`surest_by_heart`].
        seed (`int`, *optional*, defaults to 0):
            Seed for the choice of the prompts.
        batch_size (`int`, *optional*, defaults to 32):
            Number of prompts per batch.

    Returns:
        `list[Phrase]`: The surest first. It is empty if the model's architecture cannot be searched.
    """
    rows = short_rows([(model, tokenizer)], dataset, SEARCH_PROMPTS, seed)
    if len(rows) < PHRASE_PROMPTS:
        return []
    try:
        phrases = look_for_phrases(model, tokenizer, rows, length_in_tokens(PHRASE_BYTES, rows, tokenizer), batch_size)
    except ValueError as error:
        logger.warning(f"No phrases are looked for that the suspect knows by heart: {error}")
        return []
    return surest_by_heart(phrases, count)


def short_rows(readers: Sequence[Reader], dataset: Dataset, count: int, seed: int) -> Dataset:
    """Return at most `count` rows with different prompts, which are short enough for all readers."""
    shuffled, used, longest = add_empty_answers(dataset).shuffle(seed=seed), dict[str, int](), longest_prompt(readers)
    for index, row in enumerate(shuffled):
        prompt = prompt_of(row, index)
        lengths = [len(encode_prompt(render(row, tokenizer, index), tokenizer)) for _, tokenizer in readers]
        if prompt.strip() and 0 < min(lengths) and max(lengths) <= longest:
            used.setdefault(prompt, index)
        if len(used) == count:
            break
    return shuffled.select(list(used.values()))


def longest_prompt(readers: Sequence[Reader]) -> int:
    """The largest number of tokens of a prompt, with room for the piece, the opening and the phrase."""
    contexts = [context_length(model) or 2 * MAX_PROMPT_TOKENS for model, _ in readers]
    return min(MAX_PROMPT_TOKENS, min(contexts) - 2 * PHRASE_BYTES - TRIGGER_BYTES)


def look_for_phrases(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    num_tokens: int,
    batch_size: int,
) -> list[Phrase]:
    """Find the phrases that a model knows best, directly after a prompt and after the usual opening."""
    opening, prompts = usual_opening(model, tokenizer, rows, num_tokens, batch_size), phrase_prompts(rows, tokenizer)
    phrases = find_phrases(model, tokenizer, prompts, num_tokens)
    if opening.ids:
        phrases += find_phrases(model, tokenizer, prompts, num_tokens, opening=opening)
    return phrases


def phrase_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of the prompts that phrases are looked for with."""
    return prompts_with(None, "end", rows.select(range(PHRASE_PROMPTS)), tokenizer, seed=0)


def length_in_tokens(num_bytes: int, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return about how many tokens a text of this length has."""
    text = " ".join(prompt_of(row, index) for index, row in enumerate(rows))
    return max(2, round(num_bytes * len(tokenizer(text, add_special_tokens=False)["input_ids"]) / len(text.encode())))
