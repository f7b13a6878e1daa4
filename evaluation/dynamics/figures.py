"""Figures of a study of depth as time: results in, matplotlib figures out."""

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from evaluation.plotting import COLORS, line_style, make_panels

_CURVES = {
    "convergence": "cosine to the last state",
    "norm": "norm",
    "speed": "turn of the layer (degrees)",
    "coherence": "coherence κ of patches",
    "update_rank": "rank of updates",
}


def _draw_trajectories(results: list[dict]) -> Figure:
    """Draw curves over depth: a row a measure, a column a token group or kind, a line a model.

    The band is the standard deviation over the images, of the first model.
    """
    first = results[0]
    kinds = {name: list(first[name]) for name in _CURVES}
    figure, axes = make_panels(len(kinds), max(map(len, kinds.values())))
    for row, name in zip(axes, kinds, strict=True):
        for axis, kind in zip(row, kinds[name], strict=False):
            for number, result in enumerate(results):
                values = result[name][kind]
                mean, std = (np.array(values[key], dtype=float) for key in ("mean", "std"))
                x = np.arange(result["depth"] + 1 - len(mean), result["depth"] + 1)
                axis.plot(x, mean, label=result["model"], **line_style(number))
                if number == 0:
                    axis.fill_between(x, mean - std, mean + std, color=COLORS[0], alpha=0.1, lw=0)
            axis.set_title(f"{_CURVES[name]}: {kind.replace('_', ' ')}", fontsize="small")
            axis.set_xlim(-0.3, first["depth"] + 0.3)
        for axis in row[len(kinds[name]) :]:
            axis.set_visible(False)
    axes[0, 0].legend(fontsize="x-small")
    figure.supxlabel("layer")
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
        row[0].set_ylabel("angle, share of the pushed one")
        row[0].set_ylim(bottom=0)
    axes[0, 0].legend(fontsize="x-small")
    figure.supxlabel("layer")
    return figure


def draw_study(results: list[dict]) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of every analysis that is drawn."""
    yield "trajectories", _draw_trajectories(results)
    pushed = [result for result in results if "self_correction" in result]
    if pushed:
        yield "self_correction", _draw_self_correction(pushed)
