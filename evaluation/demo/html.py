"""What the demo shows of an image, as HTML that holds its pictures; no server in here."""

import io
from html import escape

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from raptor_hf.plotting import data_uri, picture

from .analysis import Analysis

_TEACHER, _RAPTOR, _GREY = "#1f6fb4", "#d2550f", "#444444"
COLOURS = (
    "Colours are the first three principal components of the patches. Teacher and Raptor share "
    "their basis and scale at each layer, so the more alike the colours, the more alike the "
    "states. Colours of different layers can't be compared: each has a basis of its own."
)


def _block_names(spans: list[tuple[int, int]]) -> list[str]:
    """Return what makes each layer, the embeddings first."""
    blocks = [f"block {p}" for p, (start, stop) in enumerate(spans) for _ in range(start, stop)]
    return ["embeddings", *blocks]


def layer_view(analysis: Analysis | None, layer: int, spans: list[tuple[int, int]]) -> str:
    """Return the image and both models' patches after one layer, with what the numbers say."""
    if analysis is None:
        return '<p class="facts">Upload an image to begin.</p>'
    (teacher, raptor), explained = analysis.maps
    made_by = _block_names(spans)[layer]
    pictures = {
        "the image as the models see it": picture(analysis.image, "The resized, cropped image"),
        f"teacher, layer {layer}": picture(
            teacher[layer], f"Colours of the teacher's patches after layer {layer}"
        ),
        f"Raptor, layer {layer} ({made_by})": picture(
            raptor[layer], f"Colours of the Raptor's patches after layer {layer}"
        ),
    }
    figures = "".join(
        f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        for caption, image in pictures.items()
    )
    cls, patches = (analysis.cosines[name][layer] for name in ("cls", "patches"))
    return (
        f"<style>#strip .layer{layer} img {{outline: 3px solid var(--primary-500)}}</style>"
        f'<div class="row">{figures}</div><p class="facts">Cosine between teacher and Raptor: cls '
        f"{cls:.3f}, patches {patches:.3f} (mean). The three components hold "
        f"{explained[layer]:.0%} of the patches' variance.</p>"
    )


def layer_strip(analysis: Analysis | None, spans: list[tuple[int, int]]) -> str:
    """Return both models' patches after every layer, as a table with a column a layer."""
    if analysis is None:
        return ""
    layers = range(len(analysis.maps.explained))
    blocks = "".join(
        f'<th class="block" scope="colgroup" colspan="{stop - start}">block {p}</th>'
        for p, (start, stop) in enumerate(spans)
    )
    numbers = "".join(f'<th scope="col">{layer}</th>' for layer in layers)
    rows = ""
    for name, maps in zip(("teacher", "Raptor"), analysis.maps.models, strict=True):
        cells = (
            f'<td class="layer{i}">{picture(maps[i], f"{name}, layer {i}")}</td>' for i in layers
        )
        rows += f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>'
    return (
        '<div class="strip" role="region" tabindex="0" aria-label="All layers">'
        f'<table style="min-width: {6 + 3 * len(layers)}rem">'
        f"<colgroup><col>{'<col>' * len(layers)}</colgroup>"
        f'<thead><tr><td></td><td></td>{blocks}</tr><tr><th scope="row">layer</th>{numbers}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div><p>{COLOURS}</p>"
    )


def curves(analysis: Analysis | None, spans: list[tuple[int, int]]) -> str:
    """Return turns of the cls token, and cosines between the models, over the layers."""
    if analysis is None:
        return ""
    turns = {"teacher": analysis.teacher_angles, "Raptor": analysis.raptor_angles}
    panels = [
        (
            "How far each layer turns the cls token",
            "angle (degrees)",
            turns,
            0,
            (_TEACHER, _RAPTOR),
        ),
        (
            "Cosine between the teacher's and the Raptor's states",
            "cosine",
            analysis.cosines,
            3,
            (_GREY,) * 2,
        ),
    ]
    return '<div class="row">' + "".join(_curve(*panel, spans) for panel in panels) + "</div>"


def _curve(
    title: str,
    unit: str,
    lines: dict[str, np.ndarray],
    digits: int,
    colours: tuple[str, str],
    spans: list[tuple[int, int]],
) -> str:
    """Return two lines over the layers as an <img>, with the phases behind them.

    Args:
        lines: name -> a value for each of the last layers, or for all.
        digits: of a number in the alternative text.
    """
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")  # pyplot is not for threads
    axes = figure.subplots()
    depth = spans[-1][1]
    for (name, values), colour, style in zip(lines.items(), colours, ("o-", "s--"), strict=True):
        axes.plot(
            range(depth + 1 - len(values), depth + 1), values, style, color=colour, label=name
        )
    for p, (start, stop) in enumerate(spans):
        axes.axvspan(start + 0.5, stop + 0.5, color=("#f4f4f4", "#e2e2e2")[p % 2], lw=0)
        axes.text(
            (start + stop + 1) / 2, 1.01, f"block {p}", transform=axes.get_xaxis_transform(),
            ha="center", va="bottom", fontsize="small", color="#555555",
        )  # fmt: skip
    axes.set_title(title, pad=18)
    axes.set(xlabel="layer", ylabel=unit, xlim=(-0.5, depth + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    ranges = (
        f"{name} {values.min():.{digits}f} to {values.max():.{digits}f}"
        for name, values in lines.items()
    )
    alt = escape(f"{title}, {unit}: {', '.join(ranges)}")
    return f'<img class="curve" alt="{alt}" src="{data_uri(file.getvalue(), "svg+xml")}">'


def thumbnail(image: Image.Image, side: int = 96) -> Image.Image:
    """Return a picture of about `side` pixels; smaller images grow in whole steps."""
    if factor := side // max(image.size):
        return image.resize([factor * length for length in image.size], Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((side, side))
    return image
