"""Images with a class or a depth at every pixel, in the layouts that people have them in.

Every dataset has the columns `image` and `mask` or `depth`, undecoded: what can't be read is named.
"""

import csv
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from .digit_scenes import digit_scenes

IGNORED = 255  # label of a pixel without a class
NYU_MILLIMETRES = 1000  # units of 16-bit depth images in a metre
NYU_TRAIN_METRES = 10.0  # depth of the value 255 in NYUv2's 8-bit training images
# what PIL raises for files that are missing, cut off, of another kind, or absurdly large
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def load_segmentation(name: str, split: str) -> datasets.Dataset:
    """Images and their masks.

    Args:
        name: `"digit_scenes"` (embedded) or the folder `ADEChallengeData2016` of SceneParse150.
        split: `"train"` and `"test"`; of ADE20k `"training"` and `"validation"`.

    Returns:
        Columns `image` and `mask`; `read_mask` gives the classes.

    Raises:
        FileNotFoundError: no such folder, or an image without its mask.
        ValueError: no images in it.
    """
    if name == "digit_scenes":
        return undecoded(digit_scenes(split).select_columns(["image", "mask"]))
    images, masks = Path(name) / "images" / split, Path(name) / "annotations" / split
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder. Expected ADE20k's ADEChallengeData2016 with "
                "images/{training,validation} and annotations/{training,validation}."
            )
    files = sorted(file for file in images.iterdir() if file.suffix.lower() in (".jpg", ".png"))
    columns = {"image": files, "mask": [masks / f"{file.stem}.png" for file in files]}
    return paired_files(columns, where=images)


def load_depth(name: str, split: str) -> datasets.Dataset:
    """Images and their depth.

    Args:
        name: `"digit_scenes"` (embedded) or NYUv2's folder `nyu_data`, with
            `data/nyu2_{train,test}.csv`, whose lines are `rgb path,depth path` below that folder.
        split: `"train"` or `"test"`.

    Returns:
        Columns `image` and `depth`; `read_depth` gives metres.

    Raises:
        FileNotFoundError: no such list, or a file that it names is missing.
        ValueError: an empty list, or a line without two paths.
    """
    if name == "digit_scenes":
        return undecoded(digit_scenes(split).select_columns(["image", "depth"]))
    table = Path(name) / "data" / f"nyu2_{split}.csv"
    if not table.is_file():
        raise FileNotFoundError(
            f"{table}: no such file. Expected NYUv2's folder nyu_data with data/nyu2_train.csv and "
            "data/nyu2_test.csv."
        )
    with table.open(newline="") as file:
        lines = [line for line in csv.reader(file) if line]
    for number, line in enumerate(lines, start=1):
        if len(line) != 2:
            raise ValueError(f"{table}, line {number}: expected `rgb path,depth path`; got {line}.")
    columns = {
        "image": [Path(name) / line[0] for line in lines],
        "depth": [Path(name) / line[1] for line in lines],
    }
    return paired_files(columns, where=table)


def paired_files(columns: dict[str, list[Path]], *, where: Path) -> datasets.Dataset:
    """Files as a dataset of undecoded images; errors as in the loaders."""
    if not columns["image"]:
        raise ValueError(f"{where} holds no images: the split is empty.")
    missing = [str(file) for files in columns.values() for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the files that belong to {where} are missing: "
            f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}"
        )
    features = datasets.Features({name: datasets.Image(decode=False) for name in columns})
    paths = {name: [str(file) for file in files] for name, files in columns.items()}
    return datasets.Dataset.from_dict(paths, features=features)


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """The same dataset with images as `{"path", "bytes"}`."""
    for name in dataset.column_names:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def open_image(cell: dict, *, name: str) -> Image.Image:
    """A decoded image of an undecoded cell.

    Args:
        name: what the error calls it where the cell has no path.

    Raises:
        ValueError: it can't be read.
    """
    source = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
    try:
        image = Image.open(source)
        image.load()
    except UNREADABLE as error:
        raise ValueError(f"{cell['path'] or name} can't be decoded: {error}") from error
    return image


def read_mask(cell: dict, *, name: str, num_classes: int, zero_is_background: bool) -> np.ndarray:
    """Classes (H, W), int64, `IGNORED` where there is none.

    Args:
        zero_is_background: 0 in the file is ignored and 1, 2, … are the classes 0, 1, … (ADE20k).

    Raises:
        ValueError: not a single-channel image, or a label that is no class.
    """
    mask = np.asarray(open_image(cell, name=name))
    if mask.ndim != 2:
        raise ValueError(f"{cell['path'] or name}: a mask has one channel; got {mask.shape}.")
    mask = mask.astype(np.int64)
    if zero_is_background:
        mask = np.where((mask == 0) | (mask == IGNORED), IGNORED, mask - 1)
    wrong = mask[(mask != IGNORED) & ((mask < 0) | (mask >= num_classes))]
    if wrong.size:
        raise ValueError(
            f"{cell['path'] or name}: a mask holds the classes 0 … {num_classes - 1}, or "
            f"{IGNORED} for none; got {wrong.min()} … {wrong.max()}."
        )
    return mask


def read_depth(cell: dict, *, name: str, bits: int) -> np.ndarray:
    """Depth (H, W) in metres, float32, 0 where it is unknown.

    Args:
        bits: 16 for millimetres (NYUv2's test images, digit scenes), 8 for images whose 255 is
            10 m (NYUv2's training images).

    Raises:
        ValueError: an image of another bit depth, or with several channels.
    """
    image = open_image(cell, name=name)
    expected = {8: ("L",), 16: ("I;16", "I;16B", "I")}[bits]
    if image.mode not in expected:
        raise ValueError(
            f"{cell['path'] or name}: expected a depth image of {bits} bits and one channel "
            f"(mode {' or '.join(expected)}); got mode {image.mode}. NYUv2 has 8 bits in its "
            "training and 16 in its test images."
        )
    depth = np.asarray(image).astype(np.float32)
    return depth / NYU_MILLIMETRES if bits == 16 else depth / 255 * NYU_TRAIN_METRES


def check_pair(image: Image.Image, target: np.ndarray, *, name: str) -> None:
    """Refuse a mask or depth of another size than its image."""
    if target.shape != (image.height, image.width):
        raise ValueError(
            f"{name}: image and target must have the same size; got {image.height}×{image.width} "
            f"and {target.shape[0]}×{target.shape[1]}."
        )
