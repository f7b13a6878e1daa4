"""Image datasets as tensors; a view is a function of (seed, view, image) alone."""

import warnings
from pathlib import Path

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
        image_ids: the images to take; default: all. A view of an image does not depend on it.
        crops: random crops, for photographs; None: small affine maps, for digits.
        reading: the sizes that images may have and are shrunk to.
        as_bytes: return random crops as bytes, a quarter of the memory, where `table`
            (`pixel_table`) gives the processor's pixel values.
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
        as_bytes: bool = False,
    ):
        if views < 1:
            raise ValueError(f"views must be at least 1; got {views}.")
        self.reading = reading or ReadingArguments()
        if image_ids is None:
            image_ids = np.arange(len(dataset))
        self.image_ids = image_ids

        # images as they are in their files, and what makes pixel values of them
        self.cells = undecoded(dataset.select_columns("image"))
        self.processor, self.crops = processor, crops
        self.table = None
        if as_bytes and crops:
            self.table = pixel_table(processor)
        self.views, self.seed, self.plain_first = views, seed, plain_first

        # classes, by image
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
        # the images and views of the rows
        views, places = np.divmod(np.asarray(rows, dtype=np.int64), len(self.image_ids))
        image_ids = self.image_ids[places]
        keys = [(self.seed, *key) for key in zip(views.tolist(), image_ids.tolist(), strict=True)]

        # decode, and transform
        images = list(map(self.read, image_ids.tolist()))
        pixel_values = self._make_views(images, keys) if images else torch.empty(0)
        return {
            "pixel_values": pixel_values,
            "label": self.labels[image_ids],
            "image_id": torch.tensor(image_ids),
            "view": torch.tensor(views),
        }

    def read(self, image_id: int) -> np.ndarray:
        """Decode an image, (H, W, 3); errors as `open_image`."""
        cell, name = self.cells[image_id]["image"], f"image {image_id} of the dataset"
        return read_pixels(cell, name=name, shorter_side=self.reading.shorter_side)

    def _make_views(
        self, images: list[np.ndarray], keys: list[tuple[int, int, int]]
    ) -> torch.Tensor:
        """Return images (B, C, H, W) in the views of keys (seed, view, image)."""
        plain, random = [], []
        for i, (_, view, _) in enumerate(keys):
            group = plain if view == 0 and self.plain_first else random
            group.append(i)

        # small images: affine maps of their pixel values
        if self.crops is None:
            pixel_values = to_pixel_values(images, self.processor)
            if random:
                maps = _affine_views(pixel_values[random], [keys[i] for i in random])
                pixel_values[random] = maps
            return pixel_values

        # photographs: the processor resizes whole images; a random crop has its size already
        parts = []
        if plain:
            parts.append((plain, self._prepare([images[i] for i in plain], resize=True)))
        if random:
            crops = []
            for i in random:
                crop, _ = self.crops(images[i], None, np.random.default_rng(keys[i]))
                crops.append(crop)
            parts.append((random, self._prepare(crops, resize=False)))
        if len(parts) == 1:
            return parts[0][1]
        pixel_values = parts[0][1].new_empty(len(images), *parts[0][1].shape[1:])
        for rows, prepared in parts:
            pixel_values[rows] = prepared
        return pixel_values

    def _prepare(self, images: list[np.ndarray], *, resize: bool) -> torch.Tensor:
        """Return images as the processor prepares them, or as bytes where there is a table."""
        if self.table is not None and not resize:
            return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        options = {}
        if not resize:
            options |= {"do_resize": False, "do_center_crop": False}
        if self.table is None:
            return to_pixel_values(images, self.processor, **options)
        options |= {"do_rescale": False, "do_normalize": False}
        return to_pixel_values(images, self.processor, **options).to(torch.uint8)

    @property
    def classes(self) -> Classes:
        """The classes of the labels."""
        return Classes.of(self.class_names, self.labels)

    def public_path(self, image_id: int) -> str:
        """Return `<split>/<class>/<image>`, which names an image without its folder."""
        return public_path(self.cells[image_id]["image"], image_id)


def public_path(cell: dict | None, image_id: int) -> str:
    """Return `<split>/<class>/<image>` of a cell, or its number where it is not a file."""
    if cell and cell["path"]:
        return "/".join(Path(cell["path"]).parts[-3:])
    return f"image {image_id} of the dataset"


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


class SkipCorrupt(Dataset):
    """A dataset of images without those that can't be read, each left out with a warning.

    Otherwise it has the attributes of the dataset that it wraps.

    Args:
        dataset: gives batches (`__getitems__`, whose ValueError says that an image can't be read);
            row r is image `image_ids[r mod n]`.
        limit: number of images that may be left out, in all workers of a DataLoader together.
        replace: the next readable row takes the place of an unreadable one, so that batches keep
            their size; else it is missing in its batch.
    """

    def __init__(self, dataset: Dataset, limit: int, *, replace: bool = False):
        self.dataset, self.limit, self.replace = dataset, limit, replace
        self.skipped = torch.zeros(len(dataset.image_ids), dtype=torch.bool).share_memory_()

    def __getattr__(self, name: str):
        if name == "dataset":  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch of the dataset; `skipped` holds the images that were left out of it.

        Raises:
            ValueError: more unreadable images than the limit, or no readable one.
        """
        # leave out, or replace, the images that are known to be unreadable
        readable = [row for row in map(self._readable_row, rows) if row is not None]
        try:
            batch = self.dataset.__getitems__(readable)
        except ValueError:
            # find out which of the others are unreadable, and begin anew
            if not any([self._skip_unreadable(row) for row in readable]):
                raise  # it is an error of the whole batch
            return self.__getitems__(rows)

        # tell the training loop, which lists them
        numbers = np.asarray(rows) % len(self.skipped)
        skipped = self.image_ids[numbers[self.skipped[numbers].numpy()]]
        if len(skipped):
            batch["skipped"] = torch.from_numpy(skipped)
        return batch

    def _readable_row(self, row: int) -> int | None:
        """Return a row, or the one that takes its place, as far as it is known by now."""
        while self.skipped[row % len(self.skipped)]:
            if not self.replace:
                return None
            row += 1
        return row

    def _skip_unreadable(self, row: int) -> bool:
        """Return whether a row can't be read; its image is left out from now on."""
        try:
            self.dataset.__getitems__([row])
            return False
        except ValueError as error:
            self.skipped[row % len(self.skipped)] = True
            number = int(self.skipped.sum())
            if number > self.limit or number == len(self.skipped):
                raise ValueError(
                    f"{error} (unreadable images so far: {number} of {len(self.skipped)}; "
                    f"--skip_corrupt {self.limit} may be left out)"
                ) from error
            warnings.warn(f"left out: {error}", stacklevel=2)
            return True


def skip_corrupt(dataset: Dataset, limit: int, *, replace: bool = False) -> Dataset:
    """Return a dataset as `SkipCorrupt` gives it, or itself where no image may be left out."""
    return SkipCorrupt(dataset, limit, replace=replace) if limit else dataset


def drop_unreadable(images: ImageViews) -> ImageViews:
    """Read every image once and keep the readable ones, where their number must be known first.

    Nothing is read without `--skip_corrupt`. Errors as `SkipCorrupt`.
    """
    limit = images.reading.skip_corrupt
    if limit:
        readable = SkipCorrupt(images, limit)
        for row in range(len(images.image_ids)):
            readable.__getitems__([row])
        images.image_ids = images.image_ids[~readable.skipped.numpy()]
    return images


def first_batch(dataset: Dataset) -> dict[str, torch.Tensor]:
    """Return the first readable image of a dataset as a batch."""
    batches = (dataset.__getitems__([row]) for row in range(len(dataset)))
    return next(batch for batch in batches if len(batch["image_id"]))


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
