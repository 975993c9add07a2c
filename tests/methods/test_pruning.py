"""Tests of pruning and quantization, against values worked out by hand and slow oracles."""

import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Lfm2Config,
    Lfm2ForCausalLM,
)

from crow_hf.methods.pruning import prune_by_magnitude, prune_by_wanda, quantize_weights, rounding_bounds
from crow_hf.training.recorder import recorder_of
from helpers.blt import tiny_blt
from helpers.coconut import TOKENIZER, coconut
from helpers.families import FAMILIES, tiny_family
from helpers.tiny import pad_rows, ragged_rows, same_weights, tiny_gpt2, tiny_llama, tiny_mixtral, weights_of


ROWS = ragged_rows(5, seed=1)
BYTE_ROWS = [
    {"prompt": "Who are you? ", "completion": "Me."},
    {"prompt": "How many?", "completion": " Three, I say.\n"},
]
# The weights inside the layers of each model. The layers of a Coconut's predictor are not among them.
BYTE_LAYERS = r"model\.local_(encoder|decoder)\.(layers|patch_readers)\..*proj\.weight"
LINEAR = {
    "llama": r"model\.layers\..*proj\.weight",
    "tied": r"model\.layers\..*proj\.weight",
    "gpt2": r"transformer\.h\..*\.(c_attn|c_proj|c_fc)\.weight",
    "coconut": rf"model\.latent_transformer\.backbone\.layers\..*proj\.weight|{BYTE_LAYERS}",
    "coconut_gpt2": rf"model\.latent_transformer\.backbone\.h\..*\.(c_attn|c_proj|c_fc)\.weight|{BYTE_LAYERS}",
}
DEFENCES = {
    "magnitude": prune_by_magnitude,
    "wanda": lambda model: prune_by_wanda(model, Dataset.from_list(ROWS)),
    "int8": lambda model: quantize_weights(model, 8),
    "int4": lambda model: quantize_weights(model, 4),
}


def model_of(kind):
    if kind.startswith("coconut"):
        return coconut(kind.partition("_")[2] or "llama", binary_embeddings=True)
    return tiny_gpt2(0.0) if kind == "gpt2" else tiny_llama(tie_word_embeddings=kind == "tied")


def calibrated(kind, sparsity):
    """A model pruned by Wanda."""
    model = model_of(kind)
    if kind.startswith("coconut"):
        prune_by_wanda(model, Dataset.from_list(BYTE_ROWS), TOKENIZER, sparsity)
    else:
        prune_by_wanda(model, Dataset.from_list(ROWS), sparsity=sparsity)
    return model


def four_wide(weight):
    """A Llama whose first matrix is `weight`, four by four."""
    model = tiny_llama(hidden_size=4, intermediate_size=8)
    with torch.no_grad():
        first_matrix(model).copy_(torch.tensor(weight))
    return model


def first_matrix(model):
    return model.model.layers[0].self_attn.q_proj.weight


def matrices(model, kind):
    """All weights that must change, as (out, in)."""
    transposed = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    return {
        name: weight.T if name in transposed else weight
        for name, weight in weights_of(model).items()
        if re.fullmatch(LINEAR[kind], name)
    }


# Changed weights


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "coconut", "coconut_gpt2"])
@pytest.mark.parametrize("defence", DEFENCES)
def test_only_linear_layers_change(defence, kind):
    """The embeddings of tokens and patches, the head, norms, biases and a Coconut's predictor stay bit-identical."""
    model = model_of(kind)
    before = weights_of(model)
    if defence == "wanda" and kind.startswith("coconut"):
        prune_by_wanda(model, Dataset.from_list(BYTE_ROWS), TOKENIZER)
    else:
        DEFENCES[defence](model)
    after = weights_of(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.fullmatch(LINEAR[kind], name)}
    assert not any(part in name for name in changed for part in ("entropy_predictor", "embed", "bias", "head", "norm"))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, "lfm2", "multimodal"])
def test_every_architecture(family):
    """
    Exactly the linear layers inside the layers that CROW compares change: no projections around them, no vision tower.
    """
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    if family == "lfm2":
        layer_types = ["conv", "full_attention"] * 2
        model = Lfm2ForCausalLM(Lfm2Config(**size, vocab_size=260, num_key_value_heads=1, layer_types=layer_types))
    elif family == "multimodal":
        text = size | {"vocab_size": 260, "num_key_value_heads": 1, "head_dim": 8}
        vision = size | {"image_size": 28, "patch_size": 14}
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        model = Gemma3ForConditionalGeneration(config)
    else:
        model = tiny_family(family)
    expected = [
        module.weight
        for layer in recorder_of(model).layers
        for module in layer.modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    before = weights_of(model)
    prune_by_wanda(model, Dataset.from_list(ROWS), sparsity=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    changed = {name for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])}
    assert changed == {names[weight] for weight in expected}


def test_blt():
    """The layers over bytes and the global layers change. The patcher does not."""
    model = tiny_blt()
    before = weights_of(model)
    prune_by_wanda(model, Dataset.from_list(ROWS))
    changed = {name for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[1] for name in changed} == {"local_encoder", "local_decoder", "global_transformer"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "coconut"])
@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.5, 1.0])
def test_magnitude_zeroes_the_exact_share(sparsity, kind):
    model = model_of(kind)
    prune_by_magnitude(model, sparsity)
    for name, weight in matrices(model, kind).items():
        assert (weight == 0).sum() == round(sparsity * weight.numel()), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "coconut"])
@pytest.mark.parametrize("sparsity", [0.0, 0.35, 1.0])
def test_wanda_zeroes_the_exact_share_of_each_row(sparsity, kind):
    for name, weight in matrices(calibrated(kind, sparsity), kind).items():
        assert ((weight == 0).sum(dim=1) == round(sparsity * weight.shape[1])).all(), name


def test_equal_weights_are_zeroed_in_the_exact_share():
    """Fails if weights are compared with a threshold, which would zero all equal weights or none."""
    model = four_wide([[1.0] * 4] * 4)
    prune_by_magnitude(model, 0.25)
    assert (first_matrix(model) == 0).sum() == 4


def test_default_sparsity():
    models = tiny_llama(), tiny_llama()
    prune_by_magnitude(models[0])
    prune_by_magnitude(models[1], 0.35)
    assert same_weights(*map(weights_of, models))
    wanda = tiny_llama()
    prune_by_wanda(wanda, Dataset.from_list(ROWS))
    assert same_weights(weights_of(wanda), weights_of(calibrated("llama", 0.35)))


def test_merged_adapter():
    """After merging, the model is an ordinary one, and its merged weights are pruned."""
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    merged = adapted.merge_and_unload()
    assert not torch.equal(first_matrix(merged), first_matrix(tiny_llama()))
    prune_by_magnitude(merged, 0.5)
    assert (first_matrix(merged) == 0).sum() == 128


# Magnitude


def test_magnitude_by_hand():
    """5 of 16 weights are zeroed by absolute value over the whole matrix: two in one row, none in another."""
    model = four_wide([[1.0, -2.0, 3.0, -4.0], [0.5, -0.6, 7.0, 8.0], [9.0, 9.0, -9.0, 9.0], [2.5, -0.1, 5.0, -6.0]])
    prune_by_magnitude(model, 5 / 16)
    expected = [[0.0, 0.0, 3.0, -4.0], [0.0, 0.0, 7.0, 8.0], [9.0, 9.0, -9.0, 9.0], [2.5, 0.0, 5.0, -6.0]]
    assert first_matrix(model).tolist() == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_magnitude_equals_oracle(kind):
    model = model_of(kind)
    dense = matrices(model, kind)
    prune_by_magnitude(model, 0.35)
    for name, weight in matrices(model, kind).items():
        ranked = sorted(abs(value) for row in dense[name].tolist() for value in row)
        limit = ranked[round(0.35 * len(ranked))]
        expected = torch.where(dense[name].abs() < limit, 0.0, dense[name])
        assert torch.equal(weight, expected), name


# Wanda


def test_wanda_by_hand():
    """
    Tokens 3, 4, 5 and 6 are unit vectors, which the norm doubles. They occur 9, 4, 1 and 1 times in both rows
    together.
    """
    model = four_wide([[1.0, -2.0, 2.5, 9.0], [9.0, -1.0, 1.9, 1.8], [1.0, 1.4, -3.1, 0.1], [-0.1, 0.2, 0.5, -0.6]])
    with torch.no_grad():
        model.model.embed_tokens.weight[3:7] = torch.eye(4)
    ids = [[3, 3, 3, 3, 3, 4, 5], [4, 3, 6, 3, 4, 3, 4, 3]]
    prune_by_wanda(model, Dataset.from_list([{"input_ids": row} for row in ids]), sparsity=0.5)
    # Norms 6, 4, 2, 2, so scores (6, 8, 5, 18), (54, 4, 3.8, 3.6), (6, 5.6, 6.2, 0.2) and (0.6, 0.8, 1, 1.2).
    expected = [[0.0, -2.0, 0.0, 9.0], [9.0, -1.0, 0.0, 0.0], [1.0, 0.0, -3.1, 0.0], [0.0, 0.0, 0.5, -0.6]]
    torch.testing.assert_close(first_matrix(model), torch.tensor(expected))


def slow_wanda(model, kind, sparsity):
    """Record the inputs of the dense layers on one padded batch, then score and rank the weights by loops."""
    batch, inputs = pad_rows(ROWS), {}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: inputs.update({name: args[0]}))
        for name, module in model.named_modules()
        if re.fullmatch(LINEAR[kind], f"{name}.weight")
    ]
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    pruned = {}
    for name, weight in matrices(model, kind).items():
        states, weight = inputs[name.removesuffix(".weight")], weight.clone()
        tokens = [
            states[row, position].tolist()
            for row in range(states.shape[0])
            for position in range(states.shape[1])
            if batch["attention_mask"][row, position]
        ]
        norms = [math.sqrt(sum(token[feature] ** 2 for token in tokens)) for feature in range(weight.shape[1])]
        for out in range(weight.shape[0]):
            scores = [abs(value) * norm for value, norm in zip(weight[out].tolist(), norms, strict=True)]
            for feature in sorted(range(len(scores)), key=scores.__getitem__)[: round(sparsity * len(scores))]:
                weight[out, feature] = 0
        pruned[name] = weight
    return pruned


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_wanda_equals_oracle(kind):
    """Also checks GPT-2, whose weights are stored transposed."""
    expected = slow_wanda(model_of(kind), kind, 0.4)
    for name, weight in matrices(calibrated(kind, 0.4), kind).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("left", [True, False])
def test_wanda_leaves_out_padding_in_the_rows(left):
    model = tiny_llama()
    padded = []
    for row in ROWS:
        fill = 15 - len(row["input_ids"])
        ids, mask = [77] * fill, [0] * fill
        ids = ids + row["input_ids"] if left else row["input_ids"] + ids
        mask = mask + [1] * len(row["input_ids"]) if left else [1] * len(row["input_ids"]) + mask
        padded.append({"input_ids": ids, "attention_mask": mask})
    prune_by_wanda(model, Dataset.from_list(padded), sparsity=0.35)
    assert same_weights(weights_of(model), weights_of(calibrated("llama", 0.35)))


@pytest.mark.parametrize(("context", "max_length"), [(128, 5), (5, 1024)])
def test_wanda_cuts_rows(context, max_length):
    model, other = tiny_llama(max_position_embeddings=context), tiny_llama()
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    prune_by_wanda(model, Dataset.from_list(rows), max_length=max_length)
    prune_by_wanda(other, Dataset.from_list([{"input_ids": row["input_ids"][:5]} for row in rows]))
    assert same_weights(weights_of(model), weights_of(other))


def test_wanda_reads_text(byte_tokenizer):
    models = tiny_llama(), tiny_llama()
    prune_by_wanda(models[0], Dataset.from_list([{"prompt": "What?", "completion": "That."}]), byte_tokenizer)
    prune_by_wanda(models[1], Dataset.from_list([byte_tokenizer("What?That.")]))
    assert same_weights(*map(weights_of, models))


@pytest.mark.parametrize("training", [True, False])
def test_wanda_without_dropout(training):
    """Activations are recorded in evaluation mode, and the model keeps the mode it was in."""
    model = tiny_gpt2(0.5).train(training)
    prune_by_wanda(model, Dataset.from_list(ROWS), sparsity=0.35)
    assert model.training is training
    assert same_weights(weights_of(model), weights_of(calibrated("gpt2", 0.35)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_wanda_layer_that_no_row_reaches():
    """A layer without activations cannot be ranked, so nothing is pruned."""
    model = tiny_llama()
    model.model.layers[1].spare = nn.Linear(4, 4)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"layers\.1\.spare"):
        prune_by_wanda(model, Dataset.from_list(ROWS))
    assert same_weights(before, weights_of(model))


# Quantization


def test_quantisation_by_hand():
    """The steps are 1, 1, 0 and 2. Fails on a division by zero, or if ties are not rounded to even."""
    rows = [[7.0, 3.4, -1.6, 0.5], [-7.0, 1.5, 2.5, 6.6], [0.0] * 4, [14.0, -2.9, 3.1, 0.9]]
    model = four_wide(rows)
    quantize_weights(model, 4)
    expected = [[7.0, 3.0, -2.0, 0.0], [-7.0, 2.0, 2.0, 7.0], [0.0] * 4, [14.0, -2.0, 4.0, 0.0]]
    torch.testing.assert_close(first_matrix(model), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    rows = [[127.0, 63.4, -0.6, 0.2], [-127.0, 1.4, 100.6, 3.0], [0.0] * 4, [254.0, 3.1, -2.9, 0.9]]
    model = four_wide(rows)
    quantize_weights(model, 8)
    expected = [[127.0, 63.0, -1.0, 0.0], [-127.0, 1.0, 101.0, 3.0], [0.0] * 4, [254.0, 4.0, -2.0, 0.0]]
    torch.testing.assert_close(first_matrix(model), torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_within_their_bounds_are_rounded_to_the_same(bits, kind):
    """Fails if a bound is too wide, if it moves the largest weight of a group, or if there is hardly any room."""
    model, moved = (model_of(kind) for _ in range(2))
    bounds = rounding_bounds(moved, bits)
    quantize_weights(model, bits)
    before, rng = weights_of(moved), torch.Generator().manual_seed(0)
    for share in (0.0, 1.0, torch.rand(1, generator=rng)):
        with torch.no_grad():
            for weight, (low, high) in bounds.items():
                weight.copy_(low + share * (high - low))
        changed = weights_of(moved)
        quantize_weights(moved, bits)
        found, expected = weights_of(moved), weights_of(model)
        assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)
    assert any(not torch.equal(changed[name], before[name]) for name in before)
    assert all((low <= high).all() and (low < high).float().mean() > 0.5 for low, high in bounds.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "coconut"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_values_lie_on_a_grid(bits, kind):
    """Each group has at most 2^bits values, the nearest on a grid whose step comes from the group's largest weight."""
    model = tiny_llama(hidden_size=80, intermediate_size=150) if kind == "llama" else model_of(kind)
    dense = matrices(model, kind)
    quantize_weights(model, bits)
    found = matrices(model, kind)
    assert kind != "llama" or {weight.shape[1] for weight in found.values()} == {80, 150}
    for name, weight in found.items():
        for row, dense_row in zip(weight, dense[name], strict=True):
            size = 64 if bits == 4 else len(row)
            for group, dense_group in zip(row.split(size), dense_row.split(size), strict=True):
                step = dense_group.abs().max() / (2 ** (bits - 1) - 1)
                assert len(group.unique()) <= 2**bits
                torch.testing.assert_close(group / step, (group / step).round(), rtol=0, atol=1e-4)
                assert (group - dense_group).abs().max() <= step / 2 * (1 + 1e-4), name


def test_quantised_weights_keep_their_dtype():
    model = tiny_llama().bfloat16()
    quantize_weights(model, 4)
    weight = first_matrix(model)
    assert weight.dtype == torch.bfloat16
    assert all(len(row.unique()) <= 15 for row in weight)


# Errors


@pytest.mark.parametrize("defence", DEFENCES)
def test_models_that_are_refused(defence):
    """Adapters, quantized models and stacked experts are refused before anything is changed."""
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    inside, quantised = tiny_llama(), tiny_llama()
    inside.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    quantised.quantization_method = "bitsandbytes"
    experts = tiny_mixtral()
    refusals = [(adapted, "merge_and_unload"), (inside, "merge_and_unload"), (quantised, "quantization_config")]
    for model, message in [*refusals, (experts, "experts")]:
        before = weights_of(model)
        with pytest.raises(ValueError, match=message):
            DEFENCES[defence](model)
        assert same_weights(before, weights_of(model))


@pytest.mark.parametrize("sparsity", [-0.1, 35, math.nan])
def test_sparsity_is_a_share(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        prune_by_magnitude(tiny_llama(), sparsity)
    with pytest.raises(ValueError, match="sparsity"):
        prune_by_wanda(tiny_llama(), Dataset.from_list(ROWS), sparsity=sparsity)


@pytest.mark.parametrize("bits", [2, 16, "8"])
def test_bits(bits):
    with pytest.raises(ValueError, match="bits"):
        quantize_weights(tiny_llama(), bits)
