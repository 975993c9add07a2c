"""Pictures of a run. Needs matplotlib: `pip install crow-hf[plots]`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.harness import Evaluation
from ..evaluation.scores import Proportion


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette, which reads the same with every kind of colour vision.
_BLUE, _ORANGE, _SKY = "#0072B2", "#D55E00", "#56B4E9"


def _figure(width: float, height: float) -> "Figure":
    """Of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("Plots need matplotlib: `pip install crow-hf[plots]`.") from None
    return Figure(figsize=(width, height), layout="constrained")


def plot_training(log_history: list[dict[str, float]], path: str | Path | None = None) -> "Figure":
    """
    Draw the terms of the objective over the steps.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history` of a [`CrowTrainer`].
        path (`str` or `Path`, *optional*):
            The picture's file, replaced if it is there.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ValueError`: If matplotlib is missing, or the log has no step.
    """
    steps = [entry for entry in log_history if "consistency_clean" in entry and "loss" in entry]
    if not steps:
        raise ValueError("There is no step of a training in the log: train first, with `logging_steps=1`.")
    # What JSON has no number for comes as None.
    values = {
        name: [math.nan if entry[name] is None else entry[name] for entry in steps]
        for name in ("step", "loss_lm", "consistency_perturbed", "consistency_clean")
        if name in steps[0]
    }
    figure = _figure(8, 3.2)
    loss, consistency = figure.subplots(1, 2)
    loss.plot(values["step"], values["loss_lm"], color=_BLUE, marker=".")
    loss.set(title="Language model loss", ylabel="loss (nats per token)")
    # Apart by more than their colour.
    for name, style in (("perturbed", {"color": _ORANGE, "linestyle": "--"}), ("clean", {"color": _BLUE})):
        if (term := f"consistency_{name}") in values:
            consistency.plot(values["step"], values[term], marker=".", label=name, **style)
    consistency.set(title="Distance between layers", ylabel="mean of 1 - cos (no unit)")
    consistency.legend()
    for axes in (loss, consistency):
        heights = [height for line in axes.get_lines() for height in line.get_ydata() if math.isfinite(height)]
        axes.set(xlabel="optimizer step", ylim=(0, 1.15 * max(heights, default=1)))
        axes.xaxis.get_major_locator().set_params(integer=True)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def plot_crow_training_progress(metrics: dict[str, Any], path: str | Path | None = None) -> "Figure":
    """
    Draw what [`apply_crow_to_coconut`] or [`CROWBackdoorElimination.train`] returned.

    Args:
        metrics (`dict`):
            The metrics.
        path (`str` or `Path`, *optional*):
            The picture's file, replaced if it is there.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ValueError`: If matplotlib is missing, or the metrics have no history.

    Example:

    ```python
    >>> plot_crow_training_progress(metrics, "training.png")
    ```
    """
    if not isinstance(metrics, dict) or "history" not in metrics:
        raise ValueError("`metrics` has no `history`: pass what `apply_crow_to_coconut` returned beside the model.")
    return plot_training(metrics["history"], path)


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
    looks = [{"color": _ORANGE}, {"color": _SKY, "hatch": "//", "edgecolor": "white"}, {"color": _BLUE}]
    figure = _figure(8, 3.6)
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, (label, shares) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(shares))]
        rates = [100 * share.rate for share in shares]
        errors = [
            [100 * (share.rate - share.low) for share in shares],
            [100 * (share.high - share.rate) for share in shares],
        ]
        axes.bar(places, rates, width, yerr=errors, capsize=3, label=label, **looks[number])
    axes.set_xticks(range(len(evaluations)), list(evaluations))
    axes.set(xlabel="model", ylabel="share of all prompts, %", ylim=(0, 108))
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
    figure = _figure(2.6 + 0.62 * len(methods), 1.6 + 0.28 * len(shares))
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
