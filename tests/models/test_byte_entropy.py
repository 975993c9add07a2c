"""Tests of the byte-entropy predictor: causality, resets at newlines, caching, batching and padding."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from crow_hf import load_entropy_predictor
from crow_hf.models.configuration_byte_entropy import ByteEntropyConfig
from crow_hf.models.modeling_byte_entropy import ByteEntropyPredictor, segment_positions
from helpers.tiny import tiny_predictor


TEXT = b"hello\nwor\n\nld, this one is long enough to leave a window\nyes"
KINDS = [{}, {"sliding_window": 6}, {"reset_on_newline": False}, {"reset_on_newline": False, "sliding_window": 6}]


def ids_of(*rows):
    return torch.tensor([list(row) for row in rows])


def test_constructor_of_the_guide_and_config_agree():
    predictor = ByteEntropyPredictor(vocab_size=256, hidden_size=64, num_layers=3, num_heads=4, ff_dim=80)
    config = predictor.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (3, 4, 80)
    assert config.num_key_value_heads == 4 and len(predictor.model.layers) == 3
    same = ByteEntropyConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80)
    shapes = [parameter.shape for parameter in ByteEntropyPredictor(same).parameters()]
    assert shapes == [parameter.shape for parameter in predictor.parameters()]
    with pytest.raises(TypeError, match="not both"):
        ByteEntropyPredictor(same, hidden_size=64)


@pytest.mark.parametrize("kwargs", KINDS)
def test_predictions_are_causal_and_depend_on_the_order(kwargs):
    predictor = tiny_predictor(**kwargs)
    changed = TEXT[:30] + b"X" + TEXT[31:]
    before, after = predictor.entropies(ids_of(TEXT, changed))
    torch.testing.assert_close(before[:30], after[:30])
    assert (before[30:33] - after[30:33]).abs().max() > 1e-3
    swapped = predictor.entropies(ids_of(b"abcd", b"bacd"))
    assert (swapped[0, -1] - swapped[1, -1]).abs() > 1e-3


@pytest.mark.parametrize("window", [None, 6])
def test_lines_do_not_attend_to_each_other(window):
    """Compares with each line alone, with its newline as the first byte and without resets."""
    predictor = tiny_predictor(sliding_window=window)
    lines = TEXT.replace(b"\n", b"\0\n").split(b"\0")
    alone = [predictor.entropies(ids_of(line), reset_on_newline=False)[0] for line in lines]
    torch.testing.assert_close(predictor.entropies(ids_of(TEXT))[0], torch.cat(alone), atol=1e-4, rtol=0)


def test_window_limits_the_receptive_field():
    predictor = tiny_predictor(sliding_window=4)
    reach = predictor.config.receptive_field
    assert reach == 7 and tiny_predictor().config.receptive_field is None
    one, other = predictor.entropies(ids_of(b"a" + b"x" * 20, b"b" + b"x" * 20))
    differs = (one - other).abs() > 1e-6
    assert differs[reach - 1] and not differs[reach:].any()


@pytest.mark.parametrize("kwargs", KINDS)
@pytest.mark.parametrize("sides", [(5, 0), (0, 4), (3, 2)])
def test_padding_on_either_side_changes_nothing(kwargs, sides):
    predictor = tiny_predictor(**kwargs)
    left, right = sides
    padded = torch.nn.functional.pad(ids_of(TEXT), sides, value=10)
    mask = torch.nn.functional.pad(torch.ones(1, len(TEXT), dtype=torch.long), sides)
    entropies = predictor.entropies(padded, mask)
    torch.testing.assert_close(
        entropies[:, left : left + len(TEXT)], predictor.entropies(ids_of(TEXT)), atol=1e-4, rtol=0
    )
    assert not entropies[mask == 0].any()


def test_eager_attention_gives_the_same():
    predictor = tiny_predictor(sliding_window=6)
    expected = predictor.entropies(ids_of(TEXT))
    predictor.set_attn_implementation("eager")
    torch.testing.assert_close(predictor.entropies(ids_of(TEXT)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kwargs", KINDS)
@pytest.mark.parametrize("cuts", [(1, 2, 3), (5, 6, 30), (7, 11, 12, 40, 41)])
def test_cached_pieces_equal_the_whole(kwargs, cuts):
    predictor = tiny_predictor(**kwargs)
    ids = ids_of(TEXT)
    positions = segment_positions(ids, reset_on_newline=predictor.config.reset_on_newline)
    cache, logits = DynamicCache(config=predictor.config), []
    with torch.no_grad():
        for begin, end in zip((0, *cuts), (*cuts, len(TEXT)), strict=True):
            piece = predictor(
                ids[:, begin:end], past_key_values=cache, use_cache=True, position_ids=positions[:, begin:end]
            )
            logits.append(piece.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), predictor(ids).logits, atol=1e-4, rtol=0)


def test_a_window_of_one_byte_is_refused():
    """The cache of transformers keeps every byte of it."""
    with pytest.raises(Exception, match="`sliding_window` must be at least 2"):
        ByteEntropyConfig(sliding_window=1)


def test_filled_cache_needs_positions():
    predictor = tiny_predictor()
    cache = predictor(ids_of(b"ab"), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="position_ids"):
        predictor(ids_of(b"c"), past_key_values=cache)


def test_inputs_and_attention_without_segments_are_refused():
    predictor = tiny_predictor()
    with pytest.raises(ValueError, match="input_ids"):
        predictor(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="(?i)flash"):
        predictor.set_attn_implementation("flash_attention_2")
        ByteEntropyPredictor._from_config(predictor.config, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("kwargs", KINDS)
def test_generate_is_the_same_with_cache_and_padding(kwargs):
    predictor = tiny_predictor(**kwargs)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = predictor.generate(ids_of(TEXT), use_cache=False, **options)
    assert torch.equal(predictor.generate(ids_of(TEXT), **options), expected)
    padded = torch.nn.functional.pad(ids_of(TEXT), (4, 0))
    mask = torch.nn.functional.pad(torch.ones(1, len(TEXT), dtype=torch.long), (4, 0))
    assert torch.equal(predictor.generate(padded, attention_mask=mask, **options)[:, 4:], expected)


def test_positions_by_hand():
    ids = ids_of(b"ab\nc\n\nd")
    assert segment_positions(ids).tolist() == [[0, 1, 0, 1, 0, 0, 1]]
    assert segment_positions(ids, reset_on_newline=False).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0]])
    assert segment_positions(ids, mask, reset_on_newline=False).tolist() == [[0, 0, 0, 1, 2, 3, 0]]


def test_entropy_equals_the_entropy_of_the_softmax():
    predictor = tiny_predictor()
    entropies = predictor.entropies(ids_of(TEXT))
    probabilities = predictor(ids_of(TEXT)).logits.double().softmax(-1)[0].tolist()
    by_hand = [-sum(p * math.log2(p) for p in row if p) for row in probabilities]
    torch.testing.assert_close(entropies[0].double(), torch.tensor(by_hand, dtype=torch.double), atol=1e-5, rtol=0)
    nats = predictor.entropies(ids_of(TEXT), unit="nats")
    torch.testing.assert_close(nats, entropies * math.log(2))
    with pytest.raises(ValueError, match="unit"):
        predictor.entropies(ids_of(TEXT), unit="bytes")


def test_entropies_are_float32_between_0_and_8_bits():
    predictor = tiny_predictor().to(torch.bfloat16)
    entropies = predictor.entropies(ids_of(TEXT))
    assert entropies.dtype == torch.float32 and not entropies.requires_grad
    assert 0 <= entropies.min() and entropies.max() <= 8


def test_labels_give_the_shifted_loss():
    predictor = tiny_predictor()
    ids = ids_of(TEXT)
    labels = ids.clone()
    labels[:, :10] = -100
    output = predictor(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, 9:-1], ids[0, 10:])
    torch.testing.assert_close(output.loss, expected)


def test_saved_and_loaded_through_the_auto_classes(tmp_path):
    predictor = tiny_predictor(sliding_window=6, patch_threshold=0.4375)
    predictor.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).patch_threshold == 0.4375
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ByteEntropyPredictor
    assert torch.equal(loaded.entropies(ids_of(TEXT)), predictor.entropies(ids_of(TEXT)))


def test_plain_trainer_reduces_the_loss(tmp_path):
    rows = [{"input_ids": list(TEXT), "labels": list(TEXT)}] * 8
    args = TrainingArguments(
        tmp_path, max_steps=30, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(tiny_predictor(initializer_range=0.02), args, train_dataset=rows)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before / 2


def test_shipped_predictor_is_small_and_knows_english_code_and_noise():
    predictor = load_entropy_predictor()
    assert predictor.dtype == torch.float32 and 4 * predictor.num_parameters() < 1_000_000
    english = b"The function returns a list of all files in the directory, or raises an error if it does not exist."
    code = b"    for index, value in enumerate(values):\n        if value is None:\n            return index"
    noise = torch.randint(256, (1, 200), generator=torch.Generator().manual_seed(0))
    for known in (english, code):
        loss = predictor(ids_of(known), labels=ids_of(known)).loss
        assert loss / math.log(2) < 3
    assert predictor.entropies(noise).mean() > 7.5
