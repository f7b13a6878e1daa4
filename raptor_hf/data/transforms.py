"""Random crops and flips, the same for an image and its target."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from .arguments import CropArguments


@dataclass(frozen=True)
class Augmentation:
    """A random crop that is resized, and a horizontal flip.

    Args:
        crops: area and width / height of a crop, and the probability of a flip.
        size: height and width of the result in pixels.
    """

    crops: CropArguments
    size: tuple[int, int]

    @classmethod
    def of(cls, crops: CropArguments, size: tuple[int, int]) -> "Augmentation | None":
        """Return the random views that arguments ask for; None where they ask for no crops."""
        if not crops.crop_scale:
            return None
        return cls(crops, size)

    def __call__(
        self, pixels: np.ndarray, target: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a random view (height, width, 3) of an image (H, W, 3) in bytes, and of the target
        (H, W) of its pixels, if it has one; `resize_pair` resizes both.
        """
        box = self.draw_box(pixels.shape[1], pixels.shape[0], rng)
        pixels, target = resize_pair(pixels, target, self.size, box=box)
        if rng.random() < self.crops.flip:
            pixels = pixels[:, ::-1]
            if target is not None:
                target = target[:, ::-1].copy()
        return pixels, target

    def draw_box(
        self, width: int, height: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Return left, top, width and height of a crop, drawn as torchvision does."""
        # ten draws of area and ratio, until one fits into the image
        least, most = self.crops.crop_ratio
        for _ in range(10):
            area = width * height * rng.uniform(*self.crops.crop_scale)
            ratio = math.exp(rng.uniform(math.log(least), math.log(most)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
                return int(left), int(top), w, h

        # none fits: the largest crop in the middle with an allowed ratio
        ratio = min(max(width / height, least), most)
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (width - w) // 2, (height - h) // 2, w, h


def resize_pair(
    pixels: np.ndarray,
    target: np.ndarray | None,
    size: tuple[int, int],
    *,
    box: tuple[int, int, int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Resize an image (H, W, 3) in bytes, and the target (H, W) of its pixels, if it has one.

    The result is Pillow's bicubic resize of the part that is taken, to ±2, in a third of the time.

    Args:
        size: height and width of the result.
        box: left, top, width and height of the part that is taken; default: all.
    """
    left, top, width, height = box or (0, 0, pixels.shape[1], pixels.shape[0])

    # the image is interpolated
    pixels = pixels[top : top + height, left : left + width]
    if (height, width) != tuple(size):
        planes = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
        options = {"mode": "bicubic", "antialias": True}
        pixels = functional.interpolate(planes, size, **options)[0].permute(1, 2, 0).numpy()

    # a target takes the nearest pixel: there is nothing between two classes
    if target is not None:
        rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(int)
        columns = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(int)
        target = target[top + rows][:, left + columns]
    return pixels, target
