"""Tests of the pictures of a run."""

import math

import pytest
from datasets import Dataset
from PIL import Image

from crow_hf import CrowTrainer
from crow_hf.reporting.plots import plot_comparison, plot_crow_training_progress, plot_training
from crow_hf.reporting.terms import CONSISTENCIES, LOSSES
from helpers.evaluations import comparison, evaluation
from helpers.invariance import invariance_trainer
from helpers.tiny import crow_args, ragged_rows, tiny_llama


def assert_is_picture(path):
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) >= 200
        assert len(set(picture.convert("L").tobytes())) > 2


LOG = [
    {"loss": 2.0 / step, "loss_lm": 1.0 / step, "consistency_clean": 0.2, "consistency_perturbed": 0.3, "step": step}
    for step in range(1, 6)
] + [{"eval_loss": 1.0, "step": 5}, {"train_runtime": 1.0, "train_loss": 1.0, "step": 5}]


def test_plots_are_pictures(tmp_path):
    plot_training(LOG, tmp_path / "training.png")
    plot_comparison(comparison(evaluation(0)).by_name, str(tmp_path / "comparison.png"))
    for name in ("training", "comparison"):
        assert_is_picture(tmp_path / f"{name}.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_plots_replace_old_ones(tmp_path):
    (tmp_path / "training.png").write_text("no picture")
    plot_training(LOG, tmp_path / "training.png")
    assert_is_picture(tmp_path / "training.png")


def test_plots_depend_on_their_data(tmp_path):
    for attacks in (0, 200):
        plot_comparison(comparison(evaluation(attacks)).by_name, tmp_path / f"{attacks}.png")
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "200.png").read_bytes()


def test_plots_survive_rates_of_0_and_1_and_nan(tmp_path):
    """Fails if a rate is a rounding error outside its interval. matplotlib refuses error bars below zero."""
    evaluations = comparison(evaluation(0), suspect=evaluation(200), fine_tuned=evaluation(200, right=0)).by_name
    plot_comparison(evaluations, tmp_path / "comparison.png")
    plot_training([*LOG, LOG[0] | {"loss_lm": math.nan, "step": 6}], tmp_path / "training.png")
    assert_is_picture(tmp_path / "comparison.png")
    assert_is_picture(tmp_path / "training.png")


def crow_trainer(tmp_path, model, max_steps):
    args = crow_args(tmp_path, max_steps=max_steps)
    return CrowTrainer(model, args, Dataset.from_list(ragged_rows(8)))


@pytest.mark.parametrize(
    ("make", "losses", "consistencies"),
    [
        (crow_trainer, ["loss_lm"], ["consistency_clean", "consistency_perturbed"]),
        (invariance_trainer, ["distillation", "decoy", "adversarial"], ["consistency_perturbed"]),
    ],
    ids=["CROW", "Invariance"],
)
def test_plot_training_draws_every_term_of_a_trainer(make, losses, consistencies, tmp_path):
    """Fails if the log of one of the trainers is refused, or if a term of it is missing from the picture."""
    trainer = make(tmp_path, tiny_llama(), max_steps=3)
    trainer.train()
    figure = plot_training(trainer.state.log_history)
    for axes, names, labels in zip(figure.axes, (losses, consistencies), (LOSSES, CONSISTENCIES), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert list(lines) == [labels[name][0] for name in names]
        for name in names:
            line = lines[labels[name][0]]
            logged = [entry[name] for entry in trainer.state.log_history if name in entry]
            assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == logged
        # Lines that share a picture differ in colour and in dashes.
        assert len({line.get_color() for line in lines.values()}) == len(names)
        assert len({line.get_linestyle() for line in lines.values()}) == len(names)


def test_plots_without_a_step_are_refused():
    with pytest.raises(ValueError, match="Train first"):
        plot_training([{"eval_loss": 1.0, "step": 5}])
    with pytest.raises(ValueError, match="apply_crow_to_coconut"):
        plot_crow_training_progress({"loss": 1.0})
