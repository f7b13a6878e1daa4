"""Image datasets as tensors; a view is a function of (seed, view, image) alone."""

import warnings
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import BitImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .arguments import ReadingArguments
from .decoding import check_one_size, open_image, pixel_table, to_pixel_values, undecoded
from .loading import read_labels
from .transforms import Augmentation


def make_processor(image_size: int) -> BitImageProcessorPil:
    """Return DINOv2's preprocessing at any size: bicubic resize, centre crop, ImageNet mean."""
    return BitImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


class ImageViews(Dataset):
    """An image dataset, each image in several views, as tensors ready for a model.

    View 0 is the image itself, the others are random: crops of it, or small affine maps. Row r is
    image r mod n in view r div n; a row beyond the last is one view more.

    Args:
        dataset: column `image`, and `label` where there are labels.
        processor: the teacher's image processor.
        views: number of views per image.
        seed: other seeds, other views.
        plain_first: False makes view 0 a random one too (for training).
        image_ids: the images to take; default: all.
        crops: random crops, for photographs; None: small affine maps, for digits. With crops
            `pixel_values` are bytes: `look_up(pixel_values, images.table)` normalises them.
        reading: with `skip_corrupt` other images take the place of unreadable ones.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor,
        *,
        views: int = 1,
        seed: int = 0,
        plain_first: bool = True,
        image_ids: np.ndarray | None = None,
        crops: Augmentation | None = None,
        reading: ReadingArguments | None = None,
    ):
        self.reading = reading or ReadingArguments()
        self.image_ids = np.array(range(len(dataset)) if image_ids is None else image_ids)

        # images as they are in their files, and what makes pixel values of them
        self.cells = undecoded(dataset.select_columns("image"))
        self.processor, self.crops = processor, crops
        self.table = pixel_table(processor) if crops else None
        self.views, self.seed, self.plain_first = views, seed, plain_first

        # classes, by image; no names without labels
        labels, self.class_names = read_labels(dataset)
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return self.views * len(self.image_ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch: `pixel_values` (B, C, H, W), and `label` (−1 where there is none),
        `image_id`, `view` (B,) each.

        Raises:
            ValueError: an image that can't be read, or images of several sizes.
        """
        # decode
        views, places = np.divmod(np.asarray(rows, dtype=np.int64), len(self.image_ids))
        options = {"skip_corrupt": self.reading.skip_corrupt}
        images = [read_or_next(self.read, self.image_ids, i, **options) for i in places.tolist()]

        # transform
        image_ids = self.image_ids[places]
        keys = [(self.seed, *key) for key in zip(views.tolist(), image_ids.tolist(), strict=True)]
        return {
            "pixel_values": self._make_views(images, keys),
            "label": self.labels[image_ids],
            "image_id": torch.tensor(image_ids),
            "view": torch.tensor(views),
        }

    def read(self, image_id: int) -> np.ndarray:
        """Decode an image, (H, W, 3); errors as `open_image`."""
        cell, name = self.cells[image_id]["image"], f"image {image_id} of the dataset"
        return np.asarray(open_image(cell, name=name, rgb=True))

    def _make_views(
        self, images: list[np.ndarray], keys: list[tuple[int, int, int]]
    ) -> torch.Tensor:
        """Return images (B, C, H, W) in the views of keys (seed, view, image)."""
        random = [view > 0 or not self.plain_first for _, view, _ in keys]

        # small images: affine maps of their pixel values
        if self.crops is None:
            pixel_values = to_pixel_values(images, self.processor)
            rows = np.flatnonzero(random)
            if len(rows):
                maps = _affine_views(pixel_values[rows], [keys[row] for row in rows])
                pixel_values[rows] = maps
            return pixel_values

        # photographs, in bytes: a random crop has its size, the processor resizes a whole image
        views, options = [], {"do_rescale": False, "do_normalize": False}
        for image, key, is_random in zip(images, keys, random, strict=True):
            if is_random:
                view, _ = self.crops(image, None, np.random.default_rng(key))
            else:
                view = to_pixel_values([image], self.processor, **options)[0].byte()
                view = view.permute(1, 2, 0).numpy()
            views.append(view)
        check_one_size(view.shape[:2] for view in views)
        return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)  # the device moves the bytes


def _affine_views(pixel_values: torch.Tensor, keys: list[tuple[int, ...]]) -> torch.Tensor:
    """Rotate (±15°), scale (±15 %) and shift (±10 %) every image (B, C, H, W) at random.

    Args:
        keys: one tuple of integers an image; equal keys give equal views.
    """
    draws = np.stack([np.random.default_rng(key).uniform(-1, 1, size=4) for key in keys])
    angle, scale = np.deg2rad(15) * draws[:, 0], 1 + 0.15 * draws[:, 1]
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    shift_x, shift_y = 0.2 * draws[:, 2], 0.2 * draws[:, 3]  # the image spans 2 units
    theta = np.stack([cos, -sin, shift_x, sin, cos, shift_y], axis=1).reshape(-1, 2, 3)
    theta = torch.as_tensor(theta, dtype=pixel_values.dtype)
    grid = functional.affine_grid(theta, list(pixel_values.shape), align_corners=False)
    return functional.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False)


def read_or_next(
    read: Callable[[int], Any], image_ids: np.ndarray, place: int, *, skip_corrupt: bool
) -> Any:
    """Read the image at a place of `image_ids`.

    With `skip_corrupt` the next readable one takes the place of one that can't be read, for good.
    """
    for number in range(len(image_ids)):
        image_id = image_ids[(place + number) % len(image_ids)]
        try:
            image = read(int(image_id))
        except ValueError as error:
            if not skip_corrupt:
                raise
            warnings.warn(f"{error}. The next image takes its place.", stacklevel=2)
        else:
            image_ids[place] = image_id
            return image
    raise ValueError(f"None of the {len(image_ids):,} images can be read.")


def choose_images(number: int, wanted: int | None, seed: int) -> np.ndarray:
    """Return the ids of all images, or of some chosen at random, in order.

    Raises:
        ValueError: more are wanted than there are.
    """
    if wanted is None:
        return np.arange(number)
    if not 1 <= wanted <= number:
        raise ValueError(f"num_images must lie between 1 and {number:,}; got {wanted:,}.")
    return np.sort(np.random.default_rng(seed).permutation(number)[:wanted])
