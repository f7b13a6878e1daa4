"""Panels and line styles that the figures of `evaluation` share."""

import numpy as np
from matplotlib.figure import Figure

from raptor_hf.reports.figures import make_figure

COLORS = [
    "#222222", "#1f6fb4", "#d2550f", "#2a8f5a", "#6a51a3", "#8c564b", "#c2185b", "#b8860b",
    "#17a2b8", "#9acd32",
]  # fmt: skip
GREY = "#9a9a9a"  # of whatever a figure is compared with
_MARKERS = "os^Dvx*P<h"


def make_panels(rows: int, columns: int, **options) -> tuple[Figure, np.ndarray]:
    """Make a figure and its axes, (rows, columns); options as in `make_figure`."""
    size = (3.4 * columns + 0.6, 2.8 * rows + 0.4)
    figure, axes = make_figure(rows, columns, figsize=size, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize="small")
    return figure, axes


def line_style(number: int) -> dict:
    """Return the colour and the marker of a series: both differ between series."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "ms": 3.5,
        "lw": 1.2,
    }
