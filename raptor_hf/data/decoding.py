"""What a pixel means: the one reader of image files, for all programs.

An image is upright (its EXIF orientation is applied), in RGB, of 8 bits. Grey images of 16 bits are
scaled from 0 … 65,535, those of floats from 0 … 1 (or 0 … 255); what else is out of range is
refused by name.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_transforms import get_resize_output_image_size

from .transforms import resize_pair

# what Pillow raises for files that are missing, cut off, damaged, of another kind, or too large
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError,
    MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_ORIENTATION = 0x0112  # EXIF tag
_PPM = re.compile(rb"P6\n(\d+) (\d+)\n255\n")  # as `to_ppm` writes it
_THIN = 8  # times longer than wide: a thread of an image would be huge once it is resized


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """Return the same dataset with images as `{"path", "bytes"}`."""
    for name, kind in dataset.features.items():
        if isinstance(kind, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def open_image(
    source,
    *,
    name: str,
    max_megapixels: float,
    formats: tuple[str, ...] | None = None,
    convert: Callable[[Image.Image], Image.Image] | None = None,
    shorter_side: int = 0,
) -> Image.Image:
    """Return a decoded image, upright, in its own mode.

    Args:
        source: a cell of `datasets` (`{"path", "bytes"}`), a path or an open file.
        name: what errors call it where the source has no path.
        max_megapixels: larger ones are refused before their pixels are decoded.
        formats: of Pillow; default: all.
        convert: what is made of the upright image.
        shorter_side: of an RGB image, see `shrink`; 0: it stays as large as it is.

    Raises:
        ValueError: it can't be read or converted; path or name are given.
    """
    if source is None or source == {"bytes": None, "path": None}:
        raise ValueError(f"{name} is empty: there is no image in this row.")
    if isinstance(source, dict):
        name = source["path"] or name
        source = source["path"] if source["bytes"] is None else io.BytesIO(source["bytes"])
    elif isinstance(source, str):
        name = source
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own bound is in the way of larger ones
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, int(max_megapixels * 1e6))
    try:
        image = Image.open(source, formats=formats)
        if image.width * image.height <= max_megapixels * 1e6:
            if shorter_side:  # JPEG can be decoded at a half, a quarter or an eighth
                times = 2 * shorter_side / min(image.size)
                image.draft(None, tuple(round(times * length) for length in image.size))
            image.load()  # before the tag is read: TIFF turns the pixels itself, and drops it
            if image.getexif().get(_ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            image = convert(image) if convert else image
            return shrink(image, shorter_side) if shorter_side else image
    except UNREADABLE as error:
        raise ValueError(f"{name} can't be decoded: {error or type(error).__name__}") from error
    raise ValueError(
        f"{name} has {image.width:,}×{image.height:,} pixels, more than --max_megapixels "
        f"{max_megapixels:g}."
    )


def read_image(source, *, name: str, max_megapixels: float, **options) -> Image.Image:
    """Return an image in RGB, upright; arguments and errors as `open_image`."""
    return open_image(source, name=name, max_megapixels=max_megapixels, convert=to_rgb, **options)


def read_pixels(
    cell: dict, *, name: str, max_megapixels: float, shorter_side: int = 0
) -> np.ndarray:
    """Return what `read_image` returns as bytes (H, W, 3); cached images are handed on as they are.

    Args:
        cell: of `datasets`, `{"path", "bytes"}`.
    """
    content = cell and cell["bytes"]
    if content and (raw := _PPM.match(content)):
        width, height = int(raw[1]), int(raw[2])
        small = min(width, height) <= (shorter_side or min(width, height))
        if small and len(content) - raw.end() == 3 * width * height <= 3e6 * max_megapixels:
            return np.frombuffer(content, np.uint8, offset=raw.end()).reshape(height, width, 3)
    options = {"max_megapixels": max_megapixels, "shorter_side": shorter_side}
    return np.asarray(read_image(cell, name=name, **options))


def to_ppm(image: Image.Image) -> bytes:
    """Return an RGB image as an uncompressed file."""
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()


def shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    """Return an RGB image whose shorter side has so many pixels at most."""
    times = shorter_side / min(image.size)
    if times >= 1:
        return image
    height, width = (max(1, round(times * length)) for length in (image.height, image.width))
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
    grey = np.asarray(image)
    low, high = float(grey.min()), float(grey.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and 255 < high <= 65_535 and low >= 0):
        grey = (grey.astype(np.float32) / 257).round()
    elif image.mode == "F" and 0 <= low <= high <= 1:
        grey = (grey * 255).round()
    elif not 0 <= low <= high <= 255:  # NaN too
        ranges = "0 … 1 or 0 … 255" if image.mode == "F" else "0 … 255 or 0 … 65535"
        raise ValueError(f"greys lie in {ranges}; these lie in {low:g} … {high:g}")
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def to_pixel_values(
    images: list[Image.Image] | list[np.ndarray], processor, **options
) -> torch.Tensor:
    """Return images (RGB), or their bytes (H, W, 3), as a model's processor prepares them:
    (B, C, H, W).

    Where the processor resizes the shorter side and crops the middle, of a thin image only that
    middle is resized: the same pixels, without the rest.

    Args:
        options: of the processor, instead of its own, such as `do_resize=False`.

    Raises:
        ValueError: images that have several sizes after it.
    """
    # of an array whose height is 3 a processor would think that its channels come first
    images = [Image.fromarray(i) if isinstance(i, np.ndarray) else i for i in images]
    if not options and any(_is_thin(image) for image in images) and _crops_middle(processor):
        parts = [
            processor(_resized_middle(image, processor), do_resize=False)
            if _is_thin(image)
            else processor(image)
            for image in images
        ]
        pixels = [part["pixel_values"][0] for part in parts]
    else:
        pixels = processor(images, **options)["pixel_values"]
    sizes = {tuple(image.shape[-2:]) for image in pixels}
    if len(sizes) > 1:
        listed = ", ".join("×".join(map(str, size)) for size in sorted(sizes)[:4])
        raise ValueError(
            f"The images have several sizes once they are prepared ({listed}), and a batch has "
            "one. Let the image processor (preprocessor_config.json) crop them (do_center_crop, "
            "crop_size) or give them one size (height and width)."
        )
    return torch.stack([torch.as_tensor(image) for image in pixels])


def pixel_table(processor) -> np.ndarray | None:
    """Return what a processor makes of the values 0 … 255 of each channel, (3, 256) float32.

    So bytes are enough to hand a batch over to the device that computes, where `look_up` makes what
    the processor would have made, to the same bits. None for a processor that does something else.
    """
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    options = {"do_resize": False, "do_center_crop": False}
    made = np.asarray(processor(Image.fromarray(values), **options)["pixel_values"][0])
    return made.reshape(3, 256) if made.shape == (3, 16, 16) else None


def look_up(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return bytes (B, 3, H, W) as a `pixel_table` (3, 256) on the same device has them."""
    return torch.stack([table[c][values[:, c].int()] for c in range(3)], dim=1)


def _is_thin(image: Image.Image) -> bool:
    """Return whether an image is many times longer than wide, or wider than long."""
    return max(image.size) > _THIN * min(image.size)


def _crops_middle(processor) -> bool:
    """Return whether a processor resizes the shorter side of an image and crops its middle."""
    settings = processor.to_dict()
    size = settings.get("size") or {}
    sides = {name for name, pixels in size.items() if pixels is not None}
    return bool(
        settings.get("do_resize") and settings.get("do_center_crop") and sides == {"shortest_edge"}
    )


def _resized_middle(image: Image.Image, processor) -> Image.Image:
    """Return what of a resized image a processor's crop of the middle leaves, resizing no more."""
    settings = processor.to_dict()
    height, width = get_resize_output_image_size(
        np.empty((image.height, image.width, 0)),
        size=settings["size"]["shortest_edge"],
        default_to_square=False,
        input_data_format="channels_last",
    )
    crop = settings["crop_size"]
    rows, columns = min(height, crop["height"]), min(width, crop["width"])
    top, left = (height - rows) // 2, (width - columns) // 2
    down, across = image.height / height, image.width / width  # pixels of the file in one
    box = (left * across, top * down, (left + columns) * across, (top + rows) * down)
    return image.resize((columns, rows), settings["resample"], box=box)
