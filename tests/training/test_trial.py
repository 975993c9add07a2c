"""Every registered causal LM either trains as a slow oracle does, or is refused in a sentence before any work."""

import math

import pytest
import torch
from torch import nn

from crow_hf.methods.crow.objective import crow_terms
from crow_hf.training.recorder import recorder_of
from crow_hf.training.trial import try_out
from helpers.architectures import ARCHITECTURES, tiny_architecture
from helpers.blt import tiny_blt
from helpers.coconut import coconut
from helpers.families import FAMILIES, tiny_family
from helpers.invariance import invariance_terms
from helpers.oracles import slow_crow
from helpers.tiny import pad_rows, ragged_rows, tiny_llama


BATCH = pad_rows(ragged_rows(3, seed=4))

BIDIRECTIONAL = "predicts tokens from later ones"
OTHER_LOSS = "another loss than that of the next token"
SEVERAL_STREAMS = "one hidden state per position"
OTHER_LAYERS = "module lists as long as"
REFUSED = {
    **dict.fromkeys(
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod".split(),
        BIDIRECTIONAL,
    ),
    **dict.fromkeys(
        "bart bigbird_pegasus blenderbot blenderbot-small mbart mvp pegasus plbart trocr whisper".split(), OTHER_LOSS
    ),
    **dict.fromkeys("deepseek_v4 gemma3n_text hy_v4".split(), SEVERAL_STREAMS),
    **dict.fromkeys("hrm_text longcat_flash prophetnet xlm".split(), OTHER_LAYERS),
    **dict.fromkeys("rwkv xlstm".split(), "modified by an inplace operation"),
    "cpmant": "44 hidden states for 12 tokens",
    "git": "fails on a few tokens",
    "marian": "fails on a few tokens",
    "mllama": "its 4 layers 3 times",
    "reformer": "fails on a few tokens",
    "xlnet": "2 hidden states for 12 tokens",
}


def terms_of_crow(model):
    return crow_terms(recorder_of(model), model, model, BATCH, epsilon=0.1, epsilon_mode="absolute", layers="paper")[1]


def gradients_of(loss, model):
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros(()) if each is None else each for each in gradients]


def assert_purifiable(model_type, **changes):
    """Check that CROW equals the oracle, and that Invariance has finite terms and a gradient."""
    model = tiny_architecture(model_type, **changes)
    try_out(recorder_of(model))
    terms = terms_of_crow(model)
    plain = tiny_architecture(model_type)
    wanted = slow_crow(plain, BATCH)
    for name in ("loss_lm", "consistency_clean", "consistency_perturbed"):
        torch.testing.assert_close(terms[name], wanted[name], rtol=1e-3, atol=1e-3)
    found = gradients_of(terms["loss_lm"] + 5.5 * terms["consistency_perturbed"], model)
    for ours, oracle in zip(found, gradients_of(wanted["loss"], plain), strict=True):
        assert (ours - oracle).norm() <= 2e-2 * (0.05 + oracle.norm())

    views = {name: torch.cat([value] * 3) for name, value in BATCH.items()}
    # An answer stands behind a prompt, and so does a phrase.
    views["labels"][:, :2] = -100
    inserted = torch.zeros_like(views["input_ids"], dtype=torch.bool)
    inserted[:, 1] = True
    suspect = tiny_architecture(model_type, **changes).requires_grad_(False)
    # The adversary leads away from the teacher, and towards a phrase.
    for phrase in ([], [5, 6]):
        _, terms = invariance_terms(
            recorder_of(model),
            model,
            model,
            recorder_of(suspect),
            suspect,
            views,
            inserted,
            adversarial_steps=2,
            adversarial_step_size=0.35,
            label_weights=torch.full((9,), 0.5),
            leaked=torch.tensor([], dtype=torch.long),
            phrase=torch.tensor(phrase, dtype=torch.long),
            layers="paper",
        )
        assert all(math.isfinite(term.item()) for term in terms.values())
        assert sum(bool(each.any()) for each in gradients_of(sum(terms.values()), model)) > 4


def assert_refused(model_type):
    with pytest.raises(ValueError, match=REFUSED[model_type]) as refusal:
        try_out(recorder_of(tiny_architecture(model_type)))
    assert type(tiny_architecture(model_type)).__name__ in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_is_purified_or_refused(model_type):
    assert_refused(model_type) if model_type in REFUSED else assert_purifiable(model_type)


@pytest.mark.parametrize("model_type", ["mamba", "modernbert-decoder", "recurrent_gemma"])
def test_unusual_decoders_are_purified(model_type):
    """State spaces; a model whose attribute `decoder` is its head; layers that keep their last states."""
    assert_purifiable(model_type)


@pytest.mark.parametrize(
    "flags", [{"return_dict": False, "output_hidden_states": True}, {"output_router_logits": True}]
)
def test_outputs_that_a_config_asks_for_change_nothing(flags):
    """Fails with a tuple, or if the loss of the router is added. The config keeps its fields."""
    assert_purifiable("mixtral", **flags)


@pytest.mark.parametrize("model_type", ["bart", "bert", "gemma3n_text", "rwkv", "cpmant"])
def test_what_cannot_be_purified_is_refused_by_name(model_type):
    """Another loss, a look ahead, several streams, a step in place, positions of its own."""
    assert_refused(model_type)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_pass_and_stay_as_they_are(name):
    model = tiny_family(name).train()
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    try_out(recorder_of(model))
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize("build", [tiny_blt, coconut, lambda: tiny_llama().bfloat16(), lambda: tiny_llama().half()])
def test_patches_and_half_precision_pass(build):
    try_out(recorder_of(build()))


def test_weights_that_are_not_finite_are_refused():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="LlamaForCausalLM computes NaN or infinity"):
        try_out(recorder_of(model))


def test_a_model_of_zeros_is_refused():
    model = tiny_llama()
    for weight in model.parameters():
        nn.init.zeros_(weight)
    with pytest.raises(ValueError, match="embeddings of zeros alone"):
        try_out(recorder_of(model))


def test_dropout_that_cannot_be_drawn_is_refused():
    """Fails if it is seen only when the training starts, or if the trial draws the random numbers of the training."""
    state = torch.random.get_rng_state()
    try_out(recorder_of(tiny_llama(attention_dropout=0.5)))
    assert torch.random.get_rng_state().equal(state)
    model = tiny_llama(attention_dropout=2.0)
    with pytest.raises(ValueError, match="dropout probability"):
        try_out(recorder_of(model))
