"""Figures: arrays in, a picture out. Which numbers are drawn is decided in `report`."""

import math
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from ..plotting import make_figure


def plot_layer_distance(
    distance: np.ndarray, phases: dict[str, list[int]], path: str | Path
) -> None:
    """Draw the (L, L) distance matrix as a picture, with the cuts of every partition drawn in."""
    layers = len(distance)
    figure, axes = make_figure(figsize=(6.4, 5.4), layout="constrained")
    image = axes.imshow(distance, cmap="viridis", extent=(0.5, layers + 0.5, layers + 0.5, 0.5))
    for number, (k, lengths) in enumerate(phases.items()):
        color, width, start = f"C{number + 1}", max(1.0, 4.5 - 1.2 * number), 0.5
        for p, length in enumerate(lengths):
            square = Rectangle(
                (start, start), length, length, fill=False, color=color, lw=width,
                label=f"k = {k}: {lengths}" if p == 0 else None,
            )  # fmt: skip
            axes.add_patch(square)
            start += length
    axes.set(xlabel="layer", ylabel="layer", title="Cosine distance between layers, and the phases")
    axes.set_xticks(range(1, layers + 1))
    axes.set_yticks(range(1, layers + 1))
    figure.colorbar(image, label="mean of 1 − cosine")
    axes.legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=150)


def axis_limits(values: np.ndarray, usual: tuple[float, float], step: float) -> tuple[float, float]:
    """Return the usual limits of an axis, widened in whole steps to where the values lie."""
    low, high = usual
    # rounding first: 0.6 / 0.1 is 5.999…, and would cost a whole step
    low = min(low, step * math.floor(round(values.min() / step, 6)))
    high = max(high, step * math.ceil(round(values.max() / step, 6)))
    return low, high


def plot_bars(
    bars: dict[str, tuple[np.ndarray, np.ndarray]],
    path: str | Path,
    *,
    baseline: tuple[str, float] | None = None,
) -> None:
    """Draw accuracy (left axis) beside R² (right axis), a pair of bars a model, mean over seeds.

    Error bars are the standard deviation over seeds, where there are several.

    Args:
        bars: label of a model -> (accuracy as % of the teacher's, R²), each (seeds,); R² may be
            empty.
        baseline: name and share (% of the teacher's) of a model to draw as a dashed line.
    """
    figure, left = make_figure(figsize=(1.6 + 1.5 * len(bars), 3.8), layout="constrained")
    right = left.twinx()
    usual = {left: (90, 100), right: (0.5, 1)}
    drawn: dict = {left: [baseline[1]] if baseline else [], right: []}
    for x, values in enumerate(bars.values()):
        for side, axes, color in ((0, left, "C0"), (1, right, "C1")):
            if not len(values[side]):
                continue
            mean = values[side].mean()
            spread = values[side].std(ddof=1) if len(values[side]) > 1 else None
            axes.bar(x + 0.4 * side - 0.2, mean, 0.38, yerr=spread, color=color, capsize=4)
            drawn[axes] += [mean - (spread or 0), mean + (spread or 0)]
    for axes, step, color, label in (
        (left, 5, "C0", "accuracy, % of the teacher's"),
        (right, 0.1, "C1", "R², all tokens"),
    ):
        # an axis that is wide enough for the seeds, but never narrower than the published figure's
        axes.set_ylim(*axis_limits(np.array([*drawn[axes], *usual[axes]]), usual[axes], step))
        axes.set_ylabel(label, color=color)
        axes.tick_params(axis="y", colors=color)
    left.set_xticks(range(len(bars)), list(bars))
    if baseline:
        left.axhline(baseline[1], color="black", ls="--", lw=1, label=f"{baseline[0]}, accuracy")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", frameon=False)
    figure.savefig(path, dpi=150)


def plot_r2_per_layer(curves: dict[str, dict[str, np.ndarray]], path: str | Path) -> None:
    """Draw R² of every layer, one panel a token group, one line a model.

    Args:
        curves: model -> token group -> R² of layers 1 … L.
    """
    groups = list(dict.fromkeys(group for curve in curves.values() for group in curve))
    figure, panels = make_figure(
        1, len(groups), figsize=(3.6 * len(groups), 3.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, group in zip(panels[0], groups, strict=True):
        for name, curve in curves.items():
            if group in curve:
                axes.plot(range(1, len(curve[group]) + 1), curve[group], ".-", label=name)
        axes.set(xlabel="layer", title=group)
    panels[0][0].set_ylabel("R² on held-out images")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
