"""Decode image files to pixels, and prepare pixels for a model.

A decoded image is upright (its EXIF orientation is applied), in RGB, of 8 bits. Grey images of 16
bits are scaled from 0 … 65,535, those of floats from 0 … 1 (or 0 … 255); other ranges are refused.
"""

import io
import re
import struct
import zlib

import datasets
import numpy as np
import torch
from PIL import Image

from .transforms import resize_pair

# exceptions of Pillow for files that are missing, cut off, damaged, of another kind, or too large
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError,
    MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_ORIENTATION = 0x0112  # EXIF tag
# the turn that makes an image upright, by the value of that tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_PPM = re.compile(rb"P6\n(\d+) (\d+)\n255\n")  # as `to_ppm` writes it


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """Return the same dataset with images as `{"path", "bytes"}`."""
    for name in image_columns(dataset):
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def image_columns(dataset: datasets.Dataset) -> list[str]:
    """Return the names of a dataset's columns of images."""
    return [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]


def open_image(
    source,
    *,
    name: str,
    rgb: bool = False,
    shorter_side: int = 0,
) -> Image.Image:
    """Open and decode an image, upright.

    Args:
        source: a cell of `datasets` (`{"path", "bytes"}`), a path or an open file.
        name: for errors, where the source has no path.
        rgb: convert it to RGB of 8 bits; else it keeps its mode.
        shorter_side: of an RGB image, see `shrink`; 0: it keeps its size.

    Raises:
        ValueError: it can't be read or converted; the error names the file.
    """
    if source is None or source == {"bytes": None, "path": None}:
        raise ValueError(f"{name} is empty: there is no image in this row.")

    # a cell holds the bytes of a file, or its path
    if isinstance(source, dict):
        content, source = source["bytes"], source["path"]
        name = source or name
        if content is not None:
            source = io.BytesIO(content)
    elif isinstance(source, str):
        name = source

    try:
        image = Image.open(source)  # refuses images of 179 megapixels and more
        # JPEG can be decoded at a half, a quarter or an eighth of its size
        if shorter_side:
            times = 2 * shorter_side / min(image.size)
            image.draft(None, (round(times * image.width), round(times * image.height)))
        # before the tag is read: TIFF turns the pixels itself, and drops it
        image.load()
        image = _upright(image)
        if rgb:
            image = to_rgb(image)
        if shorter_side:
            image = shrink(image, shorter_side)
        return image
    except UNREADABLE as error:
        raise ValueError(f"{name} can't be decoded: {error or type(error).__name__}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Return an image turned by its EXIF orientation; a tag that can't be read is no tag."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except UNREADABLE:
        turn = None
    return image if turn is None else image.transpose(turn)


def read_pixels(cell: dict, *, name: str, shorter_side: int = 0) -> np.ndarray:
    """Return the pixels (H, W, 3) of a cell of `datasets`, in RGB of 8 bits.

    Raises:
        ValueError: as `open_image`.
    """
    # the image cache holds uncompressed files, whose pixels need no decoder and no copy
    content = (cell and cell["bytes"]) or b""
    header = _PPM.match(content)
    if header:
        width, height = int(header[1]), int(header[2])
        complete = len(content) - header.end() == 3 * width * height
        if complete and (not shorter_side or min(width, height) <= shorter_side):
            pixels = np.frombuffer(content, np.uint8, offset=header.end())
            return pixels.reshape(height, width, 3)
    return np.asarray(open_image(cell, name=name, rgb=True, shorter_side=shorter_side))


def to_ppm(image: Image.Image) -> bytes:
    """Return an RGB image as an uncompressed file."""
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()


def shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    """Return an RGB image whose shorter side has so many pixels at most."""
    times = shorter_side / min(image.size)
    if times >= 1:
        return image
    height, width = max(1, round(times * image.height)), max(1, round(times * image.width))
    return Image.fromarray(resize_pair(np.asarray(image), None, (height, width))[0])


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
    pixels = processor(images, **options)["pixel_values"]
    sizes = sorted({tuple(image.shape[-2:]) for image in pixels})
    if len(sizes) > 1:
        listed = ", ".join(f"{height}×{width}" for height, width in sizes[:4])
        raise ValueError(
            f"The images of a batch have several sizes once they are prepared ({listed}). Let the "
            "image processor (preprocessor_config.json) crop them: do_center_crop, crop_size."
        )
    return torch.stack(list(map(torch.as_tensor, pixels)))


def pixel_table(processor) -> np.ndarray | None:
    """Return the values (3, 256) that a processor makes of the bytes 0 … 255 of each channel.

    With it a batch travels to the device as bytes, and `look_up` makes its pixel values there, to
    the same bits. None for a processor that does more than to look at single values.
    """
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    options = {"do_resize": False, "do_center_crop": False}
    made = np.asarray(processor(Image.fromarray(values), **options)["pixel_values"][0])
    return made.reshape(3, 256) if made.shape == (3, 16, 16) else None


def look_up(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return bytes (B, 3, H, W) as a `pixel_table` (3, 256) on the same device has them."""
    return torch.stack([table[c][values[:, c].int()] for c in range(3)], dim=1)
