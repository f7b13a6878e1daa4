"""Image datasets and their views; a view is a function of (seed, view, image) alone."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import BitImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .arguments import ReadingArguments
from .decoding import pixel_table, read_pixels, to_pixel_values, undecoded
from .loading import Classes, read_labels
from .transforms import Augmentation

T = TypeVar("T")


def make_processor(image_size: int) -> BitImageProcessorPil:
    """Return DINOv2's preprocessing at any size: bicubic resize, centre crop, ImageNet mean."""
    return BitImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


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


class TolerantDataset(Dataset):
    """Images some of which can't be read: so many are left out, each with a warning.

    Args:
        cells: with the column `image`, undecoded.
        image_ids: of the images that are taken; row r is image r mod n of them.
        skip_corrupt: how many may be left out.
        fill: the next readable image takes the place of one that is left out, as training wants.
    """

    def __init__(
        self,
        cells: datasets.Dataset,
        image_ids: np.ndarray,
        *,
        skip_corrupt: int = 0,
        fill: bool = False,
    ):
        self.cells, self.image_ids = cells, image_ids
        self.skip_corrupt, self.fill = skip_corrupt, fill
        self.skipped: set[int] = set()

    def public_path(self, image_id: int) -> str:
        """Return `<split>/<class>/<image>`, as results may be published, or which image it is."""
        cell = self.cells[image_id]["image"]
        path = cell and cell["path"]
        return "/".join(Path(path).parts[-3:]) if path else f"image {image_id} of the dataset"

    def read_rows(
        self, rows: list[int], read: Callable[[int, int], T]
    ) -> tuple[list[int], list[T], list[int]]:
        """Return the rows that could be read, what `read` (row, image id) made of them, and the
        images that are left out.

        Raises:
            ValueError: more unreadable images than are tolerated, or none that can be read.
        """
        kept, skipped = [], set()
        for row in rows:
            for candidate in range(row, row + (len(self.image_ids) if self.fill else 1)):
                image_id = int(self.image_ids[candidate % len(self.image_ids)])
                try:
                    kept.append((candidate, read(candidate, image_id)))
                    break
                except ValueError as error:
                    self._skip(image_id, error)
                    skipped.add(image_id)
        return [row for row, _ in kept], [item for _, item in kept], sorted(skipped)

    def first_batch(self) -> dict[str, torch.Tensor]:
        """Return the first image that can be read, as a batch; errors as `read_rows`."""
        batches = (self.__getitems__([row]) for row in range(len(self.image_ids)))
        return next(batch for batch in batches if len(batch["image_id"]))

    def _skip(self, image_id: int, error: ValueError) -> None:
        """Leave an image out, or give up."""
        if image_id in self.skipped:
            return
        self.skipped.add(image_id)
        if len(self.skipped) > self.skip_corrupt:
            raise ValueError(
                f"{error} (unreadable images so far: {len(self.skipped)}; --skip_corrupt "
                f"{self.skip_corrupt} are tolerated)"
            ) from error
        if len(self.skipped) == len(self.image_ids):
            raise ValueError(f"None of the {len(self.image_ids)} images can be read: {error}")
        warnings.warn(f"left out: {error}", stacklevel=2)


class ImageViews(TolerantDataset):
    """An image dataset, each image in several views, as tensors ready for a model.

    View 0 is the image itself, the others are random: crops of it, or small affine maps. Row r is
    the image r mod n of those that are taken, in view r div n; a row beyond the last is one view
    more.

    Args:
        dataset: column `image`, and `label` where there are labels.
        processor: the teacher's image processor.
        views: number of views per image.
        seed: other seeds, other views.
        plain_first: False makes view 0 a random one too (for training).
        image_ids: which images to take; default: all. A view of an image does not depend on it.
        crops: what random views of photographs are; None: small affine maps, as digits want.
        reading: how many unreadable images are left out, and from what size on one is unreadable.
        fill: as of `TolerantDataset`.
        as_bytes: hand crops over as bytes where that is enough, a quarter of the memory;
            `table` (`pixel_table`) says what the processor makes of them.
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
        fill: bool = False,
        as_bytes: bool = False,
    ):
        if views < 1:
            raise ValueError(f"views must be at least 1; got {views}.")
        self.reading = reading or ReadingArguments()
        ids = np.arange(len(dataset)) if image_ids is None else image_ids
        cells = undecoded(dataset.select_columns("image"))
        super().__init__(cells, ids, skip_corrupt=self.reading.skip_corrupt, fill=fill)
        self.processor, self.crops = processor, crops
        self.table = pixel_table(processor) if as_bytes and crops else None
        self.views, self.seed, self.plain_first = views, seed, plain_first
        labels, self.class_names = read_labels(dataset)
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return self.views * len(self.image_ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch: `pixel_values` (B, C, H, W), and `label` (−1 where there is none),
        `image_id`, `view` (B,) each. Images that are left out are missing in it, and `skipped`
        holds their ids.

        Raises:
            ValueError: an image that can't be read, and is not tolerated; or images of several
                sizes.
        """
        rows, images, skipped = self.read_rows(rows, self.read)
        image_ids = [int(self.image_ids[row % len(self.image_ids)]) for row in rows]
        views = [row // len(self.image_ids) for row in rows]
        keys = [(self.seed, *key) for key in zip(views, image_ids, strict=True)]
        return {
            "pixel_values": self._make_views(images, keys) if images else torch.empty(0),
            "label": self.labels[image_ids],
            "image_id": torch.tensor(image_ids, dtype=torch.long),
            "view": torch.tensor(views, dtype=torch.long),
            **({"skipped": torch.tensor(skipped)} if skipped else {}),
        }

    def _make_views(
        self, images: list[np.ndarray], keys: list[tuple[int, int, int]]
    ) -> torch.Tensor:
        """Return images (B, C, H, W) in the views of keys (seed, view, image)."""
        moved = [i for i, (_, view, _) in enumerate(keys) if view > 0 or not self.plain_first]
        if self.crops is None:
            pixel_values = to_pixel_values(images, self.processor)
            if moved:
                pixel_values[moved] = _affine_views(pixel_values[moved], [keys[i] for i in moved])
            return pixel_values
        plain, parts = sorted(set(range(len(images))) - set(moved)), []
        if plain:
            options = {} if self.table is None else {"do_rescale": False, "do_normalize": False}
            whole = to_pixel_values([images[i] for i in plain], self.processor, **options)
            parts.append((plain, whole if self.table is None else whole.to(torch.uint8)))
        if moved:
            parts.append((moved, self._crop([images[i] for i in moved], [keys[i] for i in moved])))
        if len(parts) == 1:
            return parts[0][1]
        pixel_values = parts[0][1].new_empty(len(images), *parts[0][1].shape[1:])
        for rows, made in parts:
            pixel_values[rows] = made
        return pixel_values

    def _crop(self, images: list[np.ndarray], keys: list[tuple[int, int, int]]) -> torch.Tensor:
        """Return random crops (B, C, H, W), as bytes where there is a table."""
        views = [
            self.crops(image, None, np.random.default_rng(key))[0]
            for image, key in zip(images, keys, strict=True)
        ]
        if self.table is None:
            return to_pixel_values(views, self.processor, do_resize=False, do_center_crop=False)
        return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)

    @property
    def classes(self) -> Classes:
        """What the labels stand for."""
        return Classes.of(self.class_names, self.labels)

    def read(self, _row: int, image_id: int) -> np.ndarray:
        """Decode an image, (H, W, 3); errors as `read_image`."""
        cell, name = self.cells[image_id]["image"], f"image {image_id} of the dataset"
        return read_pixels(cell, name=name, **self.reading.sizes)

    def drop_unreadable(self) -> "ImageViews":
        """Read every image once and take those that can be read; return itself.

        For what must know their number before it begins; without `skip_corrupt` nothing is read.
        """
        if self.skip_corrupt:
            self.read_rows(list(range(len(self.image_ids))), self.read)
            self.image_ids = np.setdiff1d(self.image_ids, list(self.skipped))
        return self


def choose_images(number: int, wanted: int | None, seed: int) -> np.ndarray:
    """Return which of so many images are looked at: all, or some at random, in order.

    Raises:
        ValueError: more are wanted than there are.
    """
    if wanted is None:
        return np.arange(number)
    if not 1 <= wanted <= number:
        raise ValueError(f"num_images must lie between 1 and {number:,}; got {wanted:,}.")
    return np.sort(np.random.default_rng(seed).permutation(number)[:wanted])
