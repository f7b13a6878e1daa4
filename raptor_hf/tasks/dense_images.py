"""Images whose every pixel has a target: masks and depth maps, as ADE20k and NYUv2 have them."""

import csv
import os
from functools import partial
from pathlib import Path

import datasets
import numpy as np

from ..data.arguments import ReadingArguments
from ..data.decoding import open_image
from ..data.folders import is_image, is_text, visible
from ..data.loading import dataset_of_files, undecoded, warn_of_folder
from .digit_scenes import CLASSES, digit_scenes
from .labelled_images import LabelledImages

IGNORED = 255  # label of a pixel without a class
_ADE20K_CLASSES = 150
_NYU_MILLIMETRES = 1000  # units of 16-bit depth images in a metre
_NYU_TRAIN_METRES = 10.0  # depth of the value 255 in NYUv2's 8-bit training images


def load_segmentation(
    name: str, split: str, reading: ReadingArguments | None = None
) -> LabelledImages:
    """Return images and their masks.

    Args:
        name: `"digit_scenes"` (embedded) or the folder `ADEChallengeData2016` of SceneParse150.
        split: `"train"` and `"test"`; of ADE20k `"training"` and `"validation"`.
        reading: with `skip_corrupt` it is left to `read` to complain of missing files.

    Raises:
        FileNotFoundError: no such folder, or an image without its mask.
        ValueError: no images in it.
    """
    reading = reading or ReadingArguments()
    if name == "digit_scenes":
        warn_of_folder(name)
        cells = undecoded(digit_scenes(split).select_columns(["image", "mask"]))
        read = partial(read_mask, num_classes=len(CLASSES), zero_is_background=False)
        return LabelledImages(name, cells, read, CLASSES, reading)
    images, masks = Path(name) / "images" / split, Path(name) / "annotations" / split
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder. Expected ADE20k's ADEChallengeData2016 with "
                "images/{training,validation} and annotations/{training,validation}."
            )
    files = _images_by_stem(images)
    masks_by_stem = _images_by_stem(masks)
    columns = {
        "image": list(files.values()),
        "mask": [masks_by_stem.get(stem, masks / f"{stem}.png") for stem in files],
    }
    cells = _paired_files(columns, where=images, missing_ok=reading.skip_corrupt > 0)
    read = partial(
        read_mask,
        num_classes=_ADE20K_CLASSES,
        zero_is_background=True,
        max_megapixels=reading.max_megapixels,
    )
    names = _ade20k_class_names(Path(name) / "objectInfo150.txt")
    return LabelledImages(name, cells, read, names, reading)


def _images_by_stem(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by their names without ending, in order.

    Raises:
        ValueError: something else in the folder, or two images of one name.
    """
    files: dict[str, Path] = {}
    for entry in sorted(visible(folder), key=lambda entry: entry.name):
        file = Path(entry.path)
        if is_text(file):
            continue
        if entry.is_dir() or not is_image(file):
            raise ValueError(f"{file} is no image: expected nothing but images in {folder}.")
        if file.stem in files:
            raise ValueError(f"{files[file.stem]} and {file} have one name: which is meant?")
        files[file.stem] = file
    return files


def _ade20k_class_names(path: Path) -> list[str]:
    """Return names of the 150 classes, from ADE20k's own table or as numbers.

    Raises:
        ValueError: a table of another number of classes.
    """
    if not path.is_file():
        return [f"class {number}" for number in range(_ADE20K_CLASSES)]
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    if len(names) != _ADE20K_CLASSES:
        raise ValueError(f"{path}: expected a heading and 150 classes; got {len(names)} classes.")
    return names


def load_depth(name: str, split: str, reading: ReadingArguments | None = None) -> LabelledImages:
    """Return images and their depth.

    Args:
        name: `"digit_scenes"` (embedded) or NYUv2's folder `nyu_data`, with
            `data/nyu2_{train,test}.csv`, whose lines are `rgb path,depth path` below that folder.
            The training images have depth of 8 bits, those of other splits of 16.
        split: `"train"` or `"test"`.
        reading: with `skip_corrupt` it is left to `read` to complain of missing files.

    Raises:
        FileNotFoundError: no such list, or a file that it names is missing.
        ValueError: an empty list, a line without two paths, or a path out of the folder.
    """
    reading = reading or ReadingArguments()
    if name == "digit_scenes":
        warn_of_folder(name)
        cells = undecoded(digit_scenes(split).select_columns(["image", "depth"]))
        return LabelledImages(name, cells, partial(read_depth, bits=16), reading=reading)
    table = Path(name) / "data" / f"nyu2_{split}.csv"
    if not table.is_file():
        raise FileNotFoundError(
            f"{table}: no such file. Expected NYUv2's folder nyu_data with data/nyu2_train.csv and "
            "data/nyu2_test.csv."
        )
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark first
        lines = [line for line in csv.reader(file) if line]
    for number, line in enumerate(lines, start=1):
        if len(line) != 2:
            raise ValueError(f"{table}, line {number}: expected `rgb path,depth path`; got {line}.")
        if any(os.path.isabs(p) or os.path.normpath(p).startswith("..") for p in line):
            raise ValueError(f"{table}, line {number}: a path leaves {name}; got {line}.")
    columns = {
        "image": [Path(name) / line[0] for line in lines],
        "depth": [Path(name) / line[1] for line in lines],
    }
    cells = _paired_files(columns, where=table, missing_ok=reading.skip_corrupt > 0)
    bits = 8 if split == "train" else 16
    read = partial(read_depth, bits=bits, max_megapixels=reading.max_megapixels)
    return LabelledImages(name, cells, read, reading=reading)


def _paired_files(
    columns: dict[str, list[Path]], *, where: Path, missing_ok: bool
) -> datasets.Dataset:
    """Return the files as a dataset of undecoded images; errors as in the loaders."""
    if not columns["image"]:
        raise ValueError(f"{where} holds no images: the split is empty.")
    missing = [str(file) for files in columns.values() for file in files if not file.is_file()]
    if missing and not missing_ok:
        raise FileNotFoundError(
            f"{len(missing)} of the files that belong to {where} are missing: "
            f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}"
        )
    paths = {name: [str(file) for file in files] for name, files in columns.items()}
    return undecoded(dataset_of_files(paths))


def read_mask(
    cell: dict,
    name: str,
    *,
    num_classes: int,
    zero_is_background: bool,
    max_megapixels: float = ReadingArguments.max_megapixels,
) -> np.ndarray:
    """Return the classes (H, W), int64, `IGNORED` where there is none.

    Args:
        zero_is_background: 0 in the file is ignored and 1, 2, … are the classes 0, 1, … (ADE20k).

    Raises:
        ValueError: not a single-channel image, or a label that is no class.
    """
    mask = np.asarray(open_image(cell, name=name, max_megapixels=max_megapixels))
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


def read_depth(
    cell: dict,
    name: str,
    *,
    bits: int,
    max_megapixels: float = ReadingArguments.max_megapixels,
) -> np.ndarray:
    """Return the depth (H, W) in metres, float32, 0 where it is unknown.

    Args:
        bits: 16 for millimetres (NYUv2's test images, digit scenes), 8 for images whose 255 is
            10 m (NYUv2's training images).

    Raises:
        ValueError: an image of another bit depth, or with several channels.
    """
    image = open_image(cell, name=name, max_megapixels=max_megapixels)
    expected = {8: ("L",), 16: ("I;16", "I;16B", "I")}[bits]
    if image.mode not in expected:
        raise ValueError(
            f"{cell['path'] or name}: expected a depth image of {bits} bits and one channel "
            f"(mode {' or '.join(expected)}); got mode {image.mode}. NYUv2 has 8 bits in its "
            "training and 16 in its test images."
        )
    depth = np.asarray(image).astype(np.float32)
    return depth / _NYU_MILLIMETRES if bits == 16 else depth / 255 * _NYU_TRAIN_METRES
