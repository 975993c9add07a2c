"""Tests of continuous thoughts: their inputs, and the agreement of all modes on ragged batches."""

import pytest
import torch

from helpers.coconut import BACKBONES, TEXTS, assert_same, batch_of, coconut, ids_of


def with_mode(model, mode, iterations=1):
    model.config.thought_mode, model.config.thought_iterations = mode, iterations
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_a_thought_is_the_latent_output_before_it(name):
    """The backbone gets its previous output at each thought, and the unchanged patches everywhere else."""
    model, ids, given, embedded = with_mode(coconut(name), "recompute"), ids_of(TEXTS[1]), [], []
    backbone = model.latent_transformer.backbone
    handles = [
        backbone.register_forward_pre_hook(
            lambda m, a, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
        ),
        model.local_encoder.patch_projection.register_forward_hook(lambda m, a, output: embedded.append(output)),
    ]
    outputs = model(ids)
    [handle.remove() for handle in handles]
    thoughts = outputs.thought_mask
    assert thoughts.sum() == 3 and len(given) == 4
    latent = backbone(inputs_embeds=given[-1], use_cache=False).last_hidden_state
    assert_same(given[-1][thoughts], latent.roll(1, dims=1)[thoughts])
    assert_same(given[-1][~thoughts], embedded[0][None][~thoughts])
    assert_same(with_mode(model, "sequential")(ids).logits, outputs.logits)


@torch.no_grad()
def test_a_thought_at_the_start_keeps_its_embedding():
    model = coconut()
    ids = torch.tensor([[261, 101, 102]])
    for mode in ("sequential", "recompute"):
        outputs = with_mode(model, mode)(ids, output_hidden_states=True)
        state = outputs.encoder_hidden_states[-1][:, :1]
        own = model.local_encoder.pool(state, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1) > 0, 1)
        assert_same(outputs.hidden_states[0][:, :1], own)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_modes_agree_and_rows_are_independent(name):
    model, batch = coconut(name), batch_of(TEXTS)
    wanted = with_mode(model, "recompute")(**batch, output_hidden_states=True)
    found = with_mode(model, "sequential")(**batch, output_hidden_states=True)
    real = batch.attention_mask.bool()
    assert_same(found.logits[real], wanted.logits[real])
    for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert_same(one[found.patch_mask], other[found.patch_mask])
    assert_same(with_mode(model, "jacobi", 3)(**batch).logits[real], wanted.logits[real])
    assert not torch.allclose(with_mode(model, "jacobi", 1)(**batch).logits[real], wanted.logits[real], atol=1e-2)
    with_mode(model, "sequential")
    for row, text in enumerate(TEXTS):
        assert_same(found.logits[row, real[row]], model(ids_of(text)).logits[0])


def test_modes_agree_on_gradients():
    gradients = []
    for mode in ("sequential", "recompute", "jacobi"):
        model = with_mode(coconut(), mode, 3)
        batch = batch_of(TEXTS, "right")
        labels = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)
        model(**batch, labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert_same(gradients[1], gradients[0])
    assert_same(gradients[2], gradients[0])
