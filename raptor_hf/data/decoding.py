"""Decode image files to pixels, and prepare pixels for a model.

A decoded image is upright (its EXIF orientation is applied), in RGB, of 8 bits. Grey images of 16
bits are scaled from 0 … 65,535, those of floats from 0 … 1 (or 0 … 255); other ranges are refused.
"""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterable

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

# exceptions of Pillow for files that are missing, cut off, damaged, of another kind, or too large
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError,
    MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """Return the same dataset with images as `{"path", "bytes"}`."""
    for name in image_columns(dataset):
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def image_columns(dataset: datasets.Dataset) -> list[str]:
    """Return the names of a dataset's columns of images."""
    return [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]


def open_image(cell: dict | None, *, name: str, rgb: bool = False) -> Image.Image:
    """Open and decode an image, upright.

    Args:
        cell: of `datasets`, `{"path", "bytes"}`.
        name: for errors, where the cell has no path.
        rgb: convert it to RGB of 8 bits; else it keeps its mode.

    Raises:
        ValueError: it can't be read or converted; the error names the file.
    """
    if not cell or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError(f"{name} is empty: there is no image in this row.")
    content, name = cell["bytes"], cell["path"] or name
    try:
        # refuses images of 179 megapixels and more
        image = Image.open(cell["path"] if content is None else io.BytesIO(content))
        image.load()
        with contextlib.suppress(*UNREADABLE):  # metadata that can't be read
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image) if rgb else image
    except UNREADABLE as error:
        raise ValueError(f"{name} can't be decoded: {error or type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, greys of more than 8 bits scaled.

    Raises:
        ValueError: greys out of the ranges above, or a mode that can't be converted.
    """
    if image.mode == "RGB":
        return image
    if image.mode.split(";")[0] not in ("I", "F"):
        return image.convert("RGB")
    # 16 bits, in an image of 16 or of 32 bits; or floats up to 1; or greys that fit into a byte
    grey = np.asarray(image)
    low, high = float(grey.min()), float(grey.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and 255 < high <= 65_535 and low >= 0):
        grey = (grey.astype(np.float32) / 257).round()
    elif image.mode == "F" and 0 <= low <= high <= 1:
        grey = (grey * 255).round()
    elif not 0 <= low <= high <= 255:  # NaN too
        limit = {"F": 1}.get(image.mode, 65_535)
        raise ValueError(f"greys lie in 0 … 255 or 0 … {limit}; these lie in {low:g} … {high:g}")
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def to_pixel_values(
    images: list[Image.Image] | list[np.ndarray], processor, **options
) -> torch.Tensor:
    """Return images (RGB), or their pixels (H, W, 3), as a processor prepares them: (B, C, H, W).

    Args:
        options: of the processor, instead of its own, such as `do_resize=False`.

    Raises:
        ValueError: images that have several sizes after it.
    """
    # a processor would take an array whose height is 3 for one whose channels come first
    images = [Image.fromarray(np.asarray(image)) for image in images]
    pixels = [torch.as_tensor(i) for i in processor(images, **options)["pixel_values"]]
    check_one_size(image.shape[-2:] for image in pixels)
    return torch.stack(pixels)


def check_one_size(sizes: Iterable[tuple[int, ...]]) -> None:
    """Refuse images of several sizes (height, width), which can't be in one batch."""
    different = sorted(set(sizes))
    if len(different) > 1:
        listed = ", ".join(f"{height}×{width}" for height, width in different[:4])
        raise ValueError(
            f"The images have several sizes ({listed}): give --resolution HEIGHT WIDTH, or let the "
            "image processor (preprocessor_config.json) crop them: do_center_crop, crop_size."
        )


def pixel_table(processor) -> torch.Tensor:
    """Return the values (3, 256) that a processor makes of the bytes 0 … 255 of each channel."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    made = to_pixel_values([values], processor, do_resize=False, do_center_crop=False)
    return made.reshape(3, 256)


def look_up(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return bytes (B, 3, H, W) as a `pixel_table` on the same device has them, and floats as is.

    A batch in bytes takes a quarter of the memory on its way to the device.
    """
    if values.dtype != torch.uint8:
        return values
    return torch.stack([table[c][values[:, c].int()] for c in range(3)], dim=1)
