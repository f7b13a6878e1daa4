"""What the numbers in a mask or a depth map mean, and the names of classes."""

import json
import logging
from pathlib import Path

import numpy as np

from ..data.decoding import open_image

logger = logging.getLogger(__name__)

IGNORED = 255  # label of a pixel without a class, once it is read
_MODES = {8: ("L",), 16: ("I;16", "I;16B", "I")}  # of Pillow, by the bits of a channel


def read_class_names(source: str | Path | None, *, of: str) -> list[str]:
    """Return the names of classes in the order of their labels.

    Args:
        source: a text file with a name a line; a table like ADE20k's, with lines from the number
            of the class to its names; or a JSON file like Hugging Face's
            id2label.json.
        of: name of their dataset, for errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none is given, an empty one, or numbers with gaps.
    """
    if source is None:
        raise ValueError(
            f"{of}: how many classes its masks have, and their names, is nowhere said. Give "
            "--class_names FILE: a name a line, in the order of the labels."
        )
    text = Path(source).read_text(encoding="utf-8-sig")
    if str(source).endswith(".json"):
        content = json.loads(text)
        if isinstance(content, list):  # of names, instead of numbers and names
            content = dict(enumerate(content))
        numbered = {int(number): str(name) for number, name in content.items()}
    else:
        numbered = _names_of_lines([line for line in text.splitlines() if line.strip()])
    numbers = sorted(numbered)
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ValueError(f"{source}: expected classes numbered in a row; got {numbers[:9]} …")
    return [numbered[number] for number in numbers]


def _names_of_lines(lines: list[str]) -> dict[int, str]:
    """Return numbers and names of the classes in a text file, a line a class."""
    rows = [line.split("\t") for line in lines]
    if any(len(row) == 1 for row in rows):
        return dict(enumerate(line.strip() for line in lines))
    # a table: ADE20k's has a heading, and several names of a class
    names = {}
    for number, *_, name in rows:
        if number.strip().isdigit():
            names[int(number)] = name.split(",")[0].strip()
    return names


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
    image = open_image(cell, name=name)
    mask = np.asarray(image)
    if mask.ndim != 2:
        raise ValueError(
            f"{cell['path'] or name}: a mask has one channel, whose numbers are the classes (with "
            f"or without a palette); got {image.mode}, {mask.shape}. Convert colours to numbers."
        )
    if mask.dtype.kind == "f" and not np.array_equal(mask, np.round(mask)):  # NaN is none either
        raise ValueError(
            f"{cell['path'] or name}: a mask holds whole numbers; these are fractions."
        )
    labels = mask.astype(np.int64)
    nothing = (labels < first_label) | (labels == ignore_label)
    wrong = labels[~nothing & (labels >= first_label + num_classes)]
    if wrong.size:
        raise ValueError(
            f"{cell['path'] or name}: a mask holds the {num_classes} classes {first_label} … "
            f"{first_label + num_classes - 1}, or {ignore_label} for none; got {wrong.min()} … "
            f"{wrong.max()}. --class_names, --first_label and --ignore_label say what its numbers "
            "mean."
        )
    return np.where(nothing, IGNORED, labels - first_label)


def check_classes(masks: list[np.ndarray], class_names: list[str], *, of: str) -> None:
    """Warn of classes without a pixel in some masks: no head can learn them.

    Args:
        masks: (H, W) each, from `read_mask`.
        of: name of their dataset, for errors.

    Raises:
        ValueError: fewer than two classes have pixels.
    """
    counts = np.zeros(len(class_names), dtype=int)
    for mask in masks:
        counts += np.bincount(mask[mask != IGNORED], minlength=len(class_names))
    missing = [name for name, number in zip(class_names, counts, strict=True) if not number]
    listed = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
    if len(class_names) - len(missing) < 2:
        raise ValueError(
            f"{of}: {len(masks)} masks have no pixel of {listed}, which leaves fewer than two "
            "classes. --class_names, --first_label and --ignore_label (255) say what their numbers "
            "mean."
        )
    if missing:
        logger.warning(
            "%s: %d of %d classes have no pixel in %d masks: %s",
            of, len(missing), len(class_names), len(masks), listed,
        )  # fmt: skip


def read_depth(
    cell: dict,
    name: str,
    *,
    unit_m: float,
    bits: int | None = None,
) -> np.ndarray:
    """Return the depth (H, W) in metres, float32, 0 where it is unknown.

    Args:
        unit_m: metres in one unit of the file.
        bits: of the channel, 8 or 16; None: any, and floats, where NaN is unknown.

    Raises:
        ValueError: an image of another bit depth, with several channels, or of negative depth.
    """
    image = open_image(cell, name=name)
    expected = _MODES[bits] if bits else (*_MODES[8], *_MODES[16], "F")
    if image.mode not in expected:
        raise ValueError(
            f"{cell['path'] or name}: expected a depth image of {bits or '8, 16 or 32'} bits and "
            f"one channel (mode {' or '.join(expected)}); got mode {image.mode}. NYUv2 has 8 bits "
            "in its training and 16 in its test images."
        )
    depth = np.nan_to_num(np.asarray(image).astype(np.float32), nan=0, posinf=0)
    if depth.min() < 0:
        raise ValueError(f"{cell['path'] or name}: depth can't be negative; got {depth.min()}.")
    return depth * np.float32(unit_m)
