"""Images, classes and depths of their pixels, side by side."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from ..plotting import make_figure

_COLOURS = np.array(colormaps["tab20"].colors)


def _class_colours(number: int, maps: list[np.ndarray]) -> tuple[dict, list[int]]:
    """Return the options of `imshow` for maps of classes, and which classes have a colour.

    Twenty colours can be told apart: the classes with most pixels get them, the others are grey.
    """
    # the largest classes of all maps
    known = np.concatenate([classes[classes < number].ravel() for classes in maps]).astype(int)
    counts = np.bincount(known, minlength=number)
    shown = np.argsort(-counts, kind="stable")[: len(_COLOURS)]
    shown = sorted(int(label) for label in shown if counts[label])
    colours = np.full((number, 3), 0.7)
    colours[shown] = _COLOURS[: len(shown)]
    return {
        "cmap": ListedColormap(colours),
        "vmin": -0.5,
        "vmax": number - 0.5,
        "interpolation": "nearest",
    }, shown


def _class_legend(figure, class_names: list[str], colours: dict, shown: list[int]) -> None:
    """Write names of the classes that have a colour beside a figure."""
    marks = [Rectangle((0, 0), 1, 1, color=colours["cmap"].colors[label]) for label in shown]
    names = [class_names[label] for label in shown]
    if marks:
        figure.legend(marks, names, loc="outside right center", fontsize="small")


def _picture_grid(rows: int, headings: list[str], shape: tuple[int, int]):
    """Make a figure and its axes (rows, columns) for pictures of height × width = shape."""
    size = (1.7 * len(headings) + 1, 1.7 * shape[0] / shape[1] * rows + 0.5)
    figure, axes = make_figure(
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
    """Draw images and classes of their pixels: a row an image, a column a source.

    Args:
        maps: heading -> classes (H, W) of every image.
    """
    everything = [classes for source in maps.values() for classes in source]
    colours, shown = _class_colours(len(class_names), everything)
    figure, axes = _picture_grid(len(images), ["image", *maps], np.asarray(images[0]).shape[:2])
    for row, image in enumerate(images):
        axes[row, 0].imshow(image, cmap="gray")
        for axis, source in zip(axes[row, 1:], maps.values(), strict=True):
            axis.imshow(np.ma.masked_greater_equal(source[row], len(class_names)), **colours)
    _class_legend(figure, class_names, colours, shown)
    figure.savefig(path, dpi=110)


def plot_depth_maps(images: list, maps: dict[str, list[np.ndarray]], path: str | Path) -> None:
    """Draw the same for depth in metres, on one scale; white is unknown."""
    known = [depth[depth > 0] for source in maps.values() for depth in source]
    limits = {"vmin": min(d.min() for d in known), "vmax": max(d.max() for d in known)}
    figure, axes = _picture_grid(len(images), ["image", *maps], np.asarray(images[0]).shape[:2])
    for row, image in enumerate(images):
        axes[row, 0].imshow(image, cmap="gray")
        for axis, source in zip(axes[row, 1:], maps.values(), strict=True):
            depth = np.ma.masked_less_equal(source[row], 0)
            drawn = axis.imshow(depth, cmap="viridis_r", **limits)
    figure.colorbar(drawn, ax=axes, label="depth (m)", shrink=0.8)
    figure.savefig(path, dpi=110)
