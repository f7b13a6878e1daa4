"""Figures: arrays in, a picture out. Which numbers are drawn is decided in `report`."""

import math
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def plot_layer_distance(
    distance: np.ndarray, phases: dict[str, list[int]], path: str | Path
) -> None:
    """The (L, L) distance matrix as a picture, with the cuts of every partition drawn in."""
    layers = len(distance)
    figure, axes = plt.subplots(figsize=(6.4, 5.4), layout="constrained")
    image = axes.imshow(distance, cmap="viridis", extent=(0.5, layers + 0.5, layers + 0.5, 0.5))
    for number, (k, lengths) in enumerate(phases.items()):
        color, width, start = f"C{number + 1}", max(1.0, 4.5 - 1.2 * number), 0.5
        for p, length in enumerate(lengths):
            square = plt.Rectangle(
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
    plt.close(figure)


def axis_limits(values: np.ndarray, usual: tuple[float, float], step: float) -> tuple[float, float]:
    """The usual limits of an axis, widened in whole steps to where the values lie."""
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
    """Accuracy (left axis) beside R² (right axis), a pair of bars a model, mean over seeds.

    Error bars are the standard deviation over seeds, where there are several.

    Args:
        bars: label of a model -> (accuracy as % of the teacher's, R²), each (seeds,); R² may be
            empty.
        baseline: name and share (% of the teacher's) of a model to draw as a dashed line.
    """
    figure, left = plt.subplots(figsize=(1.6 + 1.5 * len(bars), 3.8), layout="constrained")
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
    plt.close(figure)


def plot_r2_per_layer(curves: dict[str, dict[str, np.ndarray]], path: str | Path) -> None:
    """R² of every layer, one panel a token group, one line a model.

    Args:
        curves: model -> token group -> R² of layers 1 … L.
    """
    groups = list(dict.fromkeys(group for curve in curves.values() for group in curve))
    figure, panels = plt.subplots(
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
    plt.close(figure)


def plot_maps(
    images: list, maps: dict[str, list[np.ndarray]], path: str | Path, options: dict, finish
) -> None:
    """Images and maps of them side by side: a row an image, a column a source.

    Args:
        images: as matplotlib takes them.
        maps: heading -> a map (H, W) an image.
        options: of `imshow`, for the maps.
        finish: (figure, axes, the last drawn map), to add a legend.
    """
    height, width = np.asarray(maps[next(iter(maps))][0]).shape
    columns = ["image", *maps]
    size = (1.7 * len(columns) + 1, 1.7 * height / width * len(images) + 0.5)
    figure, axes = plt.subplots(
        len(images), len(columns), figsize=size, squeeze=False, layout="constrained"
    )
    for number, image in enumerate(images):
        axes[number, 0].imshow(image)
        for column, source in enumerate(maps.values(), start=1):
            drawn = axes[number, column].imshow(source[number], interpolation="nearest", **options)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize="small")
    for axis in axes.flat:
        axis.set_axis_off()
    finish(figure, axes, drawn)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_class_maps(
    images: list, maps: dict[str, list[np.ndarray]], class_names: list[str], path: str | Path
) -> None:
    """Classes of every pixel; white is no class. Few classes get a legend."""
    number = len(class_names)
    colors = plt.get_cmap("tab20" if number <= 20 else "gist_ncar")(np.linspace(0, 1, number))
    maps = {
        name: [np.ma.masked_greater_equal(classes, number) for classes in source]
        for name, source in maps.items()
    }

    def finish(figure, axes, drawn):
        if number <= 20:
            marks = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors]
            figure.legend(marks, class_names, loc="outside right center", fontsize="small")

    options = {"cmap": matplotlib.colors.ListedColormap(colors), "vmin": -0.5, "vmax": number - 0.5}
    plot_maps(images, maps, path, options, finish)


def plot_depth_maps(images: list, maps: dict[str, list[np.ndarray]], path: str | Path) -> None:
    """Depth in metres of every pixel, on one scale; white is unknown."""
    maps = {
        name: [np.ma.masked_less_equal(depth, 0) for depth in source]
        for name, source in maps.items()
    }
    nearest = min(depth.min() for source in maps.values() for depth in source)
    farthest = max(depth.max() for source in maps.values() for depth in source)

    def finish(figure, axes, drawn):
        figure.colorbar(drawn, ax=axes, label="depth (m)", shrink=0.8)

    options = {"cmap": "viridis_r", "vmin": nearest, "vmax": farthest}
    plot_maps(images, maps, path, options, finish)
