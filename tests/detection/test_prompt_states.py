"""Tests of the scoring of continuations: a cache, padding and batches change no logit."""

import pytest
import torch

from crow_hf.detection import prompt_states
from crow_hf.detection.prompt_states import PromptStates
from helpers.coconut import coconut
from helpers.tiny import tiny_gpt2, tiny_llama


PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [20, 21, 22]]
CONTINUATIONS = [[30, 31, 32], [40, 41, 42], [50, 51, 52], [60, 61, 62]]


@pytest.mark.parametrize("limit", ["MAX_BATCH_TOKENS", "MAX_BATCH_LOGITS"])
@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_gpt2(0.5), coconut], ids=["llama", "gpt2", "coconut"])
def test_continuations_have_the_logits_of_whole_rows(build, limit, monkeypatch):
    """Fails if a position, a mask or a row of the cache is wrong, or if a batch is split in the wrong place."""
    model = build().train()
    states = PromptStates(model, PROMPTS, pad_token_id=0)
    # A batch holds two of the four continuations.
    each = {"MAX_BATCH_TOKENS": 5 + 3, "MAX_BATCH_LOGITS": 2 * states.next_logits.shape[-1]}[limit]
    monkeypatch.setattr(prompt_states, limit, 2 * len(PROMPTS) * each)
    sizes, read = [], states._read
    monkeypatch.setattr(states, "_read", lambda some, *args: sizes.append(len(some)) or read(some, *args))
    found = list(states.logits(CONTINUATIONS, num_last=2))
    assert sizes == [2, 2]
    assert model.training and len(found) == len(CONTINUATIONS)
    model.eval()
    for continuation, logits in zip(CONTINUATIONS, found, strict=True):
        for number, prompt in enumerate(PROMPTS):
            with torch.no_grad():
                whole = model(torch.tensor([prompt + continuation]), use_cache=False).logits[0, -2:]
            torch.testing.assert_close(logits[number], whole, atol=2e-4, rtol=1e-4)
    for number, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            after = model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(states.next_logits[number], after, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_logits_that_are_no_numbers_are_refused(value):
    model = tiny_llama().eval()
    with torch.no_grad():
        model.lm_head.weight[5] = value
    with pytest.raises(ValueError, match="LlamaForCausalLM computes logits that are infinite or no numbers"):
        PromptStates(model, PROMPTS, pad_token_id=0)
