"""Digit scenes: real handwritten digits that stand on receding ground, with class and depth.

The embedded dataset for dense tasks: nothing is downloaded, every pixel has a class and a depth.

A pinhole camera looks at level ground up to a dark wall. A digit at z metres is `40 / z` pixels
high and stands where the ground is z metres away; nearer digits cover farther ones.
"""

import datasets
import numpy as np
from PIL import Image

from ..data.loading import load_digits

_HEIGHT, _WIDTH = 48, 64
_HORIZON = 16  # the row where the ground would end if it went on for ever
_GROUND = 48.0  # metres × rows: it is GROUND / (row − HORIZON) metres away, 1.5 at the bottom
_DIGIT_HEIGHT = 40.0  # metres × rows
_WALL = 10.0  # metres
NEAREST, _FARTHEST = 1.5, 3.0  # metres, of the digits
_INK = 0.2  # how opaque a pixel must be to belong to the digit
NUMBER = {"train": 1000, "test": 250}
CLASSES = [str(digit) for digit in range(10)] + ["ground"]

_FEATURES = datasets.Features(
    image=datasets.Image(),  # grey, 8 bit
    mask=datasets.Image(),  # 8 bit: classes of CLASSES
    depth=datasets.Image(),  # 16 bit: millimetres
)


def digit_scenes(split: str, num_scenes: int | None = None) -> datasets.Dataset:
    """Return scenes of 48×64 pixels with 2 to 4 digits each; always the same ones.

    The ground and the wall behind it are a class of their own, the eleventh. The digits of the test
    scenes are those of the test split of `load_digits`: no training scene shows them.

    Args:
        split: `"train"` (1,000 scenes) or `"test"` (250).
        num_scenes: only so many.

    Returns:
        Columns `image`, `mask` (classes) and `depth` (millimetres), all images.
    """
    digits = load_digits(split).with_format("numpy")
    images, labels = np.stack(digits["image"][:]) / 255, np.asarray(digits["label"][:])
    columns: dict[str, list] = {name: [] for name in _FEATURES}
    for number in range(num_scenes or NUMBER[split]):
        scene = draw_scene(images, labels, np.random.default_rng((0, split == "test", number)))
        for name, pixels in scene.items():
            columns[name].append(pixels)
    return datasets.Dataset.from_dict(columns, features=_FEATURES)


def draw_scene(
    images: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw some of the digits (n, 8, 8), values in [0, 1]: `image`, `mask` and `depth`."""
    rows = np.arange(_HEIGHT)[:, None] + np.zeros((1, _WIDTH))
    depth = np.minimum(_GROUND / np.maximum(rows - _HORIZON, 1e-3), _WALL)
    depth[rows <= _HORIZON] = _WALL
    # darker with distance, and rough
    image = 30 * NEAREST / depth + rng.normal(0, 2, size=depth.shape)
    mask = np.full((_HEIGHT, _WIDTH), CLASSES.index("ground"))

    # digits from far to near, each cut off at the borders of the picture
    number = rng.integers(2, 5)
    distances = np.exp(rng.uniform(np.log(NEAREST), np.log(_FARTHEST), size=number))
    for distance in np.sort(distances)[::-1]:
        digit = rng.integers(len(images))
        size = round(_DIGIT_HEIGHT / distance)
        left = rng.integers(-size // 4, _WIDTH - 3 * size // 4)
        top = round(_HORIZON + _GROUND / distance) - size
        small = Image.fromarray(images[digit].astype(np.float32))
        ink = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)
        ink = ink[max(-top, 0) : _HEIGHT - top, max(-left, 0) : _WIDTH - left]
        window = np.s_[max(top, 0) : top + size, max(left, 0) : left + size]

        # a nearer digit is brighter, so that it stands out from those behind it
        brightness = 120 + 135 * NEAREST / distance
        image[window] = (1 - ink) * image[window] + ink * brightness
        mask[window][ink > _INK] = labels[digit]
        depth[window][ink > _INK] = distance
    return {
        "image": image.round().clip(0, 255).astype(np.uint8),
        "mask": mask.astype(np.uint8),
        "depth": (1000 * depth).round().astype(np.uint16),
    }
