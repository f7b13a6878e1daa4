"""What the numbers in a mask or a depth map mean, and the names of classes."""

import logging
from pathlib import Path

import numpy as np

from ..data.decoding import open_image
from ..runs.files import read_json, read_text

logger = logging.getLogger(__name__)

IGNORED = 255  # label of a pixel without a class, once it is read
_MODES = {8: ("L",), 16: ("I;16", "I;16B", "I")}  # of Pillow, by the bits of a channel


def read_class_names(source: str | Path | None, *, of: str) -> list[str]:
    """Return the names of classes in the order of their labels.

    Args:
        source: a text file with a name a line; a table like ADE20k's, with lines from the number
            of the class to its names; or a JSON file like Hugging Face's id2label.json.
        of: name of their dataset, for errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none is given, an empty one, or numbers with gaps.
    """
    if source is None:
        raise ValueError(
            f"{of}: the names of the classes of its masks are unknown. Give --class_names FILE: a "
            "name a line, in the order of the labels."
        )
    rows = [line.strip().split("\t") for line in read_text(source).splitlines() if line.strip()]
    if str(source).endswith(".json"):
        content = read_json(source)
        if isinstance(content, list):  # of names, instead of numbers and names
            content = dict(enumerate(content))
        numbered = {int(number): name for number, name in content.items()}
    elif any(len(row) == 1 for row in rows):
        numbered = dict(enumerate("\t".join(row) for row in rows))
    else:
        # ADE20k's table has a heading, and several names of a class
        numbered = {int(row[0]): row[-1].split(",")[0] for row in rows if row[0].isdigit()}
    numbers = sorted(numbered)
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ValueError(f"{source}: expected classes numbered in a row; got {numbers[:9]} …")
    return [numbered[number] for number in numbers]


def read_mask(
    cell: dict,
    name: str,
    *,
    num_classes: int,
    first_label: int = 0,
    ignore_label: int = IGNORED,
) -> np.ndarray:
    """Return the classes (H, W), int64, from 0 on, `IGNORED` where there is none.

    Args:
        first_label: number of the first class in the file; lower ones are no class. 1 for ADE20k.
        ignore_label: another number in the file that is no class.

    Raises:
        ValueError: not a single-channel image, or a label that is no class.
    """
    image, name = open_image(cell, name=name), cell["path"] or name
    mask = np.asarray(image)
    # one whole number a pixel
    if mask.ndim != 2:
        raise ValueError(
            f"{name}: a mask has one channel, whose numbers are the classes (with or without a "
            f"palette); got {image.mode}, {mask.shape}. Convert colours to numbers."
        )
    if mask.dtype.kind == "f" and not np.array_equal(mask, np.round(mask)):  # NaN is none either
        raise ValueError(f"{name}: a mask holds whole numbers; these are fractions.")
    # numbers outside of the classes count as no class, or are an error
    labels = mask.astype(np.int64)
    nothing = (labels < first_label) | (labels == ignore_label)
    wrong = labels[~nothing & (labels >= first_label + num_classes)]
    if wrong.size:
        raise ValueError(
            f"{name}: a mask holds the {num_classes} classes {first_label} … "
            f"{first_label + num_classes - 1}, or {ignore_label} for none; got {wrong.min()} … "
            f"{wrong.max()}. --class_names, --first_label and --ignore_label say what they mean."
        )
    return np.where(nothing, IGNORED, labels - first_label)


def check_classes(masks: list[np.ndarray], class_names: list[str], *, of: str) -> None:
    """Warn of classes without a pixel in the masks (H, W) of a dataset: no head can learn them.

    Raises:
        ValueError: fewer than two classes have pixels.
    """
    present = set().union(*(np.unique(mask).tolist() for mask in masks))
    missing = [name for number, name in enumerate(class_names) if number not in present]
    listed = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
    if len(class_names) - len(missing) < 2:
        raise ValueError(
            f"{of}: {len(masks)} masks have no pixel of {listed}, which leaves fewer than two "
            "classes. --class_names, --first_label and --ignore_label (255) say what their numbers "
            "mean."
        )
    if missing:
        number, total = len(missing), len(class_names)
        logger.warning("%s: %d of %d classes have no pixel: %s", of, number, total, listed)


def read_depth(cell: dict, name: str, *, unit_m: float, bits: int | None = None) -> np.ndarray:
    """Return the depth (H, W) in metres, float32, 0 where it is unknown.

    Args:
        unit_m: metres in one unit of the file.
        bits: of the channel, 8 or 16; None: any, and floats, where NaN is unknown.

    Raises:
        ValueError: an image of another bit depth, with several channels, or of negative depth.
    """
    image, name = open_image(cell, name=name), cell["path"] or name
    expected = _MODES[bits] if bits else (*_MODES[8], *_MODES[16], "F")
    if image.mode not in expected:
        raise ValueError(
            f"{name}: expected a depth image of {bits or '8, 16 or 32'} bits and one channel (mode "
            f"{' or '.join(expected)}); got mode {image.mode}."
        )
    depth = np.nan_to_num(np.asarray(image).astype(np.float32), nan=0, posinf=0)
    if depth.min() < 0:
        raise ValueError(f"{name}: depth can't be negative; got {depth.min()}.")
    return depth * np.float32(unit_m)
