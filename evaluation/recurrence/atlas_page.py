"""The page of the atlas: README.md with tables, and a figure a teacher, made of the maps alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation.plotting import line_style, make_panels
from raptor_hf.phases.stability import boundaries
from raptor_hf.reports.tables import markdown_table

from .maps import file_name, first_cuts, load_atlas

_SHOWN_K = "3"  # of the lines in a matrix
_CURVES = {
    "speed": "turn of each layer (degrees)",
    "update_rank": "rank of each layer's update",
    "norm": "norm of states",
    "convergence": "cosine to the last state",
}
_HEAD = """---
tags:
- raptor_hf
- phases
viewer: false
---

# Atlas of phases

Where the depth of Vision Transformers falls into phases, runs of similar layers, after
"Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941). Each figure is made of the
JSON file beside it, `<name>.json`, which holds distances of layers, cuts with their stability,
speeds, ranks and norms.

In brackets: the share of bootstrap resamples of the images with exactly these phases.
"""


def write_page(folder: str | Path) -> Path | None:
    """Write `README.md` and `<name>.png` of all maps in a folder; None where there is no map."""
    folder, maps = Path(folder), load_atlas(folder)
    if not maps:
        return None
    parts = [_HEAD.rstrip(), cuts_table(maps), teachers_table(maps)]
    for one in maps:
        name = file_name(one["name"])
        draw_map(one).savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        parts += [f"## {one['name']}", f"![phase map of {one['name']}]({name}.png)"]
    page = folder / "README.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def cut_in_words(cut: dict | None) -> str:
    """Return phases and how often they come out again, as text."""
    if cut is None:
        return "–"
    if cut["phases"] is None:
        return "no partition"
    return f"{', '.join(map(str, cut['phases']))} ({100 * cut['same']:.0f} %)"


def cuts_table(maps: Sequence[dict]) -> str:
    """Return the cuts of all teachers with their stability: a row a teacher and method."""
    ks: set[int] = set()
    for one in maps:
        for cuts in one["cuts"].values():
            ks |= {int(k) for k in cuts}
    columns = sorted(ks)
    rows = []
    for one in maps:
        for method, cuts in one["cuts"].items():
            cells = [cut_in_words(cuts.get(str(k))) for k in columns]
            rows.append([one["name"].replace("|", "\\|"), method, *cells])
    return markdown_table(["teacher", "method", *(f"k = {k}" for k in columns)], rows)


def teachers_table(maps: Sequence[dict]) -> str:
    """Return the sizes of the teachers, and the images that they were mapped on."""
    rows = []
    for one in maps:
        rows.append(
            [
                one["name"].replace("|", "\\|"),
                one["model_type"],
                str(one["num_layers"]),
                str(one["num_channels"]),
                f"{one['num_parameters'] / 1e6:.3g} M",
                "×".join(map(str, one["image_size"])),
                f"{one['num_images']:,} of {one['dataset']} ({one['split']})",
                f"`{one['weights_sha256'][:12]}`",
            ]
        )
    heading = ["teacher", "type", "layers", "channels", "parameters", "pixels", "images"]
    return markdown_table([*heading, "weights (SHA-256)"], rows)


def draw_map(one: dict) -> Figure:
    """Draw a map: distances, cuts, speeds, ranks, norms, convergence."""
    figure, axes = make_panels(2, 3)
    layers = one["num_layers"]
    # distances, with the cuts of one k
    matrix = axes[0, 0]
    matrix.grid(False)
    extent = (0.5, layers + 0.5, layers + 0.5, 0.5)
    image = matrix.imshow(np.array(one["distance"]), cmap="Blues", extent=extent)
    figure.colorbar(image, ax=matrix, shrink=0.8)
    shown = first_cuts(one).get(_SHOWN_K)
    for cut in boundaries(shown["phases"]) if shown else ():
        matrix.axhline(cut + 0.5, color="#d2550f", lw=1)
        matrix.axvline(cut + 0.5, color="#d2550f", lw=1)
    matrix.set_title(f"cosine distance of layers; lines: k = {_SHOWN_K}", fontsize="small")
    _draw_cuts(axes[0, 1], one)
    # curves over depth
    for axis, (name, title) in zip(axes.flat[2:], _CURVES.items(), strict=True):
        for number, (kind, values) in enumerate(one[name].items()):
            mean = np.array(values["mean"])
            x = np.arange(layers + 1 - len(mean), layers + 1)
            axis.plot(x, mean, label=kind, **line_style(number))
        if name in ("norm", "update_rank"):
            axis.set_yscale("log")
        axis.set_title(title, fontsize="small")
        axis.set_xlabel("layer")
        axis.legend(fontsize="x-small")
    return figure


def _draw_cuts(axis, one: dict) -> None:
    """Draw the phases of every method and k as a row, phases told apart by shade."""
    rows = []
    for method, cuts in one["cuts"].items():
        for k, cut in cuts.items():
            rows.append((f"{method}, k = {k}", cut["phases"] or []))
    for y, (_, phases) in enumerate(rows):
        start = 0.5
        for phase, length in enumerate(phases):
            shade = ("#1f6fb4", "#9dc3e6")[phase % 2]
            axis.barh(y, length, left=start, color=shade, edgecolor="white", height=0.85)
            start += length
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize="x-small")
    axis.invert_yaxis()
    axis.set_xlim(0.5, one["num_layers"] + 0.5)
    axis.set_title("phases", fontsize="small")
    axis.set_xlabel("layer")
