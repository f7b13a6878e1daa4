"""Figures of layer distances and R²."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def make_figure(rows: int = 1, columns: int = 1, *, figsize, **grid):
    """Make a figure and its axes as `pyplot.subplots` does, without a window or a global state.

    Args:
        rows, columns: of axes.
        figsize: of `matplotlib.figure.Figure`.
        grid: options of its `subplots`.
    """
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **grid)


def plot_layer_distance(
    distance: np.ndarray, phases: dict[str, list[int]], path: str | Path
) -> None:
    """Draw the (L, L) distance matrix and the phases of every partition as squares on it."""
    # the matrix, with layer 1 in the upper left corner
    layers = len(distance)
    figure, axes = make_figure(figsize=(6.4, 5.4))
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


def plot_r2_per_layer(curves: dict[str, dict[str, np.ndarray]], path: str | Path) -> None:
    """Draw R² of every layer, one panel a token group, one line a model.

    Args:
        curves: token group -> model -> R² of layers 1 … L.
    """
    size = (3.6 * len(curves), 3.4)
    figure, panels = make_figure(1, len(curves), figsize=size, sharey=True, squeeze=False)
    for axes, (group, models) in zip(panels[0], curves.items(), strict=True):
        for name, r2 in models.items():
            axes.plot(range(1, len(r2) + 1), r2, ".-", label=name)
        axes.set(xlabel="layer", title=group)
    panels[0][0].set_ylabel("R² on held-out images")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
