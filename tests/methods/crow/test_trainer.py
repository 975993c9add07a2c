"""Tests of training and evaluation with CrowTrainer, against slow oracles, transformers' Trainer and itself."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer

from crow_hf import CrowConfig, CrowDataCollator, CrowTrainer, prepare_dataset
from crow_hf.methods.crow import trainer as trainer_module
from helpers.crow import BATCH, METRICS, SGD, build, column, lora, step_logs
from helpers.oracles import slow_crow, watched_forward
from helpers.tiny import crow_args, pad_rows, ragged_rows, same_weights, tiny_gpt2, weights_of


SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.fixture(scope="module")
def same_steps_split_differently(tmp_path_factory, rows, tiny_llama):
    """Trainers after four optimizer steps over ragged rows, two of them short, by size of the micro-batch."""
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
    """
    Fails if the loss is a mean of micro-batch means or if a gradient is lost: both change the first to third digit.
    """
    whole, split = same_steps_split_differently[8], same_steps_split_differently[micro_batch]
    for name in ["loss", "grad_norm"]:
        assert column(split, name) == pytest.approx(column(whole, name), rel=1e-5, abs=1e-5), name
    for found, wanted in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["loss_lm", "consistency_clean", "consistency_perturbed"])
@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_logged_parts_are_those_of_the_whole_step(micro_batch, name, same_steps_split_differently):
    """The logged terms are means over tokens and positions, like the loss, and not over micro-batches."""
    whole, split = same_steps_split_differently[8], same_steps_split_differently[micro_batch]
    assert column(split, name) == pytest.approx(column(whole, name), rel=1e-5, abs=1e-5)


def test_direct_call_after_training_is_the_mean_of_the_batch(same_steps_split_differently):
    """Fails if the counts of the last optimizer step are remembered."""
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
    """With micro-batches of different length, the terms are means over the whole step."""
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
    """A step of 0.1 in every coordinate, on embeddings of standard deviation 0.2, gives a ratio of about one half."""
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
    """With epsilon 0, the two passes can differ only in their dropout masks."""
    settings = {"epsilon": 0.0, "max_steps": 3, "learning_rate": 1e-2, "activation_checkpointing": checkpointing}
    model, peft_config = (tiny_gpt2(0.5), None) if where == "model" else (tiny_llama(), lora(lora_dropout=0.5))
    trainer = build(tmp_path, model, rows, peft_config=peft_config, gradient_accumulation_steps=2, **settings)
    trainer.train()
    assert column(trainer, "consistency_perturbed") == column(trainer, "consistency_clean")
    assert len(set(column(trainer, "consistency_clean"))) == 3


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_clean_pass_that_cannot_be_kept_is_made_again(evaluates, tmp_path, rows, monkeypatch):
    """Under ZeRO-3, the clean pass is repeated with the same dropout in training, and not repeated in evaluation."""
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
    """Fails if restoring the random state freezes it."""
    model = tiny_gpt2(0.5).train()
    trainer = build(tmp_path, model, rows, epsilon=0.0)
    assert trainer.compute_loss(model, dict(BATCH)).item() != trainer.compute_loss(model, dict(BATCH)).item()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_alpha_zero_is_plain_fine_tuning(dropout, tmp_path, rows, tiny_llama):
    """
    This holds with dropout and accumulation too: the FGSM step leaves no trace in the random state.

    GPT-2 is not tested, because transformers 5.23 counts the first label of a row for classes not named *ForCausalLM.
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
    """Fails if the consistency term does not reach the optimizer."""
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
    """Mixed precision gives nearly the losses of float32, and the weights stay in float32."""
    runs = {}
    for bf16 in (False, True):
        runs[bf16] = build(tmp_path, tiny_llama(), rows, bf16=bf16, max_steps=3, epsilon=0.5, **SGD)
        runs[bf16].train()
    for name in ["loss", *METRICS]:
        assert column(runs[True], name) == pytest.approx(column(runs[False], name), rel=0.05), name
    assert column(runs[True], "loss") != column(runs[False], "loss")
    assert {parameter.dtype for parameter in runs[True].model.parameters()} == {torch.float32}


def test_bf16_weights(tmp_path, rows, tiny_llama):
    """A model in bfloat16 can be trained, and its terms are near those of the float32 model."""
    trainer = build(tmp_path, tiny_llama().bfloat16(), rows, max_steps=2)
    trainer.train()
    exact = build(tmp_path, tiny_llama(), rows, max_steps=1)
    exact.train()
    assert all(math.isfinite(loss) for loss in column(trainer, "loss"))
    assert column(trainer, "consistency_clean")[0] == pytest.approx(column(exact, "consistency_clean")[0], rel=0.05)


def test_no_hook_is_left_behind(tmp_path, rows, tiny_llama):
    """The trained model computes the same as a model loaded from its saved weights."""
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
    """Without a pad token the loss is the same, because padding never counts."""
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


def test_rows_without_an_answer_are_counted(tmp_path, byte_tokenizer, tiny_llama):
    """Fails if a report says more rows than were learned."""
    rows = Dataset.from_dict({"prompt": ["a", "long " * 9, "b"], "completion": ["x", "y", ""]})
    args = crow_args(tmp_path, max_length=16)
    assert CrowTrainer(tiny_llama(), args, rows, processing_class=byte_tokenizer).num_dropped_rows == 2


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
    """A single batch, so that its means are those of the oracle. Fails if no_grad disables the FGSM step."""
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
    """Weights and logs are bit-identical with and without an evaluation after every step."""
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
    """Predictions are only the logits. Fails if the hidden states of the whole evaluation set are kept."""
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


def test_several_evaluation_datasets_are_logged_by_name(tmp_path, rows, tiny_llama):
    trainer = build(tmp_path, tiny_llama(), rows, eval_dataset={"a": rows, "b": rows.select(range(2))})
    trainer.predict(trainer.eval_dataset["b"])
    metrics = trainer.evaluate()
    for name in ("a", "b"):
        total = metrics[f"eval_{name}_loss_lm"] + 5.5 * metrics[f"eval_{name}_consistency_perturbed"]
        assert total == pytest.approx(metrics[f"eval_{name}_loss"], rel=0.02)
    assert metrics["eval_a_loss_lm"] != metrics["eval_b_loss_lm"]
