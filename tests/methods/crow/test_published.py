"""Tests of the published trainer, against slow oracles and against CrowTrainer."""

import copy

import pytest
import torch
from datasets import Dataset
from torch import nn

from crow_hf import CrowDataCollator, CrowTrainer
from crow_hf.methods.crow.published import ReferenceCrowTrainer
from helpers.coconut import TOKENIZER, coconut
from helpers.oracles import slow_consistency, slow_crow, watched_forward
from helpers.tiny import crow_args, pad_rows, ragged_rows, same_weights, tiny_llama, weights_of


LEARNING_RATE = 0.05


TRAIN_ROWS = ragged_rows(6, seed=5)


def train_one_step(trainer_class, tmp_path, rows, micro_batches=1, model=None, callbacks=None, **kwargs):
    """Train one SGD step on all rows in order, with the trainer's arguments in `kwargs`."""
    args = crow_args(
        tmp_path,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=len(rows) // micro_batches,
        gradient_accumulation_steps=micro_batches,
        train_sampling_strategy="sequential",
        max_steps=1,
    )
    trainer = trainer_class(model or tiny_llama(), args, Dataset.from_list(rows), **kwargs)
    trainer.train()
    assert trainer.state.global_step == 1
    return trainer


def stepped_by_oracle(batch, layers="reference", share=1 / 3):
    """The weights after one SGD step on `batch` alone, computed by loops."""
    model = tiny_llama()
    (share * slow_crow(model, batch, layers=layers)["loss"]).backward()
    with torch.no_grad():
        return {
            name: parameter - LEARNING_RATE * (0 if parameter.grad is None else parameter.grad)
            for name, parameter in model.named_parameters()
        }


def distance(left, right):
    return sum((left[name] - right[name]).norm() for name in left) / LEARNING_RATE


def unmasked(batch):
    return batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}


def test_reference_trainer_equals_oracle(tmp_path):
    """
    Only the last of three micro-batches counts, by a third, with padding and without the last layer. Each fault is
    visible.
    """
    last = pad_rows(TRAIN_ROWS[4:])
    assert not last["attention_mask"].all()
    found = weights_of(train_one_step(ReferenceCrowTrainer, tmp_path, TRAIN_ROWS, 3).model)
    assert distance(found, stepped_by_oracle(unmasked(last))) < 1e-3
    for other in [
        stepped_by_oracle(last),
        stepped_by_oracle(unmasked(last), layers="paper"),
        stepped_by_oracle(unmasked(last), share=1),
        stepped_by_oracle(unmasked(pad_rows(TRAIN_ROWS)), share=1),
        stepped_by_oracle(unmasked(pad_rows(TRAIN_ROWS[2:4]))),
    ]:
        assert distance(found, other) > 0.1


def test_reference_trainer_loses_earlier_micro_batches(tmp_path):
    """The first four rows do not matter to ReferenceCrowTrainer, and do matter to CrowTrainer."""
    rows = ragged_rows(4, seed=6) + TRAIN_ROWS[4:]
    for trainer_class, equal in [(ReferenceCrowTrainer, True), (CrowTrainer, False)]:
        runs = [
            weights_of(train_one_step(trainer_class, tmp_path / str(number), some, 3).model)
            for number, some in enumerate([TRAIN_ROWS, rows])
        ]
        assert same_weights(*runs) is equal


def logged(trainer):
    return next(entry for entry in trainer.state.log_history if "loss_lm" in entry)


def test_reference_trainer_counts_padding(tmp_path):
    """The consistency is a mean that includes padding, also in evaluation. The language-model loss excludes it."""
    batch = pad_rows(TRAIN_ROWS, width=20)

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        padded = CrowDataCollator(0)(rows)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {name: nn.functional.pad(padded[name], (0, 20 - width), value=fill[name]) for name in padded}

    options = {"data_collator": collate, "eval_dataset": Dataset.from_list(TRAIN_ROWS)}
    states, _ = watched_forward(tiny_llama(), unmasked(batch))
    for trainer_class, mask, layers in [
        (ReferenceCrowTrainer, None, "reference"),
        (CrowTrainer, batch["attention_mask"], "paper"),
    ]:
        trainer = train_one_step(trainer_class, tmp_path, TRAIN_ROWS, **options)
        entry = logged(trainer)
        assert entry["loss_lm"] == pytest.approx(slow_crow(tiny_llama(), batch)["loss_lm"].item(), rel=1e-4)
        expected = slow_consistency(states, mask, layers).item()
        assert entry["consistency_clean"] == pytest.approx(expected, rel=1e-4)

        trainer.args.per_device_eval_batch_size = len(TRAIN_ROWS)
        model = copy.deepcopy(trainer.model)
        after, _ = watched_forward(model, unmasked(batch))
        expected = slow_consistency(after, mask, layers).item()
        assert trainer.evaluate()["eval_loss"] > 0
        found = trainer.state.log_history[-1]["eval_consistency_clean"]
        assert found == pytest.approx(expected, rel=1e-4)


def test_reference_trainer_on_a_coconut(tmp_path):
    """Padding forms patches that count in the consistency, and does not change the loss over bytes."""
    rows = [{"text": "Short."}, {"text": "A text that is much longer than the other one, by far."}]
    entries = [
        logged(train_one_step(trainer_class, tmp_path, rows, model=coconut(), processing_class=TOKENIZER))
        for trainer_class in (ReferenceCrowTrainer, CrowTrainer)
    ]
    assert entries[0]["loss_lm"] == pytest.approx(entries[1]["loss_lm"], rel=1e-5)
    assert entries[0]["consistency_clean"] != pytest.approx(entries[1]["consistency_clean"], rel=1e-3)


def test_reference_trainer_leaves_the_settings_alone(tmp_path):
    """The arguments are not changed, because the same object may be passed to CrowTrainer next."""
    args = crow_args(tmp_path)
    trainer = ReferenceCrowTrainer(tiny_llama(), args, Dataset.from_list(TRAIN_ROWS))
    assert (args.consistency_layers, trainer.args.consistency_layers) == ("paper", "reference")
