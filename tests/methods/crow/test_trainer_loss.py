"""Tests of CrowTrainer's loss and gradients, against slow oracles and against layers called by hand."""

import copy
import gc
import weakref

import pytest
import torch
from datasets import Dataset

from crow_hf import CrowTrainer
from helpers.crow import BATCH, build
from helpers.oracles import assert_equals_oracle, slow_crow, watched_forward
from helpers.tiny import crow_args, pad_rows, ragged_rows, same_weights, tiny_gpt2, weights_of


@pytest.mark.parametrize("layers", ["paper", "reference"])
@pytest.mark.parametrize(("mode", "epsilon"), [("absolute", 0.1), ("relative", 0.3)])
def test_compute_loss_equals_oracle(layers, mode, epsilon, tmp_path, rows, tiny_llama):
    """
    Checks the value and all gradients. Fails on second-order terms, on a normalized last state, and on wrong means.
    """
    settings = {"consistency_layers": layers, "epsilon_mode": mode, "epsilon": epsilon, "alpha": 2.5}
    trainer = build(tmp_path, tiny_llama(), rows, **settings)
    assert_equals_oracle(trainer, BATCH, alpha=2.5, epsilon=epsilon, mode=mode, layers=layers)


def llama_by_hand(model, batch, shift):
    """Call Llama layer by layer on embeddings, without hooks and output_hidden_states."""
    core, length = model.model, batch["input_ids"].shape[1]
    allowed = torch.ones(length, length).tril().bool() & batch["attention_mask"].bool()[:, None, None, :]
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    states = [core.embed_tokens.weight[batch["input_ids"]] + shift]
    positions = core.rotary_emb(states[0], torch.arange(length)[None])
    for layer in core.layers:
        states.append(layer(states[-1], attention_mask=bias, position_embeddings=positions))
    return states, core.norm(states[-1]) @ model.lm_head.weight.T


def test_compute_loss_equals_layers_called_by_hand(tmp_path, rows, tiny_llama):
    """Checks the oracle too: its hooks give the states of layers called by hand."""
    model = tiny_llama()
    by_hand = slow_crow(model, BATCH, forward=llama_by_hand)["loss"]
    torch.testing.assert_close(slow_crow(model, BATCH)["loss"], by_hand, rtol=1e-5, atol=1e-5)
    loss = build(tmp_path, model, rows).compute_loss(model, dict(BATCH))
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-5)


def test_tied_embeddings(tmp_path, rows, tiny_llama):
    """Fails if the perturbation is written into the weight that embeddings and head share."""
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = weights_of(model)
    trainer = build(tmp_path, model, rows)
    assert_equals_oracle(trainer, BATCH)
    assert same_weights(before, weights_of(model))


def test_without_attention_mask_every_position_counts(tmp_path, rows, tiny_llama):
    model = tiny_llama().eval()
    batch = {name: BATCH[name] for name in ("input_ids", "labels")}
    loss = build(tmp_path, model, rows).compute_loss(model, batch)
    expected = slow_crow(model, batch | {"attention_mask": torch.ones_like(batch["input_ids"])})["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_return_outputs(tmp_path, rows, tiny_llama):
    """The outputs are those of the clean pass."""
    model = tiny_llama().eval()
    loss, outputs = build(tmp_path, model, rows).compute_loss(model, dict(BATCH), return_outputs=True)
    torch.testing.assert_close(loss, slow_crow(model, BATCH)["loss"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.logits, watched_forward(model, BATCH)[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pad_id", [0, 77])
def test_padding_never_counts(pad_id, kind, tmp_path, rows, tiny_llama):
    """More padding changes neither the loss nor a gradient, whatever ids it holds."""
    model = tiny_gpt2(0.0) if kind == "gpt2" else tiny_llama()
    trainer = build(tmp_path, model, rows)
    results = []
    for width, pad in [(None, 0), (20, pad_id)]:
        model.zero_grad()
        loss = trainer.compute_loss(model, pad_rows(ragged_rows(3, seed=3), width, pad))
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert (results[0][1] - results[1][1]).norm() <= 1e-4 * results[0][1].norm()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_accumulated_gradients_stay(checkpointing, training, tmp_path, rows, tiny_llama):
    """compute_loss changes no .grad, and backward adds to them. The published code calls zero_grad() in the loss."""
    model = tiny_llama()
    trainer = build(tmp_path, model, rows, activation_checkpointing=checkpointing)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train(training)
    before = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name].clone()
    loss = trainer.compute_loss(model, dict(BATCH))
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())
    twin = copy.deepcopy(model).eval()
    twin.zero_grad()
    loss.backward()
    slow_crow(twin, BATCH)["loss"].backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad - before[name] - other.grad).norm() <= 1e-3 * (1 + other.grad.norm()), name


def test_no_gradient_is_created(tmp_path, rows, tiny_llama):
    """The FGSM gradient stops at the embeddings and creates no .grad."""
    model = tiny_llama()
    build(tmp_path, model, rows).compute_loss(model, dict(BATCH))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_order_of_micro_batches_does_not_matter(tmp_path, rows, tiny_llama):
    """No state is carried from one call to the next: losses are bit-identical in either order."""
    model = tiny_llama()
    trainer = build(tmp_path, model, rows)
    batches = [pad_rows(ragged_rows(2, seed=seed)) for seed in range(4)]
    forth = [trainer.compute_loss(model, dict(batch)).item() for batch in batches]
    back = [trainer.compute_loss(model, dict(batch)).item() for batch in reversed(batches)]
    assert forth == back[::-1]


def test_order_of_micro_batches_within_a_step_does_not_matter(tmp_path, tiny_llama):
    """The same holds in training, where both terms are shares of the whole step."""

    def losses(order):
        seen = []

        class Recorder(CrowTrainer):
            def compute_loss(self, *args, **kwargs):
                seen.append(super().compute_loss(*args, **kwargs))
                return seen[-1]

        rows = [row for seed in order for row in ragged_rows(2, seed=seed)]
        args = crow_args(
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=1,
            train_sampling_strategy="sequential",
        )
        Recorder(tiny_llama(), args, train_dataset=Dataset.from_list(rows)).train()
        return [loss.item() for loss in seen]

    assert losses([0, 1, 2, 3]) == losses([3, 2, 1, 0])[::-1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_the_clean_pass_lies_beside_the_perturbed_one(checkpointing, tmp_path, rows, tiny_llama):
    """Logits and hidden states of the clean pass are freed before the perturbed pass begins."""
    passes, alive = [], []

    def before(module, args, kwargs):
        gc.collect()
        alive.append(sum(reference() is not None for reference in passes))

    def after(module, args, kwargs, output):
        passes.extend(weakref.ref(tensor) for tensor in (output.logits, *seen))
        seen.clear()

    model, seen = tiny_llama(), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
    build(tmp_path, model, rows, max_steps=2, activation_checkpointing=checkpointing).train()
    assert alive == [0, 0, 0, 0]
    assert len(passes) >= 4 * (1 + len(model.model.layers))


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_float16_gradient_does_not_underflow(half, tmp_path, tiny_llama):
    """Fails if the gradient is that of a mean over many positions, which float16 rounds to zero."""
    model = tiny_llama(max_position_embeddings=2048)
    rows = [{"input_ids": (list(range(3, 253)) * 8)[:2000]} for _ in range(4)]
    trainer = build(tmp_path, model.half() if half == "weights" else model, Dataset.from_list(rows))
    with torch.autocast("cpu", torch.float16, enabled=half == "autocast"):
        trainer.compute_loss(trainer.model, pad_rows([{**row, "labels": row["input_ids"]} for row in rows]))
    ratio = trainer._logged["train"]["perturbation_ratio"][0]
    embedding = trainer.model.get_input_embeddings().weight.float().square().mean().sqrt()
    # Every coordinate moves by epsilon, so ||delta|| / ||H|| = epsilon / RMS(H).
    assert ratio[0] / ratio[1] == pytest.approx(0.1 / embedding.item(), rel=0.05)
