"""Tests of the results of the recipes."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from crow_hf import CrowTrainer
from crow_hf.evidence.result import Comparison, Purification
from helpers.evaluations import evaluation
from helpers.invariance import invariance_trainer
from helpers.tiny import crow_args, ragged_rows, tiny_llama


def crow_trainer(tmp_path, model):
    return CrowTrainer(model, crow_args(tmp_path), Dataset.from_list(ragged_rows(4)))


@pytest.mark.parametrize(("make", "method"), [(crow_trainer, "CROW"), (invariance_trainer, "Invariance")])
def test_method_is_that_of_the_trainer(make, method, tmp_path):
    """Fails if a table or a card names another method than the one that ran."""
    trainer = make(tmp_path, tiny_llama())
    purification = Purification(trainer.model, "a recipe", trainer)
    assert purification.method == method
    comparison = Comparison(evaluation(190), evaluation(180), evaluation(0), purification=purification)
    assert list(comparison.by_name) == ["no defence", "fine-tuning", method]


def test_evaluations_are_listed_with_the_purified_model_last():
    """Fails if the controls change places, or if a further model stands after the purified one."""
    suspect, control, purified, clean, other = map(evaluation, (190, 180, 0, 1, 2))
    others = {"clean model": clean, "other": other}
    comparison = Comparison(suspect, control, purified, others, SimpleNamespace(method="CROW"))
    names = ["no defence", "fine-tuning", "clean model", "other", "CROW"]
    assert list(comparison.by_name.items()) == list(
        zip(names, [suspect, control, clean, other, purified], strict=True)
    )
    assert list(Comparison(suspect, control, purified).by_name) == ["no defence", "fine-tuning", "purified"]
