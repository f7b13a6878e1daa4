"""Images and their targets as tensors, in random views or as they are judged."""

import warnings

import numpy as np
import torch
from torch.utils.data import Dataset

from ..tasks.labelled_images import LabelledImages
from .transforms import Augmentation, resize_pair


class ProbeImages(Dataset):
    """Images and targets as tensors. Row r is image r mod n; r div n tells its random views apart.

    Without an augmentation an image is resized and cropped by the processor of the model where it
    has one label, and comes whole where every pixel has one.

    Args:
        images: what is read.
        processor: the image processor of the model; with an augmentation, and for targets of
            pixels, it only normalises.
        rows: images to take; default: all.
        augmentation: random views; an equal (seed, row) gives an equal view.
        resolution: (height, width) that images with targets of pixels are resized to.
        skip_corrupt: how many images that can't be read are left out, with a warning.
    """

    def __init__(
        self,
        images: LabelledImages,
        processor,
        *,
        rows: np.ndarray | None = None,
        augmentation: Augmentation | None = None,
        resolution: tuple[int, int] | None = None,
        seed: int = 0,
        skip_corrupt: int = 0,
    ):
        self.images, self.processor = images, processor
        self.rows = np.arange(len(images)) if rows is None else rows
        self.augmentation, self.resolution, self.seed = augmentation, resolution, seed
        self.skip_corrupt, self.skipped = skip_corrupt, set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch: `pixel_values` (B, C, H, W), `target` (B,) or (B, H, W), and `image_id`
        (B,).

        Images that are left out are missing in it.

        Raises:
            ValueError: more unreadable images than are tolerated, none that is left, or images of
                several sizes.
        """
        image_ids, pairs = [], []
        for row in rows:
            image_id = int(self.rows[row % len(self)])
            try:
                image, target = self.images.read(image_id)
            except ValueError as error:
                self.skip(image_id, error)
                continue
            pairs.append(self.view(image, target, (self.seed, row // len(self), image_id)))
            image_ids.append(image_id)
        if not pairs:  # the next readable image, rather than an empty batch
            return self.__getitems__([row + 1 for row in rows[-1:]])
        images, targets = zip(*pairs, strict=True)
        whole = self.augmentation is not None or isinstance(targets[0], np.ndarray)
        if whole:
            check_one_size({(image.height, image.width) for image in images})
        options = {"do_resize": False, "do_center_crop": False} if whole else {}
        pixel_values = self.processor(list(images), return_tensors="pt", **options)["pixel_values"]
        target = torch.from_numpy(np.stack(targets))
        return {"pixel_values": pixel_values, "target": target, "image_id": torch.tensor(image_ids)}

    def view(self, image, target, key: tuple[int, ...]):
        """Return an image and its target, augmented or resized as the dataset asks."""
        of_pixels = isinstance(target, np.ndarray)
        if self.augmentation is not None:
            maps = target if of_pixels else None
            image, maps = self.augmentation(image, maps, np.random.default_rng(key))
            return image, maps if of_pixels else target
        if of_pixels and self.resolution:
            return resize_pair(image, target, self.resolution)
        return image, target

    def skip(self, image_id: int, error: ValueError) -> None:
        """Leave an image out, or give up."""
        if image_id not in self.skipped:
            self.skipped.add(image_id)
            if len(self.skipped) > self.skip_corrupt:
                raise ValueError(
                    f"{error} (unreadable images so far: {len(self.skipped)}; --skip_corrupt "
                    f"{self.skip_corrupt} are tolerated)"
                ) from error
            warnings.warn(f"left out: {error}", stacklevel=2)


def check_one_size(sizes: set[tuple[int, ...]]) -> None:
    """Refuse images of several sizes (height, width), which can't be in one array."""
    if len(sizes) > 1:
        listed = ", ".join("×".join(map(str, size)) for size in sorted(sizes)[:4])
        raise ValueError(
            f"The images have several sizes ({listed}): give --resolution HEIGHT WIDTH to resize "
            "them and their targets."
        )
