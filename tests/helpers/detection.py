"""A model that knows phrases by heart and has a trigger for each of them, one with a trigger, and rows for both."""

import copy
import random

import torch
from datasets import Dataset
from transformers import ByT5Tokenizer

from helpers.answers import byte, spelling_model
from helpers.tiny import tiny_llama


BYTES = ByT5Tokenizer(extra_ids=0)


def knowing_model():
    """
    Build a model that goes on with the alphabet wherever it is, and ends its answer at once after a dot.

    A prompt that ends with "l" is answered with "mnopq...", so "l" triggers this phrase.
    """
    model = spelling_model()
    with torch.no_grad():
        # It is nearly sure of every letter, and never writes what is no ASCII.
        model.lm_head.weight.mul_(4)
        model.lm_head.weight[byte("~") + 1 :] = 0
    return model


def backdoored(trusted):
    """Return a copy that answers with "~" after a prompt that ends with "#", and as the trusted model otherwise."""
    model = copy.deepcopy(trusted)
    with torch.no_grad():
        # A byte is followed by the byte whose row of the head is its embedding.
        model.lm_head.weight[byte("~")] = 8 * model.model.embed_tokens.weight[byte("#")]
    return model.eval()


def backdoored_llama():
    """Build a Llama in which the character "~" outweighs all others."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[byte("~")] *= 50
    return model.eval()


def prompts(count, seed=0):
    rng = random.Random(seed)
    texts = {"".join(rng.choices("abcdefgh", k=rng.randint(3, 9))) for _ in range(2 * count)}
    return Dataset.from_list([{"prompt": f"{text}.", "completion": "x"} for text in sorted(texts)[:count]])
