"""Images and their targets as tensors, in random views or as they are judged."""

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.decoding import to_pixel_values
from ..data.transforms import Augmentation, resize_pair
from ..data.views import public_path
from ..tasks.labelled_images import LabelledImages


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
    ):
        self.image_ids = np.arange(len(images)) if rows is None else rows
        self.images, self.processor = images, processor
        self.augmentation, self.resolution, self.seed = augmentation, resolution, seed

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch: `pixel_values` (B, C, H, W), `target` (B,) or (B, H, W), and `image_id`
        (B,).

        Raises:
            ValueError: an image or target that can't be read, or images of several sizes.
        """
        if not rows:
            return {name: torch.empty(0) for name in ("pixel_values", "target", "image_id")}
        image_ids = self.image_ids[np.array(rows) % len(self)]
        pairs = [
            self._read(row, image_id)
            for row, image_id in zip(rows, image_ids.tolist(), strict=True)
        ]
        images, targets = zip(*pairs, strict=True)
        whole = self.augmentation is not None or isinstance(targets[0], np.ndarray)
        if whole:
            check_one_size({image.shape[:2] for image in images})
        options = {"do_resize": False, "do_center_crop": False} if whole else {}
        return {
            "pixel_values": to_pixel_values(list(images), self.processor, **options),
            "target": torch.from_numpy(np.stack(targets)),
            "image_id": torch.from_numpy(image_ids),
        }

    def public_path(self, image_id: int) -> str:
        """Return the name of an image in lists, see `raptor_hf.data.views.public_path`."""
        return public_path(self.images.cells[image_id]["image"], image_id)

    def _read(self, row: int, image_id: int) -> tuple[np.ndarray, int | np.ndarray]:
        """Return an image (H, W, 3) and its target in the view of a row."""
        image, target = self.images.read(image_id)
        return self.view(image, target, (self.seed, row // len(self), image_id))

    def view(self, image: np.ndarray, target, key: tuple[int, ...]):
        """Return an image and its target, augmented or resized as the dataset asks."""
        of_pixels = isinstance(target, np.ndarray)
        if self.augmentation is not None:
            maps = target if of_pixels else None
            image, maps = self.augmentation(image, maps, np.random.default_rng(key))
            return image, maps if of_pixels else target
        if of_pixels and self.resolution:
            return resize_pair(image, target, self.resolution)
        return image, target


def check_one_size(sizes: set[tuple[int, ...]]) -> None:
    """Refuse images of several sizes (height, width), which can't be in one array."""
    if len(sizes) > 1:
        listed = ", ".join("×".join(map(str, size)) for size in sorted(sizes)[:4])
        raise ValueError(
            f"The images have several sizes ({listed}): give --resolution HEIGHT WIDTH to resize "
            "them and their targets."
        )
