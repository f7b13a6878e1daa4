"""Figures of a study of depth as time: results in, matplotlib figures out."""

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from evaluation.plotting import COLORS, line_style, make_panels
from raptor_hf.configuration_raptor import phase_spans
from raptor_hf.dynamics.systems import Inputs
from raptor_hf.modeling_raptor import patch_grid
from raptor_hf.plotting import as_seen, patch_pca_maps

from .study import plain_images

_CURVES = {
    "convergence": "cosine to the last state",
    "norm": "norm",
    "speed": "turn of the layer (degrees)",
    "coherence": "coherence κ of patches",
    "update_rank": "rank of updates",
}


def _draw_curve(axis, last_layer: int, values: dict, number: int, label: str) -> None:
    """Draw a mean over images that ends at the last layer, with its spread for the first model."""
    mean, std = (np.array(values[name], dtype=float) for name in ("mean", "std"))
    x = np.arange(last_layer + 1 - len(mean), last_layer + 1)
    axis.plot(x, mean, label=label, **line_style(number))
    if number == 0:
        axis.fill_between(x, mean - std, mean + std, color=COLORS[0], alpha=0.12, lw=0)


def _draw_trajectories(results: list[dict]) -> Figure:
    """Draw what the states do over depth: a row a measure, a column a token group or kind."""
    columns = max(len(results[0][name]) for name in _CURVES)
    figure, axes = make_panels(len(_CURVES), columns)
    for row, (name, title) in zip(axes, _CURVES.items(), strict=True):
        kinds = list(results[0][name])
        for axis, kind in zip(row, kinds, strict=False):
            for number, result in enumerate(results):
                _draw_curve(axis, result["depth"], result[name][kind], number, result["model"])
            axis.set_title(f"{title}: {kind}", fontsize="small")
        for axis in row[len(kinds) :]:
            axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _draw_basins(results: list[dict]) -> Figure:
    """Draw the angles to class means, and paths of cls tokens below, a column a model."""
    figure, axes = make_panels(2, len(results))
    for (above, below), result in zip(axes.T, results, strict=True):
        basins = result["class_basins"]
        for number, name in ((1, "own_angle"), (2, "other_angle")):
            label = {"own_angle": "own class", "other_angle": "nearest other"}[name]
            _draw_curve(above, result["depth"], basins[name], number, label)
        above.set_title(result["model"], fontsize="small")
        above.set_xlabel("layer")
        # paths end in a dot; a class has one colour
        paths, labels = np.array(basins["trajectories"]), np.array(basins["labels"])
        for number, label in enumerate(np.unique(labels)):
            path, color = paths[labels == label], f"C{number}"
            below.plot(*path.transpose(2, 1, 0), lw=0.6, alpha=0.5, color=color)
            below.plot(*path[:, -1].T, "o", ms=3, color=color, label=f"class {label}")
        below.set(xlabel="first component", aspect="equal")
    axes[0, 0].set_ylabel("angle to class mean (degrees)")
    axes[0, 0].legend(fontsize="x-small")
    axes[1, 0].set_ylabel("second component")
    axes[1, -1].legend(fontsize="xx-small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _draw_self_correction(results: list[dict]) -> Figure:
    """Draw the share of a push that is left: a row a token group, a column a model."""
    groups = list(results[0]["self_correction"])
    figure, axes = make_panels(len(groups), len(results), sharex=True, sharey="row")
    for row, group in zip(axes, groups, strict=True):
        for axis, result in zip(row, results, strict=True):
            pushes = result["self_correction"][group].items()
            for style, (epsilon, by_layer) in zip(("-", "--", ":"), pushes, strict=False):
                for number, (layer, angles) in enumerate(by_layer.items()):
                    left = np.array(angles["mean"]) / angles["mean"][0]
                    label = f"ε = {epsilon}" if number == 0 else None
                    x = int(layer) + np.arange(len(left))
                    axis.plot(x, left, style, lw=1.2, color=COLORS[number], label=label)
            axis.axhline(1, color="#666666", lw=0.8)
            axis.set_title(f"{result['model']}, {group}", fontsize="small")
            axis.set_xlabel("layer")
        row[0].set_ylabel("angle, share of the pushed one")
        row[0].set_ylim(bottom=0)
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _draw_more_time(results: list[dict]) -> Figure:
    """Draw further applications of the last block, the depth held (solid) or free (dashed)."""
    titles = {"convergence": "patches: cosine to x_L", "speed": "patches: turn (degrees)"}
    if all("accuracy" in result["more_time"]["held"] for result in results):
        titles["accuracy"] = "accuracy"
    figure, axes = make_panels(1, len(titles))
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        for number, result in enumerate(results):
            for depth_mode, dashes in (("held", "-"), ("free", "--")):
                values = result["more_time"][depth_mode][name]
                values = values if name == "accuracy" else values["patches"]
                y, first = np.array(values["mean"], dtype=float), int(name == "speed")
                label = f"{result['model']}, {depth_mode}"
                x = range(first, first + len(y))
                axis.plot(x, y, label=label, ls=dashes, **line_style(number + 1))
        axis.set_title(title, fontsize="small")
        axis.set_xlabel("further applications m")
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _draw_linear_modes(results: list[dict]) -> Figure:
    """Draw eigenvalues beside the unit circle, and the cosines reached; a row a model and group.

    Of a model with several partitions the one in the middle is drawn.
    """
    rows = [(result, group) for result in results for group in result["linear_modes"]]
    figure, axes = make_panels(len(rows), 2)
    circle = np.exp(2j * np.pi * np.linspace(0, 1, 200))
    for (left, right), (result, group) in zip(axes, rows, strict=True):
        phases = result["partitions"][len(result["partitions"]) // 2]
        left.plot(circle.real, circle.imag, color="#999999", lw=0.8)
        for number, (start, stop) in enumerate(phase_spans(phases), start=1):
            modes = result["linear_modes"][group][f"{start + 1}-{stop}"]
            style = line_style(number)
            label = f"layers {start + 1}–{stop}"
            left.plot(*np.array(modes["eigenvalues"]).T, **{**style, "lw": 0}, label=label)
            steps = range(1, stop - start + 1)
            right.plot(steps, modes["map"], **style, label=label)
            right.plot(steps, modes["identity"], "--", lw=1.2, color=style["color"])
        left.set(aspect="equal", xlabel="real part", ylabel="imaginary part")
        left.set_title(f"{result['model']}, {group}", fontsize="small")
        right.set(xlabel="layers ahead", ylabel="cosine (dashed: identity)")
        right.legend(fontsize="xx-small")
    return figure


_FIGURES = {
    "convergence": ("trajectories", _draw_trajectories),
    "class_basins": ("class_basins", _draw_basins),
    "self_correction": ("self_correction", _draw_self_correction),
    "more_time": ("more_time", _draw_more_time),
    "linear_modes": ("linear_modes", _draw_linear_modes),
}


def draw_study(results: list[dict]) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of every analysis that some results have."""
    for analysis, (name, draw) in _FIGURES.items():
        having = [result for result in results if result.get(analysis)]
        if having:
            yield name, draw(having)


def draw_patch_maps(inputs: Inputs, num_images: int = 3) -> Figure | None:
    """Draw the patches of some images as colours: a row a model and image, a column a layer.

    Colours are three principal components, with one basis a layer for all models. None for stored
    states, which come without their images.
    """
    systems, images, processor, _ = inputs
    if processor is None:
        return None
    panels = []
    for row in plain_images(images)[0][:num_images]:
        batch = images.__getitems__([int(row)])
        pixels, patches = batch["pixel_values"], systems[0].layout.groups()["patches"]
        states = [system.trajectory(batch)[0, :, patches].cpu().numpy() for system in systems]
        grid = patch_grid(tuple(pixels.shape[-2:]), systems[0].model.config)
        maps = patch_pca_maps(states, grid)
        for system, layers in zip(systems, maps, strict=True):
            panels.append((system.name, [as_seen(pixels[0], processor), *layers]))
    figure, axes = make_panels(len(panels), len(panels[0][1]))
    figure.set_size_inches(0.9 * axes.shape[1], 1.0 * axes.shape[0])
    for line, (name, pictures) in zip(axes, panels, strict=True):
        for column, (axis, picture) in enumerate(zip(line, pictures, strict=True)):
            axis.imshow(picture, interpolation="nearest")
            axis.axis("off")
            axis.set_title(str(column - 1) if column else name, fontsize="xx-small")
    return figure
