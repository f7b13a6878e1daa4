"""A teacher or a Raptor as one kind of thing: a dynamical system whose time is depth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel

from ..activations.format import MANIFEST
from ..activations.online import OnlineActivations, check_all_layers
from ..activations.store import StoredActivations, load_activations
from ..configuration_raptor import TEACHER_FAMILIES, TokenLayout, token_layout
from ..data import ImageViews, ReadingArguments, load_images
from ..data.loading import Classes
from ..data.views import drop_unreadable
from ..modeling_raptor_heads import pool_tokens
from ..runs.arguments import named_folders
from ..runs.files import public_name, read_json
from ..runs.processes import process_state
from ..tasks.heads import load_linear_head
from ..tasks.task import Classification
from ..teachers import final_norm, image_size, load_processor, load_vision_model, trajectory
from ..teachers.states import run_layers


@dataclass
class DepthSystem:
    """A frozen model whose states can be run on from any layer.

    Args:
        name: what it is called in results.
        model: a Raptor, a teacher, or (for its trajectories alone) any vision model.
        layout: token layout of its states.
        head: linear head on [cls, mean of patches].
        image_size: height and width of its images in pixels; default: as the model was made for.
    """

    name: str
    model: PreTrainedModel
    layout: TokenLayout
    head: nn.Linear | None = None
    image_size: tuple[int, int] | None = None

    @property
    def depth(self) -> int:
        """Number of layers L."""
        return self.model.config.num_hidden_layers

    @property
    def phases(self) -> list[int] | None:
        """Lengths of a Raptor's phases; None for other models."""
        return self.model.config.phases if self.is_raptor else None

    @property
    def is_raptor(self) -> bool:
        """Whether blocks are applied, rather than layers of their own."""
        return self.model.config.model_type == "raptor"

    @property
    def can_run_on(self) -> bool:
        """Whether its layers are known one by one (`TEACHER_FAMILIES`)."""
        return self.is_raptor or self.model.config.model_type in TEACHER_FAMILIES

    @torch.no_grad()
    def trajectory(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return all states (B, L + 1, N, D) of a batch with `pixel_values` or with stored
        `states`.

        Of stored states (B, L + 1, N, D) the embeddings are taken, and run on.

        Raises:
            ValueError: states that are not finite; the layer and the images are named.
        """
        if "pixel_values" in batch:
            states = trajectory(self.model, batch["pixel_values"].to(self.model.device))
        else:
            states = self.run(batch["states"][:, 0].to(self.model.device).float())
        _check_finite(states, self.name, batch)
        return states

    @torch.no_grad()
    def run(
        self, states: torch.Tensor, *, start: int = 0, swapped: Mapping[int, int] | None = None
    ) -> torch.Tensor:
        """Return the states after the layers `start` … L, (B, L − start + 1, N, D), from those at
        `start`.

        Args:
            states: (B, N, D), after layer `start`.
            swapped: layers (1 … L) of a teacher that others stand in for: {layer: stand-in}.
        """
        if self.is_raptor:
            return self.model.rollout(states, start=start, image_size=self.image_size)
        layers = [(swapped or {}).get(layer, layer) for layer in range(start + 1, self.depth + 1)]
        return torch.stack(run_layers(self.model, states, layers, self.image_size), dim=1)

    @torch.no_grad()
    def predict(self, states: torch.Tensor) -> torch.Tensor:
        """Return the classes (B,) that the head makes of states (B, N, D) before the final norm."""
        states = final_norm(self.model, states)
        return self.head(pool_tokens(states, self.model.config)).argmax(dim=-1)


def _check_finite(states: torch.Tensor, name: str, batch: Mapping[str, torch.Tensor]) -> None:
    """Refuse trajectories (B, L + 1, N, D) with NaN or infinite values."""
    finite = torch.isfinite(states).all(dim=-1).all(dim=-1).cpu()
    if not finite.all():
        layer = int((~finite.all(dim=0)).int().argmax())
        images = batch["image_id"][~finite[:, layer]].tolist()
        raise ValueError(
            f"The states of {name} must be finite; from layer {layer} on they hold NaN or infinite "
            f"values for the images {images[:5]}{' …' if images[5:] else ''}."
        )


@dataclass
class StoredSystem:
    """Trajectories of an activation dataset, without the model that made them."""

    name: str
    depth: int
    layout: TokenLayout
    phases: None = None
    is_raptor: bool = False
    can_run_on: bool = False
    head: None = None

    def trajectory(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the stored states (B, L + 1, N, D) in float32; errors as
        `DepthSystem.trajectory`.
        """
        states = batch["states"].float()
        _check_finite(states, self.name, batch)
        return states


System = DepthSystem | StoredSystem


def load_system(
    name: str,
    source: str,
    *,
    images: ImageViews | None = None,
    head: str | None = None,
    classes: Classes | None = None,
    stored_size: tuple[int, int] | None = None,
) -> DepthSystem:
    """Load a model from a folder or the Hub, with its own classifier where it has one.

    Args:
        images: that the token layout of a model is read off whose configuration does not tell it.
        head: a file or model that `load_linear_head` reads, instead of the model's own.
        classes: of the images, which the head's are matched with.
        stored_size: height and width in pixels of images whose states are stored.

    Raises:
        ValueError: a model or head that can't be used, as in `load_vision_model`.
        OSError: no such model.
    """
    model = load_vision_model(source).to(process_state().device)
    config = model.config
    classifies = any(n.endswith("ForImageClassification") for n in config.architectures or [])
    linear = None  # nothing to judge without labels
    if head is None and classifies and config.model_type in Classification.head_types:
        head = source
    if head is not None and (classes is None or classes.number):
        linear = load_linear_head(head, config=config, classes=classes)[0].to(model.device)
    known = images is None or config.model_type in ("raptor", *TEACHER_FAMILIES)
    layout = token_layout(config) if known else OnlineActivations(model, images).layout
    size = stored_size if images is None else image_size(images.processor)
    return DepthSystem(name, model, layout, linear, size)


class Inputs(NamedTuple):
    """What a study looks at."""

    systems: list[System]
    images: ImageViews | StoredActivations
    processor: object | None  # what made the pixel values, where there are any
    class_names: list[str] | None


def load_inputs(
    models: Sequence[str],
    data: str,
    *,
    split: str,
    teacher_head: str | None = None,
    reading: ReadingArguments | None = None,
    dataset: datasets.Dataset | None = None,
) -> Inputs:
    """Load models and their images, or the states of an activation dataset, which needs no model.

    Args:
        models: folders or Hub ids, each as it is or as NAME=one of these; the teacher first, whose
            image processor prepares the images for all.
        data: digits, an image folder, a Hub id, or the folder of an activation dataset.
        teacher_head: linear head of the first model.
        reading: how images are read.
        dataset: the images of `data`, where they are loaded already.

    Raises:
        ValueError: no model for images, two models of one name, models of different depth, or
            for an activation dataset without some layers or patches, or of models whose layers
            are not known.
    """
    sources = named_folders("--model", models)
    heads = {name: teacher_head for name in list(sources)[:1]}
    reading = reading or ReadingArguments()
    if is_store(data):
        if reading.resolution:
            raise ValueError(f"{data} holds states, not images: leave out --resolution.")
        return _stored_inputs(data, sources, heads)
    if not sources:
        raise ValueError("Give --model, or an activation dataset as --data, which needs none.")
    processor = load_processor(next(iter(sources.values())), resolution=reading.resolution)
    if dataset is None:
        dataset = load_images(data, split, reading)
    images = drop_unreadable(ImageViews(dataset, processor, reading=reading))
    systems = [
        load_system(name, source, images=images, head=heads.get(name), classes=images.classes)
        for name, source in sources.items()
    ]
    _check_alike(systems)
    return Inputs(systems, images, processor, images.class_names)


def _stored_inputs(data: str, sources: dict[str, str], heads: dict[str, str | None]) -> Inputs:
    """Load an activation dataset, and the models that run on from it; errors as `load_inputs`."""
    stored = load_activations(data)
    check_all_layers(stored)
    if not sources:
        teacher = public_name(stored.manifest["teacher"]["name"])
        return Inputs([StoredSystem(teacher, stored.depth, stored.layout)], stored, None, None)
    systems = [
        load_system(
            name,
            source,
            head=heads.get(name),
            classes=stored.classes,
            stored_size=tuple(stored.resolution),
        )
        for name, source in sources.items()
    ]
    if not all(s.can_run_on for s in systems):
        raise ValueError(
            f"Models run on from the stored embeddings of {data}: that takes "
            f"teachers of {', '.join(TEACHER_FAMILIES)} or Raptors. Give images, or no --model."
        )
    _check_alike(systems, stored)
    return Inputs(systems, stored, None, None)


def is_store(data: str | Path) -> bool:
    """Return whether something is the folder of an activation dataset."""
    return (Path(data) / MANIFEST).exists()


def _check_alike(systems: Sequence[DepthSystem], stored: StoredActivations | None = None) -> None:
    """Refuse models whose states can't be laid beside each other: a ValueError says which."""
    shapes = {s.name: (s.depth, s.model.config.hidden_size, *s.layout) for s in systems}
    if stored is not None:
        channels = stored.manifest["num_channels"]
        shapes[str(stored.path)] = (stored.depth, channels, *stored.layout)
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "Models of one study must have the same layers, channels, cls and register tokens: a "
            f"teacher and its own Raptors. Got {shapes}."
        )


def find_partitions(phases_file: str | None, systems: list[System]) -> list[list[int]]:
    """Return the partitions of the teacher's layers: those of a file, or of the Raptors."""
    if phases_file:
        content = read_json(phases_file)
        if not isinstance(content.get("phases"), dict):
            raise ValueError(f"{phases_file} must be a phases.json of training/find_phases.py.")
        return list(content["phases"].values())
    partitions = {tuple(system.phases) for system in systems if system.phases}
    return [list(phases) for phases in sorted(partitions, key=lambda phases: (len(phases), phases))]
