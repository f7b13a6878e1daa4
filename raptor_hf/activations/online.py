"""Compute a teacher's states from images, or open stored ones (`store.py`).

Both are map-style datasets of whole batches; `states(batch)` returns the states (B, layers, N, D).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import datasets
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..configuration_raptor import TEACHER_FAMILIES, teacher_family, token_layout
from ..data import ImageViews, batches, choose_images, list_images, load_images
from ..data.arguments import CropArguments, ReadingArguments
from ..data.decoding import look_up
from ..data.loading import EMBEDDED
from ..data.transforms import Augmentation
from ..modeling_raptor import ROTARY_ANGLES
from ..runs.arguments import all_values
from ..runs.files import Fingerprint
from ..runs.processes import compiled, process_state
from ..teachers import image_size, load_processor, trajectory
from ..teachers.states import infer_token_layout, up_to_layer
from ..weights import weights_digest
from .arguments import ActivationArguments, ImageArguments
from .store import StoredActivations, load_activations


class OnlineActivations(Dataset):
    """A teacher's states, computed batch by batch and never kept.

    A DataLoader reads images; `states` runs the teacher on a batch of them, without gradients.

    Args:
        teacher: any vision model that returns its states, on the device that computes. With the
            first image it shows `depth`, `num_tokens`, `num_channels` and `layout`.
        images: gives whole batches with `pixel_values`, as `ImageViews` and `ProbeImages` do.
        also: the same images of another size, for the batches of odd steps (`StepSampler`).
        layers: the layers whose states are computed; default: all, 0 … L.
        precision: `"bfloat16"` computes under autocast; the residual stream stays float32.

    Raises:
        ValueError: a layer that the teacher has not.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        images: Dataset,
        *,
        also: Dataset | None = None,
        layers: Sequence[int] | None = None,
        precision: str = "float32",
    ):
        self.whole_teacher = self.teacher = teacher
        self.also = also
        self.images, self.processor, self.precision = images, images.processor, precision
        table = getattr(images, "table", None)  # None: images are floats
        self.table = None if table is None else table.to(teacher.device)

        # the first image shows the sizes of images and states, and how many layers there are
        pixel_values = self.pixel_values(images.__getitems__([0]))
        _, num_layers, self.num_tokens, self.num_channels = trajectory(teacher, pixel_values).shape
        self.depth, self.resolution = num_layers - 1, list(pixel_values.shape[-2:])
        config, (height, width) = teacher.config, self.resolution
        if config.model_type in TEACHER_FAMILIES:
            self.layout = token_layout(config)
        else:
            sizes = {"num_tokens": self.num_tokens, "height": height, "width": width}
            self.layout = infer_token_layout(config, **sizes)

        # the layers that are asked for
        self.layers = list(layers or range(num_layers))
        if not set(self.layers) <= set(range(num_layers)):
            raise ValueError(f"Of the layers 0 to {self.depth}, {self.layers} are asked for.")

        # no layer runs that nobody needs; those that run are compiled where the launcher asks
        self.teacher = up_to_layer(teacher, max(self.layers))
        if teacher.config.model_type in TEACHER_FAMILIES:
            for layer in self.teacher.get_submodule(teacher_family(teacher.config).layers):
                layer.forward = compiled(layer.forward)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        # rows of a training know their step (`StepSampler`), others are of the first size
        images = self.also if self.also and getattr(rows, "step", 0) % 2 else self.images
        return images.__getitems__(rows)

    def __getstate__(self) -> dict:
        # the workers of a DataLoader read images, and need no copy of the teacher
        return {**self.__dict__, "teacher": None, "whole_teacher": None, "table": None}

    def states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the states (B, layers, N, D) of a batch with `pixel_values`, float32."""
        device = self.teacher.device
        pixel_values = self.pixel_values(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            states = trajectory(self.teacher, pixel_values).float()
        if self.layers == list(range(states.shape[1])):
            return states  # without a copy
        return states[:, self.layers]

    def pixel_values(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the images (B, C, H, W) of a batch on the teacher's device, normalised."""
        return look_up(batch["pixel_values"].to(self.teacher.device), self.table)

    def identity(self) -> str:
        """Return the digest of the teacher's weights."""
        return weights_digest(self.whole_teacher)

    def files(self, dataset: str) -> dict[str, Fingerprint]:
        """Return the images of a dataset that are read, as `start_run` takes them."""
        return {"images": list_images(dataset, self.images.cells)}


Activations = StoredActivations | OnlineActivations


def image_views(
    dataset: datasets.Dataset,
    images: ImageArguments,
    crops: CropArguments,
    reading: ReadingArguments,
    teacher: str,
) -> ImageViews:
    """Return the views of a dataset, for the image processor of a teacher (a folder or Hub id)."""
    processor = load_processor(teacher, reading.resolution)

    # random views: crops of photographs, small affine maps of digits
    augmentation = None
    if images.dataset not in EMBEDDED and images.views != 1:
        augmentation = Augmentation.of(crops, image_size(processor))
    return ImageViews(
        dataset,
        processor,
        views=max(1, images.views),  # 0 means new ones in every epoch
        seed=images.view_seed,
        image_ids=choose_images(len(dataset), images.num_images, images.view_seed),
        crops=augmentation,
        reading=reading,
    )


def open_source(
    source: ActivationArguments,
    images: ImageArguments,
    crops: CropArguments,
    reading: ReadingArguments,
    teacher: PreTrainedModel,
    layers: Sequence[int],
) -> Activations:
    """Open the source of the states of some layers.

    Raises:
        ValueError: options that contradict each other, or a store of other layers, another
            resolution or another teacher.
    """
    # computed
    if source.online:
        if images.dataset is None:
            raise ValueError("--activations online needs images: give --dataset.")
        if source.also_resolution and teacher.config.model_type in ROTARY_ANGLES:
            raise ValueError("--also_resolution is for teachers without rotary positions.")
        dataset = load_images(images.dataset, images.split, reading)
        views, also = image_views(dataset, images, crops, reading, source.teacher), None
        if source.also_resolution:
            reading = replace(reading, resolution=source.also_resolution)
            also = image_views(dataset, images, crops, reading, source.teacher)
        teacher.to(process_state().device)
        options = {"also": also, "layers": layers, "precision": images.precision}
        return OnlineActivations(teacher, views, **options)

    # stored: of this teacher and these layers, and no option may ask for other images
    stored = load_activations(source.activations, layers=layers, teacher=teacher)
    made_with = all_values(ImageArguments(), CropArguments()) | {"resolution": stored.resolution}
    for name, value in (all_values(images, crops) | {"resolution": reading.resolution}).items():
        if value not in (made_with[name], []):
            own = f"{source.activations} holds states of images of {stored.resolution} pixels"
            raise ValueError(f"--{name} {value} is for --activations online; {own}.")
    return stored


def check_all_layers(activations: Activations) -> None:
    """Refuse activations of some layers only."""
    if activations.layers != list(range(activations.depth + 1)):
        needed = f"the states of all layers, 0 to {activations.depth}"
        raise ValueError(f"This needs {needed}; these are the states of {activations.layers}.")


def stream_states(
    activations: Activations,
    description: str,
    *,
    num_images: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Iterator[torch.Tensor]:
    """Yield this process' states (B, layers, N, D), of all rows or of some chosen at random."""
    limit = num_images and min(num_images, len(activations))
    rows = choose_images(len(activations), limit, seed).tolist()
    for batch in batches(activations, batch_size, description, rows=rows, num_workers=num_workers):
        yield activations.states(batch)
