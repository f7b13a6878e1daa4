"""The report of a study of depth as time: one HTML file that needs nothing beside it.

The plots are pictures; a page below them walks through the layers of one token of one image, all
models side by side. Its markup, style and script are the template `dynamics.html`.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from raptor_hf.activations.store import StoredActivations
from raptor_hf.configuration_raptor import TokenLayout, phase_spans
from raptor_hf.data import ImageViews
from raptor_hf.dynamics.measures import angles, directions
from raptor_hf.dynamics.systems import Inputs, System
from raptor_hf.modeling_raptor import patch_sides
from raptor_hf.plotting import as_seen, data_uri, patch_pca_maps
from raptor_hf.reports.tables import markdown_table
from raptor_hf.runs.files import rounded, write_json
from raptor_hf.runs.folder import environment

from .claims import evaluate_claims
from .figures import draw_study
from .study import plain_images

_DIGITS = 4  # of every number of the walk
_CAPTIONS = {
    "convergence": "Cosine of each layer's state with the last one, and norms (means over the "
    "tokens of a group; the band is the spread over images of the first model).",
    "speed": "How far each layer turns a state, in degrees. Dashed: the first layer of a phase.",
    "class_basins": "Angle of cls tokens to the mean direction of their own class (without "
    "themselves) and of the nearest other one; below, paths of some images' cls tokens over the "
    "layers, coloured by class, on the first two principal components of the last layer.",
    "self_correction": "A state is pushed by ε times its length in a random direction; curves "
    "start after the layer of the push and show what is left of its angle.",
    "rank_and_coherence": "How many directions a layer's updates take, and how far patches (and "
    "their updates) point the same way.",
    "layer_swap": "Layers of the teacher replaced by others of its own: dots are random draws, "
    "bars their means.",
    "phase_contrast": "Mean distance of layers in different phases minus that within a phase.",
    "more_time": "The last block applied m more times: told the depth L (held), or L + m (free).",
    "linear_modes": "Eigenvalues of one linear map a phase, beside the unit circle; below, the "
    "cosine that the map, applied again and again, reaches with the state so many layers ahead. "
    "Dashed: standing still.",
}


def _verdict_word(seen: bool | None) -> str:
    """Return a verdict as it is shown."""
    return {True: "seen", False: "not seen", None: "–"}[seen]


def claims_page(claims: list[dict]) -> str:
    """Return the claims as Markdown: a table of verdicts, then the figures that decided."""
    models = list(claims[0]["verdicts"])
    rows = [
        [c["sentence"], c["source"], *(_verdict_word(c["verdicts"][m]["seen"]) for m in models)]
        for c in claims
    ]
    parts = ["# What we see", markdown_table(["claim", "of", *models], rows)]
    for claim in claims:
        lines = [f"**{claim['sentence']}** ({claim['source']}). Seen if: {claim['criterion']}."]
        lines += [
            f"- {model}: {_verdict_word(verdict['seen'])}. {verdict['figures']}"
            for model, verdict in claim["verdicts"].items()
            if verdict["seen"] is not None
        ]
        parts.append("\n".join([lines[0], "", *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def png(picture: Figure | Image.Image) -> bytes:
    """Encode a picture as a PNG file; a plot with no more colours than it needs."""
    file = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(file, format="png", dpi=100)
        picture = Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def token_names(layout: TokenLayout, grid: tuple[int, int]) -> list[str]:
    """Return what every token of a state is called, in their order."""
    height, width = grid
    return [
        *["cls"] * layout.num_cls,
        *(f"register {n + 1}" for n in range(layout.num_registers)),
        *(f"patch, row {n // width + 1}, column {n % width + 1}" for n in range(height * width)),
    ]


def walk_rows(images: ImageViews | StoredActivations, number: int) -> list[int]:
    """Return rows of the walk: images of as many classes as there are, first ones first."""
    rows, labels = plain_images(images)
    nth = np.zeros(len(labels), dtype=int)  # of its class
    for label in np.unique(labels):
        nth[labels == label] = np.arange((labels == label).sum())
    return rows[np.lexsort((labels, nth))[:number]].tolist()


@torch.no_grad()
def walk_through(inputs: Inputs, rows: Sequence[int]) -> dict | None:
    """Return what the page shows of some images.

    Args:
        inputs: models and images; the first model is what others are compared to.
        rows: which images.

    Returns:
        `models` with their `spans`, `tokens`, `grid` and `images`: for each its `name`, `picture`
        (None where only states are stored), and by model `maps` (a picture a layer) and for every
        token `turns` (L numbers, degrees), `norms` and `cosines` to the first model (L + 1). None
        where there is nothing to show.
    """
    if not rows:
        return None
    (systems, images, processor, class_names), walked, grid = inputs, [], None
    for row in rows:
        batch = images.__getitems__([int(row)])
        states = [system.trajectory(batch)[0].cpu().double() for system in systems]
        grid = grid or patch_grid(systems[0], batch, states[0].shape[1])
        patches = systems[0].layout.groups()["patches"]
        maps = patch_pca_maps(
            [states_of_model[:, patches].numpy() for states_of_model in states], grid
        )
        first = directions(states[0])
        label, picture = int(batch["label"][0]), None
        if processor is not None:
            picture = _pixels_uri(as_seen(batch["pixel_values"][0], processor))
        walked.append(
            {
                "name": f"image {int(batch['image_id'][0])}, class "
                f"{class_names[label] if class_names else label}",
                "picture": picture,
                "maps": [[_pixels_uri(layer) for layer in model] for model in maps.models],
                "turns": [angles(f[:-1], f[1:]).T.tolist() for f in states],
                "norms": [f.norm(dim=-1).T.tolist() for f in states],
                "cosines": [(directions(f) * first).sum(dim=-1).T.tolist() for f in states],
            }
        )
    return {
        "models": [system.name for system in systems],
        "spans": [phase_spans(system.phases) if system.phases else [] for system in systems],
        "tokens": token_names(systems[0].layout, grid),
        "prefix": systems[0].layout.num_prefix_tokens,
        "grid": grid,
        "images": walked,
    }


def patch_grid(
    system: System, batch: Mapping[str, torch.Tensor], num_tokens: int
) -> tuple[int, int]:
    """Return the patches in a column and in a row; of stored states they are taken for a square."""
    if "pixel_values" in batch:
        sides = zip(batch["pixel_values"].shape[2:], patch_sides(system.model.config), strict=True)
        return tuple(pixels // side for pixels, side in sides)
    number = num_tokens - system.layout.num_prefix_tokens
    height = next(n for n in range(int(number**0.5), 0, -1) if number % n == 0)
    return height, number // height


def _pixels_uri(pixels: np.ndarray) -> str:
    """Encode colours (H, W, 3), bytes or numbers from 0 to 1, as the address of a picture."""
    if pixels.dtype != np.uint8:
        pixels = (255 * pixels).round().astype(np.uint8)
    return data_uri(png(Image.fromarray(pixels)), "png")


def write_report(
    path: str | Path,
    *,
    template: str | Path,
    study: dict,
    figures: Mapping[str, bytes],
    walk: dict | None,
) -> None:
    """Write the HTML file.

    Args:
        template: `evaluation/dynamics/dynamics.html`.
        study: what `evaluation.dynamics` writes as JSON: `data`, `models`, `claims`.
        figures: PNG files by name, of the figures of `draw_study`.
        walk: as from `walk_through`; None leaves the page out.
    """
    source = Path(template).read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    models = [result["model"] for result in study["models"]]
    if walk is not None:  # inside <script>: no tag can begin there
        walk = json.dumps(rounded(walk, _DIGITS), separators=(",", ":")).replace("<", "\\u003c")
    html = page.from_string(source).render(
        study=study,
        models=models,
        figures=[
            {
                "name": name.replace("_", " "),
                "uri": data_uri(content, "png"),
                "caption": _CAPTIONS[name],
            }
            for name, content in figures.items()
        ],
        word=_verdict_word,
        walk=walk,
    )
    Path(path).write_text(html, encoding="utf-8")


def write_study(
    folder: str | Path,
    results: list[dict],
    inputs: Inputs,
    *,
    about: dict,
    template: str | Path,
    walk_images: int,
) -> str:
    """Write a study: `dynamics.json`, `what_we_see.md`, a picture an analysis, `dynamics.html`.

    Args:
        results: of `study_models`, one a model.
        inputs: the models and images that they are about.
        about: what the JSON says first: `data`, `split`.
        template: `evaluation/dynamics/dynamics.html`.
        walk_images: images that the page walks through; 0: no walk.

    Returns:
        The table of claims in Markdown.
    """
    folder = Path(folder)
    study = {**about, "num_images": results[0]["num_images"], "environment": environment()}
    study |= {"claims": evaluate_claims(results), "models": results}
    write_json(folder / "dynamics.json", rounded(study))
    page = claims_page(study["claims"])
    (folder / "what_we_see.md").write_text(page, encoding="utf-8")
    figures = {name: png(figure) for name, figure in draw_study(results)}
    for name, content in figures.items():
        (folder / f"{name}.png").write_bytes(content)
    walk = walk_through(inputs, walk_rows(inputs.images, walk_images))
    write_report(
        folder / "dynamics.html", template=template, study=study, figures=figures, walk=walk
    )
    return page.split("\n\n")[1]
