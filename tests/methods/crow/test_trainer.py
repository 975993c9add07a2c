"""CrowTrainer against slow oracles, against transformers.Trainer and against itself."""

import copy
import gc
import json
import logging
import math
import re
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    HfArgumentParser,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from crow_hf import CrowConfig, CrowDataCollator, CrowTrainer, InvarianceConfig, prepare_dataset
from crow_hf import trainer as trainer_module
from helpers.oracles import assert_equals_oracle, slow_crow, watched_forward
from helpers.tiny import crow_args, pad_rows, ragged_rows, same_weights, tiny_gpt2, weights_of


METRICS = ["loss_lm", "consistency_clean", "consistency_perturbed", "perturbation_ratio"]
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}
BATCH = pad_rows(ragged_rows(3, seed=3))


def lora(**kwargs):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **kwargs)


def build(tmp_path, model, rows, callbacks=None, eval_dataset=None, peft_config=None, compute_metrics=None, **kwargs):
    return CrowTrainer(
        model,
        crow_args(tmp_path, **kwargs),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )


def step_logs(trainer):
    """The entries of log_history that belong to optimizer steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def column(trainer, name):
    return [entry[name] for entry in step_logs(trainer)]


class At(TrainerCallback):
    """Run `action(model)` at one event of one optimizer step, counted from 1."""

    def __init__(self, event, step, action):
        def handler(args, state, control, model, **kwargs):
            if state.global_step == step - 1:
                action(model)

        setattr(self, event, handler)


def poison(name):
    """Write one NaN into the parameter called `name`."""

    def action(model):
        with torch.no_grad():
            dict(model.named_parameters())[name].view(-1)[0] = float("nan")

    return action


# The loss


@pytest.mark.parametrize("layers", ["paper", "reference"])
@pytest.mark.parametrize(("mode", "epsilon"), [("absolute", 0.1), ("relative", 0.3)])
def test_compute_loss_equals_oracle(layers, mode, epsilon, tmp_path, rows, tiny_llama):
    """Value and every parameter's gradient: no second-order term, no normed last state, no wrong mean."""
    settings = {"consistency_layers": layers, "epsilon_mode": mode, "epsilon": epsilon, "alpha": 2.5}
    trainer = build(tmp_path, tiny_llama(), rows, **settings)
    assert_equals_oracle(trainer, BATCH, alpha=2.5, epsilon=epsilon, mode=mode, layers=layers)


def llama_by_hand(model, batch, shift):
    """Llama called layer by layer on inputs_embeds: no hooks, no output_hidden_states."""
    core, length = model.model, batch["input_ids"].shape[1]
    allowed = torch.ones(length, length).tril().bool() & batch["attention_mask"].bool()[:, None, None, :]
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    states = [core.embed_tokens.weight[batch["input_ids"]] + shift]
    positions = core.rotary_emb(states[0], torch.arange(length)[None])
    for layer in core.layers:
        states.append(layer(states[-1], attention_mask=bias, position_embeddings=positions))
    return states, core.norm(states[-1]) @ model.lm_head.weight.T


def test_compute_loss_equals_layers_called_by_hand(tmp_path, rows, tiny_llama):
    """Guards the oracle too: hooks and manual calls agree."""
    model = tiny_llama()
    by_hand = slow_crow(model, BATCH, forward=llama_by_hand)["loss"]
    torch.testing.assert_close(slow_crow(model, BATCH)["loss"], by_hand, rtol=1e-5, atol=1e-5)
    loss = build(tmp_path, model, rows).compute_loss(model, dict(BATCH))
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-5)


def test_tied_embeddings(tmp_path, rows, tiny_llama):
    """A perturbation written into the shared weight would reach the head, and its gradient with it."""
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
    """Extra columns of padding change neither the loss nor a gradient, whatever id they hold."""
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
    """The published code calls zero_grad() here. Every .grad keeps its bits until backward, which adds to it."""
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
    """The FGSM backward stops at the embeddings: it creates no .grad."""
    model = tiny_llama()
    build(tmp_path, model, rows).compute_loss(model, dict(BATCH))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_order_of_micro_batches_does_not_matter(tmp_path, rows, tiny_llama):
    """Nothing is carried from one call to the next: losses are bit-equal in either order."""
    model = tiny_llama()
    trainer = build(tmp_path, model, rows)
    batches = [pad_rows(ragged_rows(2, seed=seed)) for seed in range(4)]
    forth = [trainer.compute_loss(model, dict(batch)).item() for batch in batches]
    back = [trainer.compute_loss(model, dict(batch)).item() for batch in reversed(batches)]
    assert forth == back[::-1]


def test_order_of_micro_batches_within_a_step_does_not_matter(tmp_path, tiny_llama):
    """The same inside training, where both terms are shares of the whole step."""

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
    """The clean pass's logits and hidden states are freed before the second forward pass of a step begins."""
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


# Training


SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.fixture(scope="module")
def same_steps_split_differently(tmp_path_factory, rows, tiny_llama):
    """Four optimizer steps over ragged rows, two of them short, by size of the micro-batch."""
    runs = {}
    for micro_batch, steps in SPLITS:
        settings = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": steps}
        trainer = build(tmp_path_factory.mktemp("run"), tiny_llama(), rows, num_train_epochs=2, **settings, **SGD)
        trainer.train()
        assert len(step_logs(trainer)) == 4
        runs[micro_batch] = trainer
    return runs


@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_accumulation_is_exact(micro_batch, same_steps_split_differently):
    """A mean of micro-batch means, or a wiped gradient, would differ in the first or third digit."""
    whole, split = same_steps_split_differently[8], same_steps_split_differently[micro_batch]
    for name in ["loss", "grad_norm"]:
        assert column(split, name) == pytest.approx(column(whole, name), rel=1e-5, abs=1e-5), name
    for found, wanted in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["loss_lm", "consistency_clean", "consistency_perturbed"])
@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_logged_parts_are_those_of_the_whole_step(micro_batch, name, same_steps_split_differently):
    """The logged parts weigh tokens and positions as the loss does, not micro-batches."""
    whole, split = same_steps_split_differently[8], same_steps_split_differently[micro_batch]
    assert column(split, name) == pytest.approx(column(whole, name), rel=1e-5, abs=1e-5)


def test_direct_call_after_training_is_the_mean_of_the_batch(same_steps_split_differently):
    """Counts of the last optimizer step must not be remembered."""
    trainer = same_steps_split_differently[2]
    expected = slow_crow(copy.deepcopy(trainer.model), BATCH)["loss"]
    for training in (True, False):
        loss = trainer.compute_loss(trainer.model.train(training), dict(BATCH))
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3}, {"logging_steps": 2}, {"alpha": 0.7}])
def test_logged_loss_is_the_sum_of_its_parts(settings, tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(), rows, max_steps=4, **settings)
    trainer.train()
    alpha = settings.get("alpha", 5.5)
    assert len(step_logs(trainer)) == (2 if "logging_steps" in settings else 4)
    for entry in step_logs(trainer):
        assert entry["loss"] == pytest.approx(entry["loss_lm"] + alpha * entry["consistency_perturbed"], rel=1e-5)


def test_first_logged_step_is_the_oracle_of_the_initial_model(tmp_path, tiny_llama):
    """Micro-batches of different length: the parts are means over the whole step."""
    rows = ragged_rows(6, seed=5)
    parts = slow_crow(tiny_llama(), pad_rows(rows))
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 1}
    trainer = build(tmp_path, tiny_llama(), Dataset.from_list(rows), **settings)
    trainer.train()
    (entry,) = step_logs(trainer)
    for name, value in parts.items():
        assert entry[name] == pytest.approx(value.item(), rel=1e-4), name


def test_relative_epsilon_is_the_perturbation_ratio(tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(), rows, max_steps=2, epsilon=0.3, epsilon_mode="relative")
    trainer.train()
    assert column(trainer, "perturbation_ratio") == pytest.approx([0.3, 0.3], rel=1e-4)


def test_absolute_perturbation_ratio_grows_with_epsilon(tmp_path, rows, tiny_llama):
    """Embeddings of standard deviation 0.2 moved by 0.1 in every coordinate: about one half."""
    ratios = []
    for epsilon in (0.1, 0.2):
        trainer = build(tmp_path, tiny_llama(), rows, max_steps=1, epsilon=epsilon)
        trainer.train()
        ratios += column(trainer, "perturbation_ratio")
    assert 0.4 < ratios[0] < 0.6
    assert ratios[1] == pytest.approx(2 * ratios[0], rel=1e-4)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("where", ["model", "lora"])
def test_dropout_is_the_same_in_both_passes(where, checkpointing, tmp_path, rows, tiny_llama):
    """With epsilon 0 the two passes differ in their dropout masks or not at all."""
    settings = {"epsilon": 0.0, "max_steps": 3, "learning_rate": 1e-2, "activation_checkpointing": checkpointing}
    model, peft_config = (tiny_gpt2(0.5), None) if where == "model" else (tiny_llama(), lora(lora_dropout=0.5))
    trainer = build(tmp_path, model, rows, peft_config=peft_config, gradient_accumulation_steps=2, **settings)
    trainer.train()
    assert column(trainer, "consistency_perturbed") == column(trainer, "consistency_clean")
    assert len(set(column(trainer, "consistency_clean"))) == 3


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_clean_pass_that_cannot_be_kept_is_made_again(evaluates, tmp_path, rows, monkeypatch):
    """Under ZeRO-3: other dropout the second time, no second time, or one for nothing in evaluation."""
    weights, passes = [], []
    for zero3 in (False, True):
        model = tiny_gpt2(0.5)
        trainer = build(tmp_path, model, rows, eval_dataset=rows, max_steps=2, learning_rate=1e-2)
        monkeypatch.setattr(trainer_module, "is_deepspeed_zero3_enabled", lambda zero3=zero3: zero3)
        calls = []
        handle = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.evaluate() if evaluates else trainer.train()
        handle.remove()
        weights.append(weights_of(model))
        passes.append(len(calls))
    assert same_weights(*weights)
    assert 2 * passes[1] == (2 if evaluates else 3) * passes[0]


def test_dropout_is_drawn_anew_for_every_batch(tmp_path, rows):
    """Replaying the random state must not freeze it."""
    model = tiny_gpt2(0.5).train()
    trainer = build(tmp_path, model, rows, epsilon=0.0)
    assert trainer.compute_loss(model, dict(BATCH)).item() != trainer.compute_loss(model, dict(BATCH)).item()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_alpha_zero_is_plain_fine_tuning(dropout, tmp_path, rows, tiny_llama):
    """Also with dropout and accumulation: the FGSM step leaves no trace in the random state.

    Not with GPT-2: transformers 5.23 counts the first label of a row for classes not named *ForCausalLM.
    """
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2} | SGD
    crow = build(tmp_path, tiny_llama(attention_dropout=dropout), rows, alpha=0.0, **settings)
    crow.train()
    plain = Trainer(
        tiny_llama(attention_dropout=dropout),
        crow_args(tmp_path, **settings),
        train_dataset=prepare_dataset(rows, None, 1024),
        data_collator=CrowDataCollator(0),
    )
    plain.train()
    assert not same_weights(weights_of(tiny_llama()), weights_of(crow.model))
    for found, wanted in zip(crow.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert column(crow, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)


def test_alpha_changes_the_weights(tmp_path, rows, tiny_llama):
    """The consistency term reaches the optimizer."""
    results = []
    for alpha in (0.0, 5.5):
        trainer = build(tmp_path, tiny_llama(), rows, alpha=alpha, max_steps=2)
        trainer.train()
        results.append(weights_of(trainer.model))
    assert not same_weights(*results)


def test_training_lowers_the_perturbed_consistency(tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(), rows, alpha=20.0, learning_rate=1e-2, num_train_epochs=5)
    trainer.train()
    consistency = column(trainer, "consistency_perturbed")
    assert consistency[-1] < 0.8 * consistency[0]


def test_activation_checkpointing_changes_nothing(tmp_path, rows, tiny_llama):
    results = []
    for checkpointing in (False, True):
        settings = {"activation_checkpointing": checkpointing, "gradient_accumulation_steps": 2, "max_steps": 3}
        trainer = build(tmp_path, tiny_llama(), rows, **settings, **SGD)
        trainer.train()
        assert trainer.model.is_activation_checkpointing == checkpointing
        results.append((column(trainer, "loss"), trainer.model))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for found, wanted in zip(results[0][1].parameters(), results[1][1].parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_bf16(tmp_path, rows, tiny_llama):
    """Mixed precision follows the float32 run; the weights stay float32."""
    runs = {}
    for bf16 in (False, True):
        runs[bf16] = build(tmp_path, tiny_llama(), rows, bf16=bf16, max_steps=3, epsilon=0.5, **SGD)
        runs[bf16].train()
    for name in ["loss", *METRICS]:
        assert column(runs[True], name) == pytest.approx(column(runs[False], name), rel=0.05), name
    assert column(runs[True], "loss") != column(runs[False], "loss")
    assert {parameter.dtype for parameter in runs[True].model.parameters()} == {torch.float32}


def test_bf16_weights(tmp_path, rows, tiny_llama):
    """A model held in bf16 trains; its metrics are near those of the float32 model."""
    trainer = build(tmp_path, tiny_llama().bfloat16(), rows, max_steps=2)
    trainer.train()
    exact = build(tmp_path, tiny_llama(), rows, max_steps=1)
    exact.train()
    assert all(math.isfinite(loss) for loss in column(trainer, "loss"))
    assert column(trainer, "consistency_clean")[0] == pytest.approx(column(exact, "consistency_clean")[0], rel=0.05)


def test_no_hook_is_left_behind(tmp_path, rows, tiny_llama):
    """The trained model computes what its saved weights compute."""
    trainer = build(tmp_path, tiny_llama(), rows, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**inputs).logits, reloaded.eval()(**inputs).logits)


def test_stream_of_rows(tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(), rows.to_iterable_dataset(), max_steps=2)
    trainer.train()
    assert len(step_logs(trainer)) == 2


@pytest.mark.parametrize("pad_token", ["<pad>", None])
def test_text_rows_and_a_tokenizer_with_or_without_pad_token(pad_token, tmp_path, byte_tokenizer, tiny_llama):
    """Without a pad token the loss is the same: padding never counts, whatever its id."""
    texts = Dataset.from_dict({"prompt": ["a", "bcd", "ef", "g"], "completion": ["hijk", "l", "mn", "opqrst"]})
    losses = []
    for token in ("<pad>", pad_token):
        byte_tokenizer.pad_token = token
        trainer = CrowTrainer(
            tiny_llama(), crow_args(tmp_path, max_steps=2), train_dataset=texts, processing_class=byte_tokenizer
        )
        trainer.train()
        losses.append(column(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_max_length_cuts_the_training_rows(tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(), rows, max_length=6)
    assert max(map(len, trainer.train_dataset["input_ids"])) == 6


def test_all_defaults(tmp_path, rows, tiny_llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = CrowTrainer(tiny_llama(), train_dataset=rows)
    assert isinstance(trainer, Trainer) and isinstance(trainer.args, CrowConfig)
    assert trainer.args.alpha == 5.5


def test_optimizers_are_used(tmp_path, rows, tiny_llama):
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = CrowTrainer(model, crow_args(tmp_path), train_dataset=rows, optimizers=(optimizer, None))
    assert trainer.optimizer is optimizer


# Evaluation


def test_evaluation_equals_oracle(tmp_path, rows, tiny_llama):
    """One batch, so that the means are those of the oracle; no_grad must not stop the FGSM step."""
    model = tiny_llama()
    held_out = ragged_rows(5, seed=9)
    trainer = build(tmp_path, model, rows, eval_dataset=Dataset.from_list(held_out))
    assert "eval_loss" in trainer.evaluate()
    metrics = trainer.state.log_history[-1]
    parts = slow_crow(model, pad_rows(held_out))
    for name, value in parts.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4), name
    assert {f"eval_{name}" for name in METRICS} <= metrics.keys()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("peft", [False, True])
def test_evaluation_does_not_disturb_training(peft, tmp_path, rows, tiny_llama):
    """Bit-equal weights and logs with and without an evaluation after every step."""
    runs = []
    for strategy in ("no", "steps"):
        trainer = build(
            tmp_path,
            tiny_llama(),
            rows,
            eval_dataset=Dataset.from_list(ragged_rows(5, seed=9)),
            peft_config=lora() if peft else None,
            eval_strategy=strategy,
            eval_steps=1,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        runs.append(trainer)
    assert same_weights(weights_of(runs[0].model), weights_of(runs[1].model))
    for name in ["loss", *METRICS]:
        assert column(runs[0], name) == column(runs[1], name), name
    evaluations = [entry for entry in runs[1].state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4
    assert all({f"eval_{name}" for name in METRICS} <= entry.keys() for entry in evaluations)
    assert len({entry["eval_loss"] for entry in evaluations}) == 4


def test_compute_metrics_sees_clean_logits(tmp_path, rows, tiny_llama):
    """Predictions are the logits alone: no hidden states of the whole evaluation set."""
    model = tiny_llama()
    held_out = ragged_rows(4, seed=9)
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"seen": 1.0}

    dataset = Dataset.from_list(held_out)
    trainer = build(tmp_path, model, rows, eval_dataset=dataset, compute_metrics=compute_metrics)
    assert trainer.evaluate()["eval_seen"] == 1.0
    batch = pad_rows(held_out)
    logits = watched_forward(model.eval(), batch)[1]
    here = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(seen[0])[here], logits.detach()[here], rtol=1e-4, atol=1e-4)


# Adapters


def base_and_adapter(model):
    """Copies of the frozen weights and of the adapter weights."""
    weights = weights_of(model)
    adapter = {name: weight for name, weight in weights.items() if "lora_" in name}
    return {name: weight for name, weight in weights.items() if name not in adapter}, adapter


def save_adapter(model, path):
    """A trained-looking adapter on disk: B is random, not zero."""
    adapted = get_peft_model(model, lora())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(path)
    return path


def assert_only_the_adapter_trains(trainer):
    base, adapter = base_and_adapter(trainer.model)
    trainer.train()
    new_base, new_adapter = base_and_adapter(trainer.model)
    assert base and same_weights(base, new_base)
    assert adapter and not any(torch.equal(adapter[name], new_adapter[name]) for name in adapter)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fresh_lora(checkpointing, tmp_path, rows, tiny_llama):
    """Base weights keep their bits. With checkpointing the embeddings need a gradient path although they are frozen."""
    settings = {"activation_checkpointing": checkpointing, "learning_rate": 1e-2, "max_steps": 3}
    trainer = build(tmp_path, tiny_llama(), rows, peft_config=lora(), **settings)
    assert isinstance(trainer.model, PeftModel)
    assert_only_the_adapter_trains(trainer)


def test_fresh_lora_equals_oracle(tmp_path, rows, tiny_llama):
    assert_equals_oracle(build(tmp_path, tiny_llama(), rows, peft_config=lora()), BATCH)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_existing_adapter_is_trained_on(checkpointing, tmp_path, rows, tiny_llama):
    path = save_adapter(tiny_llama(), tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), path, is_trainable=True)
    settings = {"activation_checkpointing": checkpointing, "learning_rate": 1e-2, "max_steps": 3}
    trainer = build(tmp_path, model, rows, **settings)
    if not checkpointing:
        assert_equals_oracle(trainer, BATCH)
        model.zero_grad()
    assert_only_the_adapter_trains(trainer)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "new_lora"])
def test_merged_adapter(peft, tmp_path, rows, tiny_llama):
    """After merge_and_unload the model is an ordinary one, and holds the adapter."""
    path = save_adapter(tiny_llama(), tmp_path / "adapter")
    merged = PeftModel.from_pretrained(tiny_llama(), path).merge_and_unload()
    assert not same_weights(weights_of(merged), weights_of(tiny_llama()))
    # Frozen by peft while it was the base of an adapter; full fine-tuning needs it back.
    merged.requires_grad_(True)
    trainer = build(tmp_path, merged, rows, peft_config=lora() if peft else None, learning_rate=1e-2, max_steps=3)
    assert_equals_oracle(trainer, BATCH)
    trainer.model.zero_grad()
    before = weights_of(trainer.model)
    if peft:
        assert_only_the_adapter_trains(trainer)
    else:
        trainer.train()
        assert not any(torch.equal(before[name], weight) for name, weight in weights_of(trainer.model).items())


def test_saved_adapter_loads(tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(), rows, peft_config=lora(), learning_rate=1e-2, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved")
    found, wanted = (base_and_adapter(model)[1] for model in (reloaded, trainer.model))
    assert same_weights(found, wanted)


def test_adapter_and_peft_config(tmp_path, rows, tiny_llama):
    """A second adapter on top would leave the backdoored one in place."""
    with pytest.raises(ValueError, match="merge_and_unload"):
        build(tmp_path, get_peft_model(tiny_llama(), lora()), rows, peft_config=lora())


def test_frozen_adapter(tmp_path, rows, tiny_llama):
    path = save_adapter(tiny_llama(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable"):
        build(tmp_path, PeftModel.from_pretrained(tiny_llama(), path), rows)


# Models from disk


def test_model_path(tmp_path, rows, tiny_llama):
    tiny_llama(seed=5).save_pretrained(tmp_path / "model")
    trainer = build(tmp_path, str(tmp_path / "model"), rows, max_steps=1, model_init_kwargs={"dtype": "float32"})
    assert same_weights(weights_of(trainer.model), weights_of(tiny_llama(seed=5)))
    trainer.train()


def test_model_init_kwargs_are_used(tmp_path, rows, tiny_llama):
    tiny_llama().save_pretrained(tmp_path / "model")
    trainer = build(tmp_path, str(tmp_path / "model"), rows, model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.dtype == torch.bfloat16


def test_pickled_weights_are_refused(tmp_path, rows, tiny_llama):
    """A pickle can run code, and these models are suspects."""
    model, path = tiny_llama(), tmp_path / "model"
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        build(tmp_path, str(path), rows)


# Checkpoints and non-finite numbers


def trainer_dir(trainer):
    return Path(trainer.args.output_dir)


def checkpoints(trainer):
    return sorted(path.name for path in trainer_dir(trainer).glob("checkpoint-*"))


@pytest.mark.parametrize("kind", ["full", "dropout", "lora"])
def test_resume_equals_an_uninterrupted_run(kind, tmp_path, rows, tiny_llama):
    """Bit-equal weights, optimizer moments and random state included."""

    def fresh(directory):
        model = tiny_gpt2(0.2) if kind == "dropout" else tiny_llama()
        settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
        peft_config = lora() if kind == "lora" else None
        return build(directory, model, rows, peft_config=peft_config, per_device_train_batch_size=2, **settings)

    whole = fresh(tmp_path)
    whole.train()
    resumed = fresh(tmp_path)
    resumed.train(resume_from_checkpoint=str(trainer_dir(whole) / "checkpoint-2"))
    assert resumed.state.global_step == 5
    assert same_weights(weights_of(whole.model), weights_of(resumed.model))
    assert column(whole, "loss") == column(resumed, "loss")


def test_earlier_checkpoints_are_not_overwritten(tmp_path, rows, tiny_llama):
    """train() refuses before it touches anything; resuming is allowed."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    build(tmp_path, tiny_llama(), rows, **settings).train()
    again = build(tmp_path, tiny_llama(), rows, **(settings | {"max_steps": 3}))
    saved = {path: path.stat().st_mtime_ns for path in trainer_dir(again).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="resume_from_checkpoint"):
        again.train()
    assert saved == {path: path.stat().st_mtime_ns for path in saved}
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


@pytest.mark.parametrize("filtered", [True, False])
def test_non_finite_loss_names_term_and_step(filtered, tmp_path, rows, tiny_llama):
    """A NaN in the head spoils only the language-model term, in step 3. The filter of the Trainer must not hide it."""
    trainer = build(
        tmp_path,
        tiny_llama(),
        rows,
        callbacks=[At("on_step_begin", 3, poison("lm_head.weight"))],
        max_steps=5,
        save_strategy="steps",
        save_steps=1,
        logging_nan_inf_filter=filtered,
    )
    with pytest.raises(FloatingPointError, match="loss_lm") as error:
        trainer.train()
    assert "3" in re.findall(r"\d+", str(error.value))
    assert "consistency" not in str(error.value).split("loss_lm")[0]
    assert checkpoints(trainer) == ["checkpoint-1", "checkpoint-2"]
    for name in checkpoints(trainer):
        model = LlamaForCausalLM.from_pretrained(trainer_dir(trainer) / name)
        assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())


def test_non_finite_consistency_is_named(tmp_path, rows, tiny_llama):
    """An epsilon beyond float32 spoils the perturbed pass only."""
    with pytest.raises(FloatingPointError, match="consistency_perturbed"):
        build(tmp_path, tiny_llama(), rows, epsilon=1e39, max_steps=1).train()


def test_non_finite_weights_are_not_saved_as_checkpoint(tmp_path, rows, tiny_llama):
    """The step itself broke the weights, after a finite loss: the checkpoint before it is the last one."""
    callback = At("on_optimizer_step", 2, poison("model.layers.1.mlp.up_proj.weight"))
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = build(tmp_path, tiny_llama(), rows, callbacks=[callback], **settings)
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert list(trainer_dir(trainer).rglob("*.safetensors")) == [
        trainer_dir(trainer) / "checkpoint-1" / "model.safetensors"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("peft", [False, True])
def test_save_model_refuses_non_finite_weights(peft, value, tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(), rows, peft_config=lora() if peft else None)
    with torch.no_grad():
        next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad).view(-1)[-1] = value
    with pytest.raises(FloatingPointError):
        trainer.save_model(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.safetensors"))


# Bad inputs


@pytest.mark.parametrize("layers", [1, 2])
def test_too_few_layers(layers, tmp_path, rows, tiny_llama):
    with pytest.raises(ValueError, match="layers"):
        build(tmp_path, tiny_llama(num_hidden_layers=layers), rows)


def test_three_layers_are_enough(tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(num_hidden_layers=3), rows, consistency_layers="reference")
    assert_equals_oracle(trainer, BATCH, layers="reference")


def test_encoder_decoder(tmp_path, rows):
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    with pytest.raises(ValueError, match="(?i)decoder"):
        build(tmp_path, T5ForConditionalGeneration(config), rows)


@pytest.mark.parametrize(
    "dataset",
    [None, Dataset.from_dict({"input_ids": []}), Dataset.from_dict({"question": ["x"], "reply": ["y"]})],
    ids=["missing", "empty", "unusable"],
)
def test_bad_train_dataset(dataset, tmp_path, byte_tokenizer, tiny_llama):
    with pytest.raises(ValueError):
        CrowTrainer(tiny_llama(), crow_args(tmp_path), train_dataset=dataset, processing_class=byte_tokenizer)


@pytest.mark.parametrize(
    "settings",
    [
        *({name: value} for name in ("alpha", "epsilon") for value in (-0.1, float("nan"), float("inf"))),
        {"epsilon_mode": "sideways"},
        {"consistency_layers": "all"},
        {"label_smoothing_factor": 0.1},
        {"ddp_static_graph": True},
        {"ddp_find_unused_parameters": True},
        {"learning_rate": -1e-3},
        {"num_train_epochs": 0},
        {"per_device_train_batch_size": 0},
        {"gradient_accumulation_steps": 0},
        {"model_init_kwargs": "dtype=bfloat16"},
        {"model_init_kwargs": "[1]"},
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_bad_settings(settings, tmp_path):
    """The message names the setting."""
    name = "use_reentrant" if "use_reentrant" in str(settings) else next(iter(settings))
    with pytest.raises(ValueError, match=name):
        crow_args(tmp_path, **settings)


# The config


@pytest.mark.parametrize("kind", [CrowConfig, InvarianceConfig])
def test_no_token_is_written_down(kind, tmp_path):
    """By a tracker, a log or a debugger; the run itself needs them."""
    hidden = {"token": "hf_HiddenInHere", "dtype": "float32"}
    config = kind(str(tmp_path), use_cpu=True, hub_token="hf_NobodySeesThis", model_init_kwargs=dict(hidden))
    shown = [
        str(config),
        repr(config),
        config.to_json_string(),
        str(config.to_dict()),
        str(config.to_sanitized_dict()),
    ]
    assert all("float32" in text and "hf_" not in text for text in shown)
    assert config.model_init_kwargs == hidden and config.hub_token == "hf_NobodySeesThis"


def test_defaults_of_the_config(tmp_path):
    config = CrowConfig(output_dir=str(tmp_path), use_cpu=True)
    expected = {
        "alpha": 5.5,
        "epsilon": 0.1,
        "epsilon_mode": "absolute",
        "consistency_layers": "paper",
        "max_length": 1024,
        "model_init_kwargs": None,
        "learning_rate": 2e-5,
        "num_train_epochs": 3,
        "logging_steps": 1,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("alpha", [0.0, 11.0])
def test_edge_values_are_accepted(alpha, tmp_path):
    config = crow_args(tmp_path, alpha=alpha, epsilon=0.0, activation_checkpointing_kwargs={"use_reentrant": False})
    assert (config.alpha, config.epsilon) == (alpha, 0.0)


SETTINGS = {
    "alpha": 11.0,
    "epsilon": 0.25,
    "epsilon_mode": "relative",
    "consistency_layers": "reference",
    "max_length": 77,
    "learning_rate": 1e-3,
}


@pytest.mark.parametrize("source", ["arguments", "yaml"])
def test_parser(source, tmp_path):
    settings = SETTINGS | {"output_dir": str(tmp_path), "use_cpu": True}
    parser = HfArgumentParser(CrowConfig)
    if source == "arguments":
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        words += ["--model_init_kwargs", json.dumps({"dtype": "bfloat16"})]
        (config,) = parser.parse_args_into_dataclasses(words)
    else:
        lines = [f"{name}: {value}" for name, value in settings.items()]
        (tmp_path / "crow.yaml").write_text("\n".join([*lines, "model_init_kwargs:", "  dtype: bfloat16"]))
        (config,) = parser.parse_yaml_file(str(tmp_path / "crow.yaml"))
    assert isinstance(config, CrowConfig)
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
    assert config.model_init_kwargs == {"dtype": "bfloat16"}


def test_parser_help_prints(capsys):
    """A literal % in a help text breaks argparse."""
    with pytest.raises(SystemExit):
        HfArgumentParser(CrowConfig).parse_args_into_dataclasses(["--help"])
    assert "--epsilon_mode" in capsys.readouterr().out


def test_parser_refuses_a_bad_choice():
    with pytest.raises((SystemExit, ValueError)):
        HfArgumentParser(CrowConfig).parse_args_into_dataclasses(["--output_dir", "x", "--epsilon_mode", "sideways"])


# Half precision


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_float16_gradient_does_not_underflow(half, tmp_path, tiny_llama):
    """A mean over many positions has a gradient that float16 rounds to zero, and zero has no sign."""
    model = tiny_llama(max_position_embeddings=2048)
    rows = [{"input_ids": (list(range(3, 253)) * 8)[:2000]} for _ in range(4)]
    trainer = build(tmp_path, model.half() if half == "weights" else model, Dataset.from_list(rows))
    with torch.autocast("cpu", torch.float16, enabled=half == "autocast"):
        trainer.compute_loss(trainer.model, pad_rows([{**row, "labels": row["input_ids"]} for row in rows]))
    ratio = trainer._logged["train"]["perturbation_ratio"][0]
    embedding = trainer.model.get_input_embeddings().weight.float().square().mean().sqrt()
    # Every coordinate moved by epsilon: ||delta|| / ||H|| = epsilon / RMS(H).
    assert ratio[0] / ratio[1] == pytest.approx(0.1 / embedding.item(), rel=0.05)


# What must be refused or said before training


def test_folder_with_a_model_is_not_overwritten(tmp_path, rows, tiny_llama):
    """`CrowConfig("suspect")` beside `CrowTrainer("suspect")`."""
    tiny_llama().save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="choose another `output_dir`"):
        build(tmp_path, str(tmp_path / "run"), rows).train()


def test_adapter_inside_a_plain_model(tmp_path, rows, tiny_llama):
    """Another adapter of the same name would replace the suspect's, and the backdoor with it."""
    model = tiny_llama()
    model.add_adapter(LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="load_causal_lm"):
        build(tmp_path, model, rows, peft_config=LoraConfig(target_modules="all-linear"))


def test_half_precision_weights_are_pointed_out(tmp_path, rows, tiny_llama, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("crow_hf"), "propagate", True)
    build(tmp_path, tiny_llama().bfloat16(), rows)
    assert "half precision" in caplog.text


def test_several_evaluation_datasets_are_logged_by_name(tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(), rows, eval_dataset={"a": rows, "b": rows.select(range(2))})
    trainer.predict(trainer.eval_dataset["b"])
    metrics = trainer.evaluate()
    for name in ("a", "b"):
        total = metrics[f"eval_{name}_loss_lm"] + 5.5 * metrics[f"eval_{name}_consistency_perturbed"]
        assert total == pytest.approx(metrics[f"eval_{name}_loss"], rel=0.02)
    assert metrics["eval_a_loss_lm"] != metrics["eval_b_loss_lm"]
