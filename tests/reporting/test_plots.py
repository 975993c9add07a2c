"""Pictures of a run."""

import math

from PIL import Image

from crow_hf.reporting.plots import plot_comparison, plot_training
from helpers.evaluations import comparison, evaluation


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


def test_plots_show_what_they_are_given(tmp_path):
    """A picture that does not depend on its data."""
    for attacks in (0, 200):
        plot_comparison(comparison(evaluation(attacks)).by_name, tmp_path / f"{attacks}.png")
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "200.png").read_bytes()


def test_plots_survive_rates_of_0_and_1_and_nan(tmp_path):
    """Error bars below zero, from a rate that lies a rounding error outside its interval, raise in matplotlib."""
    evaluations = comparison(evaluation(0), suspect=evaluation(200), fine_tuned=evaluation(200, right=0)).by_name
    plot_comparison(evaluations, tmp_path / "comparison.png")
    plot_training([*LOG, LOG[0] | {"loss_lm": math.nan, "step": 6}], tmp_path / "training.png")
    assert_is_picture(tmp_path / "comparison.png")
    assert_is_picture(tmp_path / "training.png")
