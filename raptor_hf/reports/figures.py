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


def plot_training(log: list[dict[str, float]], path: str | Path) -> None:
    """Curves of a training against its steps: errors on the left, qualities on the right.

    Args:
        log: lines of a run's log (`loss_log.read_log`).
    """
    watching = {"step", "seconds", "learning_rate", "images_per_second"}
    names = list(dict.fromkeys(name for line in log for name in line if name not in watching))
    qualities = [name for name in names if name.endswith(("accuracy", "r2", "top5", "miou"))]
    errors = [name for name in names if name not in qualities]
    panels = [(errors, "log", "loss"), (qualities, "linear", "score (1 is perfect)")]
    panels = [panel for panel in panels if panel[0]]
    figure, axes = plt.subplots(
        1, max(1, len(panels)), figsize=(6.4 * max(1, len(panels)), 4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (shown, scale, label) in zip(axes[0], panels, strict=False):
        for name in shown:
            points = [(line["step"], line[name]) for line in log if name in line]
            few = len(points) < 20
            axis.plot(*zip(*points, strict=True), ".-" if few else "-", lw=1, label=name)
        axis.set(xlabel="step", ylabel=label, yscale=scale)
        axis.legend(fontsize="x-small", ncols=1 + len(shown) // 12)
    figure.savefig(path, dpi=110)
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


def plot_early_exit(curves: dict[str, dict[str, list[dict]]], path: str | Path) -> None:
    """Accuracy against applications, one panel a model, one line a way to make fewer.

    Args:
        curves: model -> way (`early_exit`) -> points of `applications` and `accuracy`.
    """
    figure, panels = plt.subplots(
        1, len(curves), figsize=(3.9 * len(curves), 3.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, (name, ways) in zip(panels[0], curves.items(), strict=True):
        for way, points in ways.items():
            points = sorted((p["applications"], 100 * p["accuracy"]) for p in points)
            axes.plot(*zip(*points, strict=True), ".-", label=way, ms=5)
        axes.set(xlabel="applications, mean over images", title=name)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("accuracy (%)")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def class_colours(number: int) -> dict:
    """Options of `imshow` for maps of classes."""
    colors = plt.get_cmap("tab20" if number <= 20 else "gist_ncar")(np.linspace(0, 1, number))
    return {
        "cmap": matplotlib.colors.ListedColormap(colors),
        "vmin": -0.5,
        "vmax": number - 0.5,
        "interpolation": "nearest",
    }


def class_legend(figure, class_names: list[str], colours: dict) -> None:
    """Names of the classes beside a figure, where they are few enough to be read."""
    if len(class_names) <= 20:
        marks = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colours["cmap"].colors]
        figure.legend(marks, class_names, loc="outside right center", fontsize="small")


def picture_grid(rows: int, headings: list[str], shape: tuple[int, int]):
    """A figure and its axes (rows, columns) for pictures of height × width = shape."""
    size = (1.7 * len(headings) + 1, 1.7 * shape[0] / shape[1] * rows + 0.5)
    figure, axes = plt.subplots(
        rows, len(headings), figsize=size, squeeze=False, layout="constrained"
    )
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize="small")
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def plot_class_maps(
    images: list, maps: dict[str, list[np.ndarray]], class_names: list[str], path: str | Path
) -> None:
    """Images and classes of their pixels: a row an image, a column a source; white is no class.

    Args:
        maps: heading -> classes (H, W) of every image.
    """
    colours = class_colours(len(class_names))
    figure, axes = picture_grid(len(images), ["image", *maps], np.asarray(images[0]).shape[:2])
    for row, image in enumerate(images):
        axes[row, 0].imshow(image, cmap="gray")
        for axis, source in zip(axes[row, 1:], maps.values(), strict=True):
            axis.imshow(np.ma.masked_greater_equal(source[row], len(class_names)), **colours)
    class_legend(figure, class_names, colours)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_depth_maps(images: list, maps: dict[str, list[np.ndarray]], path: str | Path) -> None:
    """The same for depth in metres, on one scale; white is unknown."""
    known = [depth[depth > 0] for source in maps.values() for depth in source]
    limits = {"vmin": min(d.min() for d in known), "vmax": max(d.max() for d in known)}
    figure, axes = picture_grid(len(images), ["image", *maps], np.asarray(images[0]).shape[:2])
    for row, image in enumerate(images):
        axes[row, 0].imshow(image, cmap="gray")
        for axis, source in zip(axes[row, 1:], maps.values(), strict=True):
            depth = np.ma.masked_less_equal(source[row], 0)
            drawn = axis.imshow(depth, cmap="viridis_r", **limits)
    figure.colorbar(drawn, ax=axes, label="depth (m)", shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_scenes(
    images: list,
    masks: list[np.ndarray],
    depths: list[np.ndarray],
    class_names: list[str],
    path: str | Path,
) -> None:
    """A sheet of scenes: image, classes and depth in metres side by side."""
    colours = class_colours(len(class_names))
    headings = ["image", "class", "depth (m)"]
    figure, axes = picture_grid(len(images), headings, masks[0].shape)
    for row, (image, mask, depth) in enumerate(zip(images, masks, depths, strict=True)):
        axes[row, 0].imshow(image, cmap="gray")
        axes[row, 1].imshow(mask, **colours)
        drawn = axes[row, 2].imshow(depth, cmap="viridis_r", vmin=1, vmax=10)
    class_legend(figure, class_names, colours)
    figure.colorbar(drawn, ax=axes[:, 2], shrink=0.6)
    figure.savefig(path, dpi=110)
    plt.close(figure)
