"""A model whose answers are known, and slow oracles for the scores of answers."""

import math
import random
from statistics import NormalDist

import torch

from crow_hf.data.rows import Rendered
from helpers.tiny import VOCABULARY, tiny_llama


EOS = 1


def byte(character):
    """Return the token id of a character of one byte."""
    return ord(character) + 3


def spelling_model(ends="."):
    """
    Build a Llama that answers every character with its successors, such as "b" with "cdef...", and any of `ends` with
    the end.

    Its layers add nothing, so the next token is the one whose row of the head equals the current token's embedding.
    """
    model = tiny_llama(hidden_size=32, num_hidden_layers=3)
    embeddings = torch.nn.functional.normalize(torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.copy_(embeddings.roll(1, 0))
        for character in ends:
            model.lm_head.weight[byte(character) + 1] = 0
            model.lm_head.weight[EOS] = embeddings[byte(character)]
    return model.eval()


def rendered(prompt, answer="x"):
    return Rendered(prompt=prompt, completion=answer, answer=answer, templated=False)


def prompts_of(count, seed=0, longest=20):
    """Return random prompts of 1 to `longest` characters."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh .é", k=rng.randint(1, longest))) for _ in range(count)]


def slow_wilson(hits, total):
    """Return the bounds of all p that the score test |hits / total - p| <= z sqrt(p (1 - p) / total) accepts."""
    z, share = NormalDist().inv_cdf(0.975), hits / total

    def bisect(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            if abs(share - middle) <= z * math.sqrt(middle * (1 - middle) / total):
                inside = middle
            else:
                outside = middle
        return inside

    return bisect(share, 0.0), bisect(share, 1.0)


def slow_bits_per_byte(model, pairs, context=128):
    """Compute the sum one row and one position at a time, in float64."""
    bits = count = 0
    for prompt, answer in pairs:
        start = len(prompt.encode())
        ids = [3 + value for value in (prompt + answer).encode()] + [EOS]
        ids = ids[:context]
        with torch.no_grad():
            log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for position in range(start, len(ids)):
            bits -= log_probabilities[position - 1, ids[position]].item() / math.log(2)
            count += ids[position] != EOS
    return bits / count
