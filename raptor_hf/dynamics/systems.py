"""A teacher or a Raptor as a dynamical system with depth as time, and the data to run it on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import torch
from transformers import PreTrainedModel

from ..activations.online import OnlineActivations
from ..configuration_raptor import TEACHER_FAMILIES, TokenLayout, token_layout
from ..data import ImageViews, ReadingArguments
from ..runs.arguments import named_folders
from ..runs.processes import process_state
from ..teachers import image_size, load_processor, load_vision_model, trajectory
from ..teachers.states import run_layers
from ..teachers.trunks import check_same_shell


@dataclass
class DepthSystem:
    """A frozen model that can run on from any layer."""

    # of the model in results
    name: str
    # a Raptor, a teacher, or (for its trajectories alone) any vision model
    model: PreTrainedModel
    # of its states
    layout: TokenLayout
    # height and width of its images in pixels; default: the model's own
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
        """Whether blocks are applied repeatedly."""
        return self.model.config.model_type == "raptor"

    @property
    def can_run_on(self) -> bool:
        """Whether single layers can be called."""
        return self.is_raptor or self.model.config.model_type in TEACHER_FAMILIES

    @torch.no_grad()
    def trajectory(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return all states (B, L + 1, N, D) of a batch with `pixel_values`.

        Raises:
            ValueError: states that are not finite; layer and images are named.
        """
        states = trajectory(self.model, batch["pixel_values"].to(self.model.device))
        finite = torch.isfinite(states).flatten(2).all(dim=-1).cpu()
        if not finite.all():
            layer = int((~finite.all(dim=0)).int().argmax())
            images = batch["image_id"][~finite[:, layer]].tolist()
            raise ValueError(
                f"The states of {self.name} must be finite; from layer {layer} on they hold NaN or "
                f"infinity for the images {images[:5]}."
            )
        return states

    @torch.no_grad()
    def run(
        self, states: torch.Tensor, *, start: int = 0, swapped: Mapping[int, int] | None = None
    ) -> torch.Tensor:
        """Return the states after the layers `start` … L, (B, L − start + 1, N, D).

        Args:
            states: (B, N, D), after layer `start` (0 … L).
            swapped: layers (1 … L) of a teacher to replace: {layer: its replacement}.
        """
        if self.is_raptor:
            return self.model.rollout(states, start=start, image_size=self.image_size)
        layers = [(swapped or {}).get(layer, layer) for layer in range(start + 1, self.depth + 1)]
        return torch.stack(run_layers(self.model, states, layers, self.image_size), dim=1)


def load_inputs(
    models: Sequence[str], dataset: datasets.Dataset, reading: ReadingArguments | None = None
) -> tuple[list[DepthSystem], ImageViews]:
    """Load models, the teacher first, and prepare images to measure them on.

    Args:
        models: folders or Hub ids, or NAME=one of these; the teacher first, whose image processor
            prepares the images for all.
        dataset: of `load_images`.

    Raises:
        ValueError: no model, or models of one name, of different shapes or of another teacher than
            the first.
    """
    sources = named_folders("--model", models)
    reading = reading or ReadingArguments()
    if not sources:
        raise ValueError("Give --model: the teacher first, then its Raptors.")

    # all models see the images as the teacher's processor prepares them
    teacher = next(iter(sources.values()))
    processor = load_processor(teacher, resolution=reading.resolution)
    images = ImageViews(dataset, processor, reading=reading)
    systems = [load_system(name, source, images) for name, source in sources.items()]
    _check_alike(systems)
    return systems, images


def load_system(name: str, source: str, images: ImageViews) -> DepthSystem:
    """Load a model from a folder or the Hub.

    Args:
        name: of the model in results.
        images: what it runs on.
    """
    model = load_vision_model(source).to(process_state().device)
    if model.config.model_type in ("raptor", *TEACHER_FAMILIES):
        layout = token_layout(model.config)
    else:  # it is read off the states of an image
        layout = OnlineActivations(model, images).layout
    return DepthSystem(name, model, layout, image_size(images.processor))


def _check_alike(systems: Sequence[DepthSystem]) -> None:
    """Refuse models with states that can't be compared, and Raptors of another teacher."""
    # shapes of the states
    shapes = {s.name: (s.depth, s.model.config.hidden_size, *s.layout) for s in systems}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "Models of one study must have the same layers, channels, cls and register tokens: a "
            f"teacher and its own Raptors. Got {shapes}."
        )
    # embeddings and final norm of a Raptor are its teacher's
    teacher = systems[0]
    for system in systems[1:]:
        if not system.is_raptor or teacher.is_raptor or not teacher.can_run_on:
            continue
        names = {"name": system.name, "teacher_name": teacher.name}
        check_same_shell(system.model, teacher.model, **names)
