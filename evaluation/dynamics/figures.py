"""Figures of a study of depth as time: results in, matplotlib figures out. Nulls are grey."""

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.plotting import COLORS, GREY, line_style, make_panels

_CURVES = {
    ("speed", "cls"): "turn of cls (degrees)",
    ("speed", "patches"): "turn of patches (degrees)",
    ("convergence", "cls"): "cosine of cls to the last state",
    ("updates", "effective rank"): "effective rank of the updates",
    ("updates", "coherence"): "coherence of the patches' updates",
    ("norm", "patches"): "norm of patches",
}


def _mean(result: dict, *keys: str) -> np.ndarray | None:
    """Return the mean over images of a figure, by its keys; None where it is missing."""
    for key in keys:
        result = result.get(key) or {}
    return np.array(result["mean"]) if result else None


def _draw_networks(axis: Axes, study: dict, *keys: str, last: int | None = None) -> None:
    """Draw a figure of every network over layers that end at `last`, by default the depth."""
    for network in study["nulls"]:
        curve = _mean(network, *keys)
        if curve is not None:
            kind = network["model"].rpartition(" ")[0]
            style = "--" if kind == "untrained" else "-"
            label = kind if network["model"].endswith(" 1") else None
            x = np.arange(len(curve)) + (last or network["depth"]) + 1 - len(curve)
            axis.plot(x, curve, style, color=GREY, lw=0.8, label=label)
    for number, network in enumerate(study["models"]):
        curve = _mean(network, *keys)
        if curve is not None:
            x = np.arange(len(curve)) + (last or network["depth"]) + 1 - len(curve)
            axis.plot(
                x,
                curve,
                label=network["model"],
                markevery=max(1, len(x) // 12),
                **line_style(number),
            )


def _draw_trajectories(study: dict) -> Figure:
    """Draw what needs states alone: a panel a measure, a line a network."""
    curves = {
        keys: name for keys, name in _CURVES.items() if _mean(study["models"][0], *keys) is not None
    }
    figure, axes = make_panels(-(-len(curves) // 2), 2)
    for axis, (keys, name) in zip(axes.flat, curves.items(), strict=False):
        _draw_networks(axis, study, *keys)
        axis.set_title(name, fontsize="small")
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    _put_legend(figure, axes[0, 0], "layer")
    return figure


def _put_legend(figure: Figure, axis: Axes, x: str) -> None:
    """Explain the lines of a panel below all panels, and name what lies along them."""
    series = axis.get_legend_handles_labels()
    figure.legend(*series, title=f"x: {x}", loc="outside lower center", ncols=6, fontsize=8)


def _draw_pushes(study: dict) -> Figure:
    """Draw a column a token group: growth of a push by network, and what the teacher leaves."""
    teacher = study["models"][0]
    groups = list(teacher["push"])
    figure, axes = make_panels(2, len(groups))
    for (top, bottom), group in zip(axes.T, groups, strict=True):
        _draw_networks(top, study, "push", group, "0", "growth")
        top.set_title(f"log length of a small push of {group}", fontsize="small")
        for number, (start, found) in enumerate(teacher["push"][group].items()):
            curves = [np.array(found[name]["mean"]) for name in ("norms_alone", "angle")]
            x = int(start) + np.arange(len(curves[0]))
            label = "norms alone" if number == 0 else None
            bottom.plot(x, curves[0], "--", color=GREY, label=label)
            bottom.plot(x, curves[1], color=COLORS[number + 1], label=f"after layer {start}")
        bottom.set_title(f"{teacher['model']}, {group}: share of the angle", fontsize="small")
        bottom.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=8)
    _put_legend(figure, axes[1, 0], "layer")
    return figure


def _draw_held(study: dict) -> Figure:
    """Draw the updates of held blocks."""
    figure, ((axis,),) = make_panels(1, 1)
    times = len(_mean(study["models"][-1], "held", "update"))
    _draw_networks(axis, study, "held", "update", last=times)
    axis.set_yscale("log")
    axis.set_title("length of an update of the held block", fontsize="small")
    axis.set_xlabel("more applications")
    axis.legend(fontsize=8)
    return figure


def draw_study(study: dict) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of every analysis that is drawn."""
    yield "trajectories", _draw_trajectories(study)
    if "push" in study["models"][0]:
        yield "pushes", _draw_pushes(study)
    if "held" in study["models"][-1]:
        yield "held", _draw_held(study)
