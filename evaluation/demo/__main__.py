"""A web page that shows a teacher and its Raptor side by side on any image.

    python -m evaluation.demo

shows the digits models of `bash training/reproduce.sh digits` on http://127.0.0.1:7860 after ten
seconds. Any other pair, with examples of another dataset:

    python -m evaluation.demo --model path/to/raptor \
        --teacher facebook/dinov2-with-registers-small --dataset path/to/images --split val

Needs the extra `demo`, and `train` for the digits. GRADIO_SERVER_NAME and GRADIO_SERVER_PORT set
another address, as Spaces do.
"""

import argparse
from typing import NamedTuple

import gradio
import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from PIL import Image

from evaluation.demo.patch_maps import as_seen, patch_pca_maps
from raptor_hf import RaptorModel
from raptor_hf.configuration_raptor import token_layout
from raptor_hf.data import load_images
from raptor_hf.data.decoding import to_pixel_values
from raptor_hf.dynamics.measures import angles
from raptor_hf.modeling_raptor import patch_sides
from raptor_hf.runs.processes import run_program
from raptor_hf.teachers import load_backbone, load_processor, trajectory

_PIXELS = 240  # of the longer side of a picture, at least


class Pair(NamedTuple):
    """A teacher and its Raptor; classifiers are None for models without a head."""

    teacher: transformers.PreTrainedModel
    raptor: RaptorModel
    processor: object
    classifiers: tuple


def load_pair(teacher: str, raptor: str) -> Pair:
    """Load a teacher and its Raptor, each a folder or a Hub id.

    Raises:
        ValueError: models with another number of layers or channels.
    """
    models = [load_backbone(name) for name in (teacher, raptor)]
    sizes = [(m.config.num_hidden_layers, m.config.hidden_size) for m in models]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"A Raptor has the layers and channels of its teacher; got {sizes[0]} in the teacher "
            f"{teacher}, {sizes[1]} in {raptor}."
        )
    classifiers = []
    for name in (teacher, raptor):
        kinds = transformers.AutoConfig.from_pretrained(name).architectures or [""]
        classifies = kinds[0].endswith("ForImageClassification")
        task = "image-classification"
        classifiers.append(transformers.pipeline(task, model=name) if classifies else None)
    return Pair(*models, load_processor(raptor), tuple(classifiers))


@torch.no_grad()
def show(pair: Pair, image: Image.Image | None, layer: int) -> list:
    """Return the image as the models see it, both models' patches at a layer, the curves of the cls
    token, and both models' likeliest classes.
    """
    if image is None:
        return [None] * 6
    # all states of both models, (L + 1, N, D)
    pixel_values = to_pixel_values([image.convert("RGB")], pair.processor)
    states = [trajectory(model, pixel_values)[0] for model in (pair.teacher, pair.raptor)]
    layout, sides = token_layout(pair.raptor.config), patch_sides(pair.raptor.config)
    grid = tuple(n // side for n, side in zip(pixel_values.shape[2:], sides, strict=True))
    patches = [model_states[:, layout.groups()["patches"]].numpy() for model_states in states]
    maps = patch_pca_maps(patches, grid)[:, layer]

    seen = enlarge(as_seen(pixel_values[0], pair.processor))
    pictures = [enlarge((255 * colours).astype(np.uint8)) for colours in maps]
    figure = plot_turns(*states, pair.raptor.config.spans()) if layout.num_cls else None
    classes = []
    for classify in pair.classifiers:
        found = classify(image.convert("RGB")) if classify else []
        classes.append({one["label"]: one["score"] for one in found} or None)
    return [seen, *pictures, figure, *classes]


def enlarge(pixels: np.ndarray) -> Image.Image:
    """Return pixels (H, W, 3) as a picture that is enlarged by a whole number, without blur."""
    factor = max(1, -(-_PIXELS // max(pixels.shape[:2])))
    return Image.fromarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1))


def plot_turns(teacher: torch.Tensor, raptor: torch.Tensor, spans: list[tuple[int, int]]) -> Figure:
    """Plot how far each layer turns the cls token of both models, with the phases behind."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name, states, style in (("teacher", teacher, "o-"), ("Raptor", raptor, "s--")):
        turns = angles(states[:-1, 0].double(), states[1:, 0].double())
        axes.plot(range(1, len(states)), turns, style, label=name)
    for number, (start, stop) in enumerate(spans):
        axes.axvspan(start + 0.5, stop + 0.5, color=("#f4f4f4", "#e2e2e2")[number % 2], lw=0)
    axes.set(xlabel="layer", ylabel="turn of the cls token (degrees)")
    axes.legend()
    return figure


def build_page(pair: Pair, examples: list[Image.Image]) -> gradio.Interface:
    """Return the page: an image and a layer in, what `show` returns out."""
    depth, phases = pair.raptor.config.num_hidden_layers, list(pair.raptor.config.phases)
    names = ("the image as the models see it", "teacher's patches", "Raptor's patches")
    description = (
        f"{len(phases)} blocks make the {depth} layers of the teacher, in phases of {phases}. At "
        "each layer equal colours mean equal principal components of the patches."
    )
    return gradio.Interface(
        lambda image, layer: show(pair, image, int(layer)),
        [gradio.Image(type="pil"), gradio.Slider(0, depth, depth, step=1, label="layer")],
        [
            *(gradio.Image(label=name) for name in names),
            gradio.Plot(),
            gradio.Label(label="teacher"),
            gradio.Label(label="Raptor"),
        ],
        examples=[[image, depth] for image in examples] or None,
        cache_examples=False,
        live=True,
        api_name="show",
        flagging_mode="never",
        title="A teacher and its Raptor",
        description=description,
        analytics_enabled=False,
    )


def main(argv: list[str] | None = None) -> None:
    """Load both models, build the page, serve it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    digits = "outputs/digits"
    add = parser.add_argument
    add("--model", default=f"{digits}/seed_0/classification/models/raptor_k3", help="a Raptor")
    add("--teacher", default=f"{digits}/teacher", help="the model that it imitates")
    add("--dataset", default="digits", help="of the examples: digits, an image folder, a Hub id")
    add("--split", default="test", help="of the dataset")
    a = parser.parse_args(argv)
    examples = [row["image"] for row in load_images(a.dataset, a.split).select(range(10))]
    build_page(load_pair(a.teacher, a.model), examples).launch()


if __name__ == "__main__":
    run_program(main, alone=True)
