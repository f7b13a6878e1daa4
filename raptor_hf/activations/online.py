"""The sources of a teacher's states: computed from images here, or stored (`store.py`).

Both are map-style datasets that a DataLoader reads whole batches of; `states(batch)` returns the
states (B, layers, N, D) of such a batch.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..configuration_raptor import TEACHER_FAMILIES, TokenLayout, teacher_family, token_layout
from ..data import ImageViews, batches, choose_images, list_images, load_images
from ..data.arguments import CropArguments, ReadingArguments
from ..data.decoding import look_up
from ..data.loading import EMBEDDED
from ..data.transforms import Augmentation
from ..data.views import first_batch, skip_corrupt
from ..runs.files import Fingerprint
from ..runs.processes import compiled, process_state
from ..teachers import image_size, load_processor, trajectory
from ..teachers.states import infer_token_layout, up_to_layer
from ..weights import weights_digest
from .arguments import ActivationArguments, ImageArguments, check_source
from .store import StoredActivations, load_activations


class OnlineActivations(Dataset):
    """A teacher's states, computed batch by batch and never kept.

    A DataLoader reads images; `states` runs the teacher on a batch of them, without gradients.

    Args:
        teacher: any vision model that returns its states, on the device that computes.
        images: gives whole batches with `pixel_values`, as `ImageViews` and `ProbeImages` do.
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
        layers: Sequence[int] | None = None,
        precision: str = "float32",
    ):
        self.whole_teacher = self.teacher = teacher
        self.images, self.precision = images, precision

        # the layers that there are, and those that are asked for
        self.depth = getattr(teacher.config, "num_hidden_layers", None)
        if self.depth is None:  # not a model of transformers' usual kind
            pixel_values = self.pixel_values(first_batch(images))
            self.depth = trajectory(teacher, pixel_values).shape[1] - 1
        self.layers = list(range(self.depth + 1) if layers is None else layers)
        if not self.layers or not 0 <= min(self.layers) <= max(self.layers) <= self.depth:
            raise ValueError(
                f"The teacher has the layers 0 to {self.depth}; asked for {self.layers}."
            )

        # no layer runs that nobody needs; those that run are compiled where the launcher asks
        self.teacher = up_to_layer(teacher, max(self.layers))
        if teacher.config.model_type in TEACHER_FAMILIES:
            for layer in self.teacher.get_submodule(teacher_family(teacher.config).layers):
                layer.forward = compiled(layer.forward)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return self.images.__getitems__(rows)

    def public_path(self, image_id: int) -> str:
        """Return the name of an image in lists."""
        return self.images.public_path(image_id)

    def __getstate__(self) -> dict:
        # the workers of a DataLoader read images, and need no copy of the teacher
        state = {**self.__dict__, "teacher": None, "whole_teacher": None}
        state.pop("_pixel_table", None)
        return state

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
        pixel_values = batch["pixel_values"].to(self.teacher.device)
        if pixel_values.dtype == torch.uint8:  # random crops in training travel as bytes
            return look_up(pixel_values, self._pixel_table)
        return pixel_values

    @cached_property
    def _pixel_table(self) -> torch.Tensor:
        """The processor's values of bytes (`pixel_table`), on the teacher's device."""
        return torch.from_numpy(self.images.table).to(self.teacher.device)

    @property
    def processor(self):
        """The image processor that makes the images."""
        return self.images.processor

    @cached_property
    def resolution(self) -> list[int]:
        """Height and width of the images in pixels."""
        return list(first_batch(self.images)["pixel_values"].shape[-2:])

    @cached_property
    def layout(self) -> TokenLayout:
        """The number of cls and register tokens before the patches."""
        config = self.teacher.config
        if config.model_type in TEACHER_FAMILIES:
            return token_layout(config)

        # of another model: from the number of tokens that an image becomes
        batch = first_batch(self.images)
        height, width = batch["pixel_values"].shape[-2:]
        num_tokens = self.states(batch).shape[2]
        return infer_token_layout(config, num_tokens=num_tokens, height=height, width=width)

    def identity(self) -> str:
        """Return the digest of the teacher's weights."""
        return weights_digest(self.whole_teacher)

    def files(self, dataset: str) -> dict[str, Fingerprint]:
        """Return the images of a dataset that are read, as `start_run` takes them."""
        return {"images": list_images(dataset, self.images.cells)}


Activations = StoredActivations | OnlineActivations


def image_views(
    images: ImageArguments,
    crops: CropArguments,
    reading: ReadingArguments,
    teacher: str,
    revision: str | None = None,
    *,
    training: bool = False,
) -> ImageViews:
    """Open images in their views, for the image processor of a teacher (a folder or Hub id).

    In training batches keep their size where images are left out, `views` may be 0, and random
    crops travel as bytes where they can.
    """
    dataset = load_images(images.dataset, images.split, reading)
    processor = load_processor(teacher, revision, reading.resolution)

    # random views: crops of photographs, small affine maps of digits
    augmentation = None
    if images.dataset not in EMBEDDED:
        augmentation = Augmentation.of(crops, image_size(processor))
    views = ImageViews(
        dataset,
        processor,
        views=max(1, images.views) if training else images.views,
        seed=images.view_seed,
        image_ids=choose_images(len(dataset), images.num_images, images.view_seed),
        crops=augmentation,
        reading=reading,
        as_bytes=training,
    )
    return skip_corrupt(views, reading.skip_corrupt, replace=training)


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
        ValueError: options that contradict each other (`check_source`), or a store of other layers,
            another resolution or another teacher.
    """
    check_source(source, images, crops)

    # computed
    if source.online:
        views = image_views(images, crops, reading, source.teacher, source.revision, training=True)
        teacher.to(process_state().device)
        return OnlineActivations(teacher, views, layers=layers, precision=images.precision)

    # stored: of this teacher, these layers and images of this size and preparation
    stored = load_activations(source.activations, layers=layers, teacher=teacher)
    if reading.resolution and reading.resolution != stored.resolution:
        raise ValueError(
            f"{source.activations} holds the states of images of {stored.resolution} "
            f"pixels; --resolution asks for {reading.resolution}. Leave it out."
        )
    stored.processor = _find_processor(source, stored)
    return stored


def _find_processor(source: ActivationArguments, stored: StoredActivations):
    """Return the image processor of a store; refuse a store of another one than the teacher's."""
    before = stored.manifest["transform"]
    for resolution in (None, stored.resolution):  # its own, or that of an extraction's --resolution
        processor = load_processor(source.teacher, source.revision, resolution)
        now = json.loads(json.dumps(processor.to_dict()))
        if now == before:
            return processor
    name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
    raise ValueError(
        f"{source.activations} was made with another image processor ({name} {before.get(name)}, "
        f"now {now.get(name)}). Bring back its preprocessor_config.json, or extract again."
    )


def check_all_layers(activations: Activations) -> None:
    """Refuse activations of some layers only."""
    if activations.layers != list(range(activations.depth + 1)):
        raise ValueError(
            f"This needs the states of all layers, 0 to {activations.depth}; these are the states "
            f"of {activations.layers}."
        )


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
    limit = None if num_images is None else min(num_images, len(activations))
    rows = choose_images(len(activations), limit, seed).tolist()
    for batch in batches(activations, batch_size, description, rows=rows, num_workers=num_workers):
        yield activations.states(batch)
