"""What a tracker gets: read back by TensorBoard itself."""

import logging
from pathlib import Path

import pytest
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crow_hf import CrowTrainer
from helpers.invariance import ROWS
from helpers.invariance import invariance_trainer as strong_trainer
from helpers.tiny import crow_args, ragged_rows, tiny_llama


OF_THE_TRAINER = {"loss", "grad_norm", "learning_rate"}
CROW = {"loss_lm", "consistency_clean", "consistency_perturbed", "perturbation_ratio"}
STRONG = {"distillation", "decoy", "adversarial", "consistency_perturbed"}


@pytest.fixture(autouse=True)
def event_files_beside_the_checkpoints(monkeypatch):
    """Wherever somebody's own TENSORBOARD_LOGGING_DIR points to."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)


def curves(trainer):
    """Name of each curve to its (step, value) pairs."""
    (events,) = Path(trainer.args.output_dir).rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def check_steps(trainer, found, names):
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for name in names:
        wanted = [(entry["step"], pytest.approx(entry[name], rel=1e-5)) for entry in entries]
        assert found[f"train/{name}"] == wanted, name


def test_crow_reports_its_terms_under_stable_names(tmp_path):
    """A curve renamed, lost, or of the evaluation under the name of the training."""
    args = crow_args(tmp_path, max_steps=3, report_to="tensorboard", eval_strategy="steps", eval_steps=3)
    rows = Dataset.from_list(ragged_rows(16))
    trainer = CrowTrainer(tiny_llama(), args, rows, eval_dataset=rows.select(range(8)))
    trainer.train()
    found = curves(trainer)
    check_steps(trainer, found, OF_THE_TRAINER | CROW)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    for name in CROW | {"loss"}:
        assert found[f"eval/{name}"] == [(3, pytest.approx(evaluated[f"eval_{name}"], rel=1e-5))], name
    of_the_method = {name for name in found if name.split("/")[-1] in CROW}
    assert of_the_method == {f"{mode}/{name}" for mode in ("train", "eval") for name in CROW}


def test_several_evaluation_sets_keep_their_names(tmp_path):
    rows = Dataset.from_list(ragged_rows(8))
    args = crow_args(tmp_path, max_steps=1, report_to="tensorboard", eval_strategy="steps", eval_steps=1)
    trainer = CrowTrainer(tiny_llama(), args, rows, eval_dataset={"short": rows, "long": rows})
    trainer.train()
    found = curves(trainer)
    assert {f"eval/{kind}_{name}" for kind in ("short", "long") for name in CROW | {"loss"}} <= set(found)


def test_the_strong_recipe_reports_its_terms_under_stable_names(tmp_path):
    trainer = strong_trainer(tmp_path, tiny_llama(), rows=ROWS, max_steps=3, report_to="tensorboard")
    trainer.train()
    check_steps(trainer, curves(trainer), OF_THE_TRAINER | STRONG)
