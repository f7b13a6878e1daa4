"""What the demo page shows of one image, as numbers: no web page in here, see `demo_page`."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from raptor_hf.configuration_raptor import token_layout
from raptor_hf.data import ImageViews, ReadingArguments, load_images
from raptor_hf.data.decoding import open_image, to_pixel_values
from raptor_hf.dynamics.measures import angles, directions
from raptor_hf.modeling_raptor import RaptorModel, patch_sides
from raptor_hf.modeling_raptor_heads import pool_tokens
from raptor_hf.plotting import PatchMaps, as_seen, patch_pca_maps
from raptor_hf.runs.processes import process_state
from raptor_hf.tasks.heads import load_linear_head
from raptor_hf.teachers import final_norm, load_backbone, load_processor, trajectory

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # others may start programs, like PostScript's
_MAKE_DIGITS = (
    "`bash training/reproduce.sh digits` makes the models that the demo shows by default, in "
    "outputs/digits."
)


class Head(NamedTuple):
    """A linear head on [cls, mean of patches], and what it calls its classes."""

    linear: nn.Linear
    names: list[str]


class Pair(NamedTuple):
    """A teacher and its Raptor, with what is needed to show them an image."""

    teacher: PreTrainedModel
    raptor: RaptorModel
    processor: object
    teacher_head: Head | None
    raptor_head: Head | None


class Analysis(NamedTuple):
    """What is shown of one image."""

    image: np.ndarray  # (H, W, 3) uint8, as the models see it: resized and cropped
    maps: PatchMaps
    teacher_angles: np.ndarray  # (L,) degrees: the turns of the cls token
    raptor_angles: np.ndarray
    cosines: dict[str, np.ndarray]  # token group -> (L + 1,), see `state_cosines`
    teacher_top: dict[str, float]  # class -> probability, best first; empty without a head
    raptor_top: dict[str, float]


def read_upload(path: str | Path, *, max_pixels: int) -> Image.Image:
    """Decode an image file that a stranger may have made; RGB, the right side up.

    Raises:
        ValueError: no PNG, JPEG, WebP, BMP or GIF, one that is broken, or one of more than
            `max_pixels`. Its words hold nothing of the file.
    """
    try:
        limit = max_pixels / 1e6
        return open_image(
            str(path), name="upload", rgb=True, max_megapixels=limit, formats=_FORMATS
        )
    except ValueError as error:
        raise ValueError(
            f"This file can't be shown: it is broken, no image, or has more than {limit:g} million "
            f"pixels. Upload a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}."
        ) from error


def model_folder(name_or_path: str, revision: str | None = None) -> str:
    """Return the local folder of a model; one of the Hub is downloaded, without pickles and code.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder without weights in safetensors.
        OSError: no such model on the Hub.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if folder.is_absolute() or name_or_path.startswith((".", "~")) or len(folder.parts) != 2:
            raise FileNotFoundError(f"{name_or_path}: no such folder. {_MAKE_DIGITS}")
        files = ["*.json", "*.safetensors"]
        folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=files))
    if not any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{name_or_path} holds no model*.safetensors; the demo reads weights from nothing else."
        )
    return str(folder)


def load_pair(
    model: str,
    teacher: str,
    *,
    teacher_head: str | None = None,
    revision: str | None = None,
    teacher_revision: str | None = None,
) -> Pair:
    """Load a Raptor and its teacher, each from a folder or the Hub, and check that they fit.

    Args:
        model: a Raptor; one with a classification head brings the names of its classes.
        teacher_head: a file or model that `load_linear_head` reads; None: no classes of the
            teacher's.

    Raises:
        ValueError: a model that is no Raptor, or a teacher or head that does not fit it.
        FileNotFoundError: no such folder or file; other OSErrors: no such model on the Hub.
    """
    model, teacher = model_folder(model, revision), model_folder(teacher, teacher_revision)
    config = AutoConfig.from_pretrained(model)
    if config.model_type != "raptor":
        raise ValueError(
            f"--model must be a Raptor; {model} is of type {config.model_type!r}. "
            "Its teacher goes to --teacher."
        )
    device = process_state().device
    student, original = load_backbone(model).to(device), load_backbone(teacher).to(device)
    check_pair(original, student)
    has_head = config.architectures == ["RaptorForImageClassification"]
    return Pair(
        original,
        student,
        load_processor(model),
        _load_head(teacher_head, student) if teacher_head else None,
        _load_head(model, student) if has_head else None,
    )


def _load_head(source: str, raptor: RaptorModel) -> Head:
    """Return a head for the Raptor's or its teacher's features; errors as `load_linear_head`."""
    linear, names = load_linear_head(source, config=raptor.config)
    names = names or [f"LABEL_{label}" for label in range(linear.out_features)]
    # ImageNet has two classes called crane
    names = [f"{n} ({label})" if names.count(n) > 1 else n for label, n in enumerate(names)]
    return Head(linear.to(raptor.device), names)


def check_pair(teacher: PreTrainedModel, raptor: PreTrainedModel) -> None:
    """Refuse a Raptor that was not made of such a teacher: a ValueError names what differs."""
    if teacher.config.model_type == "raptor":
        raise ValueError("--teacher must be the model that the Raptor imitates, not a Raptor.")

    def facts(model: PreTrainedModel) -> dict[str, object]:
        layout = token_layout(model.config)
        return {
            "layers": model.config.num_hidden_layers,
            "channels": model.config.hidden_size,
            "register tokens": layout.num_registers,
            "patch size in pixels": patch_sides(model.config),
        }

    if not token_layout(raptor.config).num_cls:
        raise ValueError(
            f"The page shows how the cls token turns, and a "
            f"{raptor.config.teacher_config.model_type!r} has none."
        )
    theirs, ours = facts(teacher), facts(raptor)
    differences = [
        f"{name}: {theirs[name]} in the teacher, {ours[name]} in the Raptor"
        for name in theirs
        if theirs[name] != ours[name]
    ]
    if differences:
        raise ValueError(
            "This Raptor was not made of this teacher: " + "; ".join(differences) + ". Give the "
            "teacher that it was distilled from."
        )


@torch.no_grad()
def analyse(pair: Pair, image: Image.Image) -> Analysis:
    """Show an image to teacher and Raptor."""
    pixel_values = to_pixel_values([image.convert("RGB")], pair.processor)
    models = (pair.teacher, pair.raptor)
    states = [trajectory(model, pixel_values.to(model.device)) for model in models]
    normed = [final_norm(model, s[:, -1]) for model, s in zip(models, states, strict=True)]
    teacher, raptor = (s[0].cpu().double() for s in states)
    groups = token_layout(pair.raptor.config).groups()
    sides = zip(pixel_values.shape[2:], patch_sides(pair.raptor.config), strict=True)
    grid = tuple(pixels // side for pixels, side in sides)
    patches = groups["patches"]
    tops = [
        top_classes(head, pool_tokens(state, pair.raptor.config))
        for head, state in zip((pair.teacher_head, pair.raptor_head), normed, strict=True)
    ]
    return Analysis(
        as_seen(pixel_values[0], pair.processor),
        patch_pca_maps([states[:, patches].numpy() for states in (teacher, raptor)], grid),
        *(angles(cls[:-1], cls[1:]).numpy() for cls in (teacher[:, 0], raptor[:, 0])),
        {name: state_cosines(teacher, raptor, groups[name]) for name in ("cls", "patches")},
        *tops,
    )


def state_cosines(teacher: torch.Tensor, raptor: torch.Tensor, group: slice) -> np.ndarray:
    """Return the cosine between two models' states (L + 1, N, D), a mean over tokens: (L + 1,)."""
    cosines = (directions(teacher[:, group]) * directions(raptor[:, group])).sum(dim=-1)
    return cosines.mean(dim=1).numpy()


def top_classes(head: Head | None, features: torch.Tensor, number: int = 5) -> dict[str, float]:
    """Return the likeliest classes of features (1, 2·D) and their probabilities, best first."""
    if head is None:
        return {}
    probabilities = head.linear(features)[0].softmax(dim=-1)
    best = probabilities.topk(min(number, len(probabilities)))
    return {
        head.names[label]: value
        for value, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    }


def pick_examples(
    dataset: str, split: str, number: int = 10, reading: ReadingArguments | None = None
) -> list[tuple[Image.Image, str]]:
    """Return the first image of each of the first classes of a dataset, with its class' name.

    Of a dataset without classes, the first images.

    Raises:
        FileNotFoundError, ValueError: as `load_images`, or an image that can't be read.
    """
    reading = reading or ReadingArguments()
    images = load_images(dataset, split, reading)
    views = ImageViews(images, None, reading=reading)
    classes, rows = np.unique(views.labels.numpy(), return_index=True)
    names = views.class_names or {label: f"class {label}" for label in classes.tolist()}
    if classes.max() < 0:
        rows, names = np.arange(len(images)), {-1: ""}
    rows = rows[:number].tolist()
    return [(Image.fromarray(views.read(row)), names[int(views.labels[row])]) for row in rows]
