"""Figures of a study: its results in, pictures out."""

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from raptor_hf.plotting import make_figure

from .claims import drop_rate_table, is_richer
from .statistics import interval, saturation, values_of

_COLORS = ["#1f6fb4", "#d2550f", "#2a8f5a", "#6a51a3", "#8c564b", "#c2185b", "#555555", "#b8860b",
           "#17a2b8", "#9acd32"]  # fmt: skip
_MARKERS = "os^Dvx*P<h"
_BYTES = 4  # of a stored parameter, float32


def _panels(columns: int, rows: int = 1, **options) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes, (rows, columns)."""
    size = (3.6 * columns + 0.4, 3.0 * rows + 0.4)
    figure, axes = make_figure(
        rows, columns, squeeze=False, figsize=size, layout="constrained", **options
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize="small")
    return figure, axes


def _style(number: int) -> dict:
    """Return colour and marker of a series: told apart by both."""
    return {
        "color": _COLORS[number % len(_COLORS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "ms": 4,
    }


def _gap(study: dict) -> Figure:
    """Draw ε over the layers, a line a k and a panel a token group; then ε over the bytes."""
    rows = study["gap"]
    groups, ks = list(rows[0]["to_spread"]), sorted({row["k"] for row in rows})
    figure, axes = _panels(len(groups) + 1)
    for axis, group in zip(axes[0], groups, strict=False):
        for number, k in enumerate(ks):
            curves = np.array([row["to_spread"][group] for row in rows if row["k"] == k])
            x = np.arange(1, curves.shape[1] + 1)
            axis.plot(x, curves.mean(0), lw=1.1, label=f"k = {k}", **_style(number))
            axis.fill_between(x, curves.min(0), curves.max(0), color=_COLORS[number], alpha=0.12)
        axis.set(title=group, xlabel="layer", ylim=(0, None))
    axes[0, 0].set_ylabel("ε / spread of the states")
    axes[0, 0].legend(fontsize="x-small")
    axis, end = axes[0, -1], saturation(rows)
    for k in ks:
        size = next(row["stored_parameters"] for row in rows if row["k"] == k) * _BYTES / 1e6
        mean, width = interval(values_of(rows, "gap", k=k))
        axis.errorbar(size, mean, 0 if np.isnan(width) else width, fmt="o", color="#222222")
        axis.annotate(f"{k}{' (saturated)' if k == end else ''}", (size, mean), fontsize="small",
                      xytext=(4, 4), textcoords="offset points")  # fmt: skip
    axis.set(title="all, mean over layers", xlabel="blocks, MB (float32)", ylim=(0, None))
    return figure


def _partitions(study: dict) -> Figure:
    """Draw R² and accuracy of kinds of partitions with 95 % intervals; dots are the students."""
    rows = study["partitions"]
    kinds, ks = list(dict.fromkeys(r["partition"] for r in rows)), sorted({r["k"] for r in rows})
    measures = {"r2": "R², all layers and tokens", "accuracy": "accuracy of the teacher's head"}
    measures = {name: text for name, text in measures.items() if len(values_of(rows, name))}
    figure, axes = _panels(len(measures))
    for axis, (name, text) in zip(axes[0], measures.items(), strict=True):
        for number, kind in enumerate(kinds):
            for place, k in enumerate(ks):
                values, x = values_of(rows, name, k=k, partition=kind), place + 0.2 * number - 0.3
                if not len(values):
                    continue
                mean, width = interval(values)
                axis.plot([x] * len(values), values, ".", color=_COLORS[number], alpha=0.4, ms=4)
                axis.errorbar(
                    x, mean, 0 if np.isnan(width) else width, capsize=3,
                    label=kind if place == 0 else None, **_style(number),
                )  # fmt: skip
        axis.set_xticks(range(len(ks)), [f"k = {k}" for k in ks])
        axis.set_title(text, fontsize="small")
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _similarity(study: dict) -> Figure:
    """Draw the matrix of cosine similarity of every teacher, with its three phases."""
    maps = study["maps"]
    columns = min(4, len(maps))
    figure, axes = _panels(columns, -(-len(maps) // columns))
    for axis in axes.flat:
        axis.grid(False)
        axis.axis("off")
    for axis, (name, found) in zip(axes.flat, maps.items(), strict=False):
        axis.axis("on")
        layers = len(found["distance"])
        image = axis.imshow(
            1 - np.array(found["distance"]), vmin=0, vmax=1, cmap="viridis",
            extent=(0.5, layers + 0.5, layers + 0.5, 0.5),
        )  # fmt: skip
        for cut in np.cumsum(found["phases"].get("3", []))[:-1] + 0.5:
            axis.axhline(cut, color="white", lw=1)
            axis.axvline(cut, color="white", lw=1)
        rate = found.get("drop_path_rate")
        title = name if rate is None else f"{name} (drop rate {rate:g})"
        axis.set_title(title, fontsize="small")
    figure.colorbar(image, ax=axes, label="cosine of two layers", shrink=0.6)
    return figure


def _training(study: dict) -> Figure:
    """Draw what goes with the drop rate of teachers; beside it, teachers at other times."""
    table = drop_rate_table(study)
    figure, axes = _panels(3)
    rates = table["drop rate"]
    for number, name in enumerate(list(table)[1:]):
        axis = axes[0, 0] if name in ("similarity", "contrast") else axes[0, 1]
        means = [table[name][rates == rate].mean() for rate in sorted(set(rates))]
        axis.plot(sorted(set(rates)), means, lw=1.1, label=name, **_style(number))
        axis.plot(rates, table[name], ".", color=_COLORS[number], alpha=0.4, ms=4)
    for axis in axes[0, :2]:
        axis.set_xlabel("drop rate of the teacher")
        axis.legend(fontsize="x-small")
    rows, maps = study["training"], study["maps"]
    names = [n for n in ("untrained", "early", "teacher", "overfitted") if n in maps]
    for number, (label, figures) in enumerate({
        "similarity": [maps[name]["similarity"] for name in names],
        "R² of its Raptors": [values_of(rows, "r2", teacher=name).mean() for name in names],
        "its accuracy": [maps[name]["accuracy"] for name in names],
    }.items()):  # fmt: skip
        axes[0, 2].plot(names, np.array(figures, dtype=float), lw=1.1, label=label,
                        **_style(number))  # fmt: skip
    axes[0, 2].legend(fontsize="x-small")
    axes[0, 2].set_xlabel("the teacher's training")
    return figure


def _frontier(study: dict) -> Figure:
    """Draw R² and accuracy against stored bytes: every student is a dot, a kind a line."""
    rows = study["alternatives"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    measures = {
        "r2": "R², all layers",
        "last": "R² of the last state",
        "accuracy": "accuracy of the teacher's head",
    }
    measures = {name: text for name, text in measures.items() if len(values_of(rows, name))}
    figure, axes = _panels(len(measures))
    for axis, (name, text) in zip(axes[0], measures.items(), strict=True):
        for number, kind in enumerate(kinds):
            if name == "r2" and "last state" in kind:
                continue  # they were not asked for it
            own = [row for row in rows if row["kind"] == kind]
            ks = sorted({row["k"] for row in own})
            sizes = [next(r["stored_parameters"] for r in own if r["k"] == k) for k in ks]
            means = [values_of(own, name, k=k).mean() for k in ks]
            line = {"lw": 0.7, "ls": ":"} if is_richer(kind) else {"lw": 1.2}
            x = np.array(sizes) * _BYTES / 1e6
            axis.plot(x, means, label=kind, **line, **_style(number))
            for place, k in zip(x, ks, strict=True):
                values = values_of(own, name, k=k)
                axis.plot(
                    [place] * len(values), values, ".", color=_COLORS[number % len(_COLORS)], ms=3
                )
        axis.set_title(text, fontsize="small")
        axis.set_xlabel("blocks, MB (float32)")
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside right upper",
                  fontsize="x-small")  # fmt: skip
    return figure


_FIGURES = {
    "gap": _gap,
    "partitions": _partitions,
    "alternatives": _frontier,
    "training": _training,
}


def draw(study: dict) -> Iterator[tuple[str, Figure]]:
    """Yield a name and a figure for every experiment that a study has."""
    yield "similarity", _similarity(study)
    for name, make in _FIGURES.items():
        if study.get(name):
            yield name, make(study)
