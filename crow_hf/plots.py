"""Pictures of a run. Needs matplotlib: `pip install crow-hf[plots]`."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from .evaluation.harness import Evaluation
from .evaluation.scores import Proportion


def plot_training(log_history: list[dict[str, float]], path: str | Path) -> None:
    """
    Draw the terms of the objective over the steps.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history` of a [`CrowTrainer`].
        path (`str` or `Path`):
            The picture's file, replaced if it is there.
    """
    steps = [entry for entry in log_history if "consistency_clean" in entry and "loss" in entry]
    numbers = [entry["step"] for entry in steps]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss, consistency = figure.subplots(1, 2)
    loss.plot(numbers, [entry["loss_lm"] for entry in steps], color="C0")
    loss.set(title="Language model loss", xlabel="step", ylabel="nats per token", ylim=(0, None))
    for name, label in (("consistency_perturbed", "perturbed"), ("consistency_clean", "clean")):
        if steps and name in steps[0]:
            consistency.plot(numbers, [entry[name] for entry in steps], label=label)
    consistency.set(title="Distance between layers", xlabel="step", ylabel="mean of 1 - cos", ylim=(0, None))
    consistency.legend()
    figure.savefig(path, dpi=150)


def plot_comparison(evaluations: dict[str, Evaluation], path: str | Path) -> None:
    """
    Draw attack success and right answers of several models, with 95 % intervals.

    Args:
        evaluations (`dict[str, Evaluation]`):
            By the models' names, each with triggered prompts.
        path (`str` or `Path`):
            The picture's file, replaced if it is there.
    """
    series: dict[str, list[Proportion]] = {
        "attack success": [evaluation.triggered.target for evaluation in evaluations.values()],
        "right if triggered": [evaluation.triggered.exact_match for evaluation in evaluations.values()],
        "right if clean": [evaluation.clean.exact_match for evaluation in evaluations.values()],
    }
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, (label, shares) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(shares))]
        rates = [100 * share.rate for share in shares]
        errors = [
            [100 * (share.rate - share.low) for share in shares],
            [100 * (share.high - share.rate) for share in shares],
        ]
        axes.bar(places, rates, width, yerr=errors, capsize=3, label=label, color=("C3", "C2", "C0")[number])
    axes.set_xticks(range(len(evaluations)), list(evaluations))
    axes.set(ylabel="share of all prompts, %", ylim=(0, 108))
    figure.legend(loc="outside upper center", ncols=len(series), frameon=False)
    figure.savefig(path, dpi=150)


def plot_attack_success(rates: dict[str, dict[str, float]], path: str | Path) -> None:
    """
    Draw the attack success of several attacks after several methods, as a table of colours with the numbers in it.

    Args:
        rates (`dict[str, dict[str, float]]`):
            Shares in [0, 1], by attack and method; not every attack needs every method.
        path (`str` or `Path`):
            The picture's file, replaced if it is there.
    """
    methods = list(dict.fromkeys(method for cells in rates.values() for method in cells))
    shares = [[100 * cells.get(method, math.nan) for method in methods] for cells in rates.values()]
    figure = Figure(figsize=(2.6 + 0.62 * len(methods), 1.6 + 0.28 * len(shares)), layout="constrained")
    axes = figure.subplots()
    # One hue from light to dark: it reads the same without colour vision, and in print.
    image = axes.imshow(shares, cmap="Oranges", vmin=0, vmax=100, aspect="auto")
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            if not math.isnan(value):
                color = "white" if value > 60 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(methods)), methods, rotation=40, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(shares)), list(rates))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="attack success, % (mean of the seeds)", fraction=0.03)
    figure.savefig(path, dpi=150)
