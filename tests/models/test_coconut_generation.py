"""Tests of generation: the cache equals a full pass, and the latent transformer runs once per patch."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig

from crow_hf.models.cache_coconut import CoconutCache
from helpers.coconut import BACKBONES, DEEP, TEXTS, TOKENIZER, assert_same, batch_of, coconut, ids_of


MODEL = coconut(hash_ngram_sizes=[2, 4], hash_vocab_size=50)
PIECES = st.sampled_from(["a", "b c", "\n", "é", "zq", "<eos>", "<bot><latent><eot>", "The end. ", "\U0001f642"])


def in_chunks(model, batch, cuts):
    """Return the logits of a batch that passes through the model in pieces."""
    cache, length = CoconutCache(model.config), batch["input_ids"].shape[1]
    borders = sorted({0, *cuts, length})
    pieces = [
        model(batch["input_ids"][:, a:b], batch["attention_mask"][:, :b], past_key_values=cache).logits
        for a, b in zip(borders, borders[1:], strict=False)
    ]
    assert cache.get_seq_length() == length
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_byte_by_byte_equals_one_pass(name, implementation):
    """Rows reach boundaries and thoughts at different times. Windows count patches, not columns."""
    model = coconut(name)
    if implementation == "eager":
        model.set_attn_implementation("eager")
    batch = batch_of(TEXTS)
    real = batch.attention_mask.bool()
    found = in_chunks(model, batch, range(batch.input_ids.shape[1]))
    assert_same(found[real], model(**batch).logits[real])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(PIECES, min_size=1, max_size=8).map("".join), min_size=1, max_size=3), st.randoms())
@torch.no_grad()
def test_any_chunks_equal_one_pass(texts, rng):
    batch = batch_of([text[:60] if "<" not in text else text for text in texts])
    length, real = batch.input_ids.shape[1], batch.attention_mask.bool()
    cuts = rng.sample(range(1, length), rng.randint(0, length - 1))
    assert_same(in_chunks(MODEL, batch, cuts)[real], MODEL(**batch).logits[real], 1e-3)


@pytest.mark.parametrize("window", [2, 3, 6])
@torch.no_grad()
def test_short_windows_continue_from_the_cache(window):
    local = {"sliding_window": window, "num_hidden_layers": 2}
    model = coconut(encoder_config=local, decoder_config=local)
    batch = batch_of(TEXTS[:3])
    real = batch.attention_mask.bool()
    assert_same(in_chunks(model, batch, range(batch.input_ids.shape[1]))[real], model(**batch).logits[real])


@pytest.mark.parametrize("rule", ["global", "monotonic", "both", "running_minimum", "stride"])
@torch.no_grad()
def test_every_rule_continues_from_the_cache(rule):
    model, batch = coconut(patch_rule=rule, max_patch_length=4), batch_of(TEXTS[:3])
    real = batch.attention_mask.bool()
    cuts = random.Random(0).sample(range(batch.input_ids.shape[1]), 20)
    assert_same(in_chunks(model, batch, cuts)[real], model(**batch).logits[real])


@torch.no_grad()
def test_the_latent_transformer_runs_once_for_each_patch():
    ids, widths = ids_of("Most of the bytes here need no latent step at all."), []

    def on_call(module, args, kwargs, output):
        widths.append(kwargs["inputs_embeds"].shape[1])

    patches = MODEL(ids).patch_lengths.shape[1]
    handle = MODEL.latent_transformer.backbone.register_forward_hook(on_call, with_kwargs=True)
    in_chunks(MODEL, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, range(ids.shape[1]))
    handle.remove()
    # The last patch is still open, or has just ended.
    assert set(widths) == {1} and patches - 1 <= len(widths) <= patches < ids.shape[1] / 2


@torch.no_grad()
def test_the_state_beside_keys_and_values_does_not_grow():
    sizes = []
    for text in ("Short text here.\n" * 2, "Short text here.\n" * 6):
        cache = CoconutCache(MODEL.config)
        MODEL(ids_of(text), past_key_values=cache)
        sizes.append((cache.open_states.shape, cache.history.shape, cache.encoder.layers[0].keys.shape))
    assert sizes[0] == sizes[1]


@torch.no_grad()
def test_rows_of_a_cache_can_be_selected():
    """Beam search reorders and repeats rows."""
    batch, rows = batch_of(TEXTS), torch.tensor([2, 0, 0])
    length = batch.input_ids.shape[1]
    caches = [CoconutCache(MODEL.config) for _ in range(2)]
    for cache in caches:
        MODEL(batch.input_ids[:, :-5], batch.attention_mask[:, :-5], past_key_values=cache)
    caches[0].reorder_cache(rows)
    caches[1].batch_repeat_interleave(2)
    for cache, chosen in zip(caches, (rows, torch.arange(4).repeat_interleave(2)), strict=True):
        found = MODEL(batch.input_ids[chosen, -5:], past_key_values=cache).logits
        assert_same(found, MODEL(**batch).logits[chosen, -5:])
        assert cache.get_seq_length() == length
    with pytest.raises(NotImplementedError, match="shortened"):
        caches[0].crop(1)
    caches[0].reset()
    assert caches[0].get_seq_length() == 0


@torch.no_grad()
def test_greedy_generation_equals_full_passes():
    batch = batch_of([*TEXTS[:3], "a"])
    with_cache = MODEL.generate(**batch, max_new_tokens=25, do_sample=False)
    assert torch.equal(with_cache, MODEL.generate(**batch, max_new_tokens=25, do_sample=False, use_cache=False))
    for row, text in enumerate([*TEXTS[:3], "a"]):
        ids = ids_of(text)
        for _ in range(25):
            ids = torch.cat([ids, MODEL(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert with_cache[row, -25:].tolist() == ids[0, -25:].tolist()


@torch.no_grad()
def test_rows_that_end_early_do_not_change_the_others():
    batch = batch_of(TEXTS[:3])
    free = MODEL.generate(**batch, max_new_tokens=20, do_sample=False)[:, -20:]
    stop = free[0, 3].item()
    stopped = MODEL.generate(**batch, max_new_tokens=20, do_sample=False, eos_token_id=stop)[:, -20:]
    for row in range(3):
        wanted = free[row].tolist()
        if stop in wanted:
            wanted = wanted[: wanted.index(stop) + 1]
        found = stopped[row, : len(wanted)].tolist()
        assert found == wanted[: len(found)]
        assert set(stopped[row, len(wanted) :].tolist()) <= {TOKENIZER.pad_token_id}


@torch.no_grad()
def test_sampling_beams_and_stop_strings():
    batch = batch_of(TEXTS[:2])
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        samples.append(MODEL.generate(**batch, max_new_tokens=12, do_sample=True, top_k=5, use_cache=use_cache))
    assert torch.equal(*samples)
    beams = [
        MODEL.generate(**batch, max_new_tokens=12, num_beams=3, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)
    several = MODEL.generate(**batch, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert several.shape[0] == 6
    text = TOKENIZER.decode(MODEL.generate(ids_of("a"), max_new_tokens=9, do_sample=False)[0, 2:])
    stop = text[4]
    output = MODEL.generate(ids_of("a"), max_new_tokens=9, do_sample=False, stop_strings=[stop], tokenizer=TOKENIZER)
    assert TOKENIZER.decode(output[0, 2:]).endswith(stop) and output.shape[1] <= 11


@torch.no_grad()
def test_a_second_turn_continues_from_the_first():
    ids = ids_of("First turn")
    first = MODEL.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    both = torch.cat([first.sequences, ids_of("<bot><latent><eot> and then?")[:, 1:]], dim=1)
    wanted = MODEL.generate(both, max_new_tokens=8, do_sample=False)
    found = MODEL.generate(
        both, past_key_values=copy.deepcopy(first.past_key_values), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache of its own"),
        ({"prompt_lookup_num_tokens": 2}, "stateful"),
        ({"inputs": torch.empty(1, 0, dtype=torch.long)}, "empty"),
    ],
)
def test_unsupported_generation_options_are_refused(options, message):
    options = {"inputs": ids_of("a")} | options
    with pytest.raises(ValueError, match=message):
        MODEL.generate(**options, max_new_tokens=3)


def test_arguments_that_contradict_a_cache_are_refused():
    model, ids = coconut(LlamaConfig(**DEEP)), ids_of("abc")
    with pytest.raises(ValueError, match="patch_lengths"):
        model(ids, past_key_values=CoconutCache(model.config), **model.model.patch(ids))
    with pytest.raises(ValueError, match="CoconutCache"):
        model(ids, past_key_values=DynamicCache())
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointing"):
        model(ids, use_cache=True)
