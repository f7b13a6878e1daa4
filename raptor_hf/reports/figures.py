"""Figures of layer distances, accuracy and R². `report` decides which numbers are drawn."""

from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from ..plotting import make_figure


def plot_layer_distance(
    distance: np.ndarray, phases: dict[str, list[int]], path: str | Path
) -> None:
    """Draw the (L, L) distance matrix and the phases of every partition as squares on it."""
    # the matrix, with layer 1 in the upper left corner
    layers = len(distance)
    figure, axes = make_figure(figsize=(6.4, 5.4), layout="constrained")
    image = axes.imshow(distance, cmap="viridis", extent=(0.5, layers + 0.5, layers + 0.5, 0.5))

    # a square for every phase; partitions into more phases have thinner lines
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


def plot_bars(bars: dict[str, tuple[np.ndarray, np.ndarray]], path: str | Path) -> None:
    """Draw accuracy (left axis) beside R² (right axis), a pair of bars a model, mean over seeds.

    Error bars are the standard deviation over seeds, where there are several.

    Args:
        bars: label of a model -> (accuracy as % of the teacher's, R²), each (seeds,); either may be
            empty.
    """
    figure, left = make_figure(figsize=(1.6 + 1.5 * len(bars), 3.8), layout="constrained")
    sides = (
        (left, "C0", "accuracy, % of the teacher's", (90, 100)),
        (left.twinx(), "C1", "R², all tokens", (0.5, 1)),
    )
    for side, (axes, color, label, (low, high)) in enumerate(sides):
        for x, values in enumerate(bars.values()):
            mean = values[side].mean() if len(values[side]) else np.nan
            spread = values[side].std(ddof=1) if len(values[side]) > 1 else None
            axes.bar(x + 0.4 * side - 0.2, mean, 0.38, yerr=spread, color=color, capsize=4)
            low, high = np.nanmin([low, mean - (spread or 0)]), np.nanmax([high, mean])
        # limits of the published figure, or wider
        axes.set_ylim(low, high)
        axes.set_ylabel(label, color=color)
        axes.tick_params(axis="y", colors=color)
    left.set_xticks(range(len(bars)), list(bars))
    figure.savefig(path, dpi=150)


def plot_r2_per_layer(curves: dict[str, dict[str, np.ndarray]], path: str | Path) -> None:
    """Draw R² of every layer, one panel a token group, one line a model.

    Args:
        curves: model -> token group -> R² of layers 1 … L.
    """
    # not every model has registers
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
