"""Pictures of a run. They need matplotlib: `pip install crow-hf[plots]`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.harness import Evaluation
from ..evaluation.scores import Proportion
from .terms import CONSISTENCIES, LOSSES


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette reads the same with every kind of colour vision.
_BLUE, _ORANGE, _SKY = "#0072B2", "#D55E00", "#56B4E9"
# Lines differ by more than their colour.
_LINE_STYLES = (
    {"color": _BLUE},
    {"color": _ORANGE, "linestyle": "--"},
    {"color": _SKY, "linestyle": ":"},
)


def plot_training(log_history: list[dict[str, float]], path: str | Path | None = None) -> "Figure":
    """
    Draw the logged terms of the objective over the optimizer steps.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history` of a [`CrowTrainer`] or an [`InvarianceTrainer`].
        path (`str` or `Path`, *optional*):
            The file to save the picture to. An existing file is replaced.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ValueError`: If matplotlib is missing, or the log has no optimizer step.
    """
    terms = LOSSES | CONSISTENCIES
    steps = [entry for entry in log_history if "loss" in entry and entry.keys() & terms.keys()]
    if not steps:
        raise ValueError("The log has no optimizer step. Train first, with `logging_steps=1`.")
    figure = _figure(8, 3.2)
    loss, consistency = figure.subplots(1, 2)
    _draw_terms(loss, steps, LOSSES)
    loss.set(title="Loss", ylabel="loss (nats per token)")
    _draw_terms(consistency, steps, CONSISTENCIES)
    consistency.set(title="Distance between layers", ylabel="mean of 1 - cos (no unit)")
    for axes in (loss, consistency):
        heights = [height for line in axes.get_lines() for height in line.get_ydata() if math.isfinite(height)]
        axes.set(xlabel="optimizer step", ylim=(0, 1.15 * max(heights, default=1)))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def plot_crow_training_progress(metrics: dict[str, Any], path: str | Path | None = None) -> "Figure":
    """
    Draw the metrics of [`apply_crow_to_coconut`] or [`CROWBackdoorElimination.train`].

    Args:
        metrics (`dict`):
            The metrics.
        path (`str` or `Path`, *optional*):
            The file to save the picture to. An existing file is replaced.

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
        raise ValueError("`metrics` has no `history`: pass the metrics that `apply_crow_to_coconut` returns.")
    return plot_training(metrics["history"], path)


def plot_comparison(evaluations: dict[str, Evaluation], path: str | Path) -> None:
    """
    Draw attack success and right answers of several models, with 95 % intervals.

    Args:
        evaluations (`dict[str, Evaluation]`):
            The evaluations by the names of the models, each with triggered prompts.
        path (`str` or `Path`):
            The file to save the picture to. An existing file is replaced.
    """
    series: dict[str, list[Proportion]] = {
        "attack success": [evaluation.triggered.target for evaluation in evaluations.values()],
        "right if triggered": [evaluation.triggered.exact_match for evaluation in evaluations.values()],
        "right if clean": [evaluation.clean.exact_match for evaluation in evaluations.values()],
    }
    looks: list[dict[str, Any]] = [
        {"color": _ORANGE},
        {"color": _SKY, "hatch": "//", "edgecolor": "white"},
        {"color": _BLUE},
    ]
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
            Shares in [0, 1], by attack and method. An attack may lack some of the methods.
        path (`str` or `Path`):
            The file to save the picture to. An existing file is replaced.
    """
    methods = list(dict.fromkeys(method for cells in rates.values() for method in cells))
    shares = [[100 * cells.get(method, math.nan) for method in methods] for cells in rates.values()]
    figure = _figure(2.6 + 0.62 * len(methods), 1.6 + 0.28 * len(shares))
    axes = figure.subplots()
    # One hue from light to dark reads the same without colour vision and in print.
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


def _figure(width: float, height: float) -> "Figure":
    """Create a figure. Width and height are in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("Plots need matplotlib: `pip install crow-hf[plots]`.") from None
    return Figure(figsize=(width, height), layout="constrained")


def _draw_terms(axes: Any, steps: list[dict[str, float]], terms: dict[str, tuple[str, int]]) -> None:
    """Draw those terms that the log has. JSON stores NaN as `None`."""
    for name, (label, style) in terms.items():
        entries = [entry for entry in steps if name in entry]
        if entries:
            values = [math.nan if entry[name] is None else entry[name] for entry in entries]
            axes.plot([entry["step"] for entry in entries], values, marker=".", label=label, **_LINE_STYLES[style])
