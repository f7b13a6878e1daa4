"""Images whose every pixel has a target: masks and depth maps, from folders and from the Hub.

A folder has pairs of files of one name: `images/<split>` beside `annotations/<split>` or
`depths/<split>`. ADE20k is such a folder. NYUv2 is one with lists of pairs.
"""

import csv
import json
import os
from functools import partial
from pathlib import Path

import datasets
import numpy as np

from ..data.arguments import ReadingArguments
from ..data.decoding import open_image
from ..data.folders import is_image, is_text, visible
from ..data.loading import dataset_of_files, is_folder, load_columns, undecoded, warn_of_folder
from .arguments import DenseArguments
from .digit_scenes import CLASSES, digit_scenes
from .labelled_images import LabelledImages

IGNORED = 255  # label of a pixel without a class, once it is read
_TABLES = ("objectInfo150.txt", "objectInfo.txt")  # of ADE20k, and of what has its layout
_MODES = {8: ("L",), 16: ("I;16", "I;16B", "I")}  # of Pillow, by the bits of a channel
_NYU_UNITS = {8: 10 / 255, 16: 1 / 1000}  # metres in a unit of NYUv2's training and test images
_MILLIMETRES = 1 / 1000


def load_segmentation(
    name: str,
    split: str,
    reading: ReadingArguments | None = None,
    dense: DenseArguments | None = None,
) -> LabelledImages:
    """Return images and their masks.

    Args:
        name: `"digit_scenes"` (embedded), a folder with images/<split> and annotations/<split>,
            or a dataset of the Hub with a column of masks.
        split: `"train"` and `"test"` of the embedded one, `"training"` and `"validation"` of
            ADE20k, or what the dataset calls its splits.
        reading: with `skip_corrupt` it is left to `read` to complain of missing files.
        dense: column of masks, names of the classes, what the labels stand for.

    Raises:
        FileNotFoundError: no such folder or dataset, or an image without its mask.
        ValueError: no images in it, or classes without names.
    """
    reading, dense = reading or ReadingArguments(), dense or DenseArguments()
    if name == "digit_scenes":
        warn_of_folder(name)
        cells = undecoded(digit_scenes(split).select_columns(["image", "mask"]))
        read = partial(read_mask, num_classes=len(CLASSES))
        return LabelledImages(name, cells, read, CLASSES, reading)
    table = None
    if is_folder(name):
        root = Path(name).expanduser()
        cells = _folder_of_pairs(root, split, "annotations", "mask", reading)
        table = next((root / table for table in _TABLES if (root / table).is_file()), None)
    else:
        cells = _hub_pairs(name, split, "mask", reading, dense)
    names = read_class_names(dense.class_names or table, of=name)
    if len(names) > IGNORED:
        raise ValueError(f"{name}: masks of at most {IGNORED} classes; got {len(names)}.")
    first = dense.first_label
    if first is None:  # ADE20k's 0 is no class
        first = 1 if table and not dense.class_names else 0
    read = partial(
        read_mask,
        num_classes=len(names),
        first_label=first,
        ignore_label=dense.ignore_label,
        max_megapixels=reading.max_megapixels,
    )
    return LabelledImages(name, cells, read, names, reading)


def load_depth(
    name: str,
    split: str,
    reading: ReadingArguments | None = None,
    dense: DenseArguments | None = None,
) -> LabelledImages:
    """Return images and their depth.

    Args:
        name: `"digit_scenes"` (embedded); NYUv2's folder `nyu_data`, with
            `data/nyu2_{train,test}.csv`, whose lines are `rgb path,depth path` below that folder
            (the training images have depth of 8 bits, those of other splits of 16); a folder with
            images/<split> and depths/<split>; or a dataset of the Hub with a column of depth.
        split: `"train"`, `"test"`, or what the dataset calls its splits.
        reading: with `skip_corrupt` it is left to `read` to complain of missing files.
        dense: column of depth, and its unit, which all but the first two need.

    Raises:
        FileNotFoundError: no such folder, dataset or list, or a file that it names is missing.
        ValueError: an empty list, a line without two paths, a path out of the folder, or no unit.
    """
    reading, dense = reading or ReadingArguments(), dense or DenseArguments()
    if name == "digit_scenes":
        warn_of_folder(name)
        cells = undecoded(digit_scenes(split).select_columns(["image", "depth"]))
        read = partial(read_depth, unit_m=_MILLIMETRES, bits=16)
        return LabelledImages(name, cells, read, reading=reading)
    bits, unit = None, dense.depth_unit_m
    if not is_folder(name):
        cells = _hub_pairs(name, split, "depth", reading, dense)
    elif (root := Path(name).expanduser()) and (root / "depths").is_dir():
        cells = _folder_of_pairs(root, split, "depths", "depth", reading)
    else:
        cells = _nyu_pairs(root, split, reading)
        bits = 8 if split == "train" else 16
        unit = unit or _NYU_UNITS[bits]
    if unit is None:
        raise ValueError(
            f"{name}: the numbers in depth images have no unit of their own. Give --depth_unit_m, "
            "the metres in one of them: 0.001 where they are millimetres, 1 where they are metres."
        )
    limit = reading.max_megapixels
    read = partial(read_depth, unit_m=unit, bits=bits, max_megapixels=limit)
    return LabelledImages(name, cells, read, reading=reading)


def read_class_names(source: str | Path | None, *, of: str) -> list[str]:
    """Return the names of classes in the order of their labels.

    Args:
        source: a text file with a name a line; a table like ADE20k's, whose lines begin with the
            number of the class and end with its names; or a JSON file like Hugging Face's
            id2label.json.
        of: whose classes they are, for errors.

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
        numbered = {int(number): str(name) for number, name in json.loads(text).items()}
    else:
        cells = [line.split("\t") for line in text.splitlines() if line.strip()]
        if not all(len(row) > 1 for row in cells):
            numbered = {number: row[0].strip() for number, row in enumerate(cells)}
        else:  # ADE20k's has a heading
            rows = [row for row in cells if row[0].strip().isdigit()]
            numbered = {int(row[0]): row[-1].split(",")[0].strip() for row in rows}
    numbers = sorted(numbered)
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ValueError(f"{source}: expected classes numbered in a row; got {numbers[:9]} …")
    return [numbered[number] for number in numbers]


def _folder_of_pairs(
    root: Path, split: str, targets: str, column: str, reading: ReadingArguments
) -> datasets.Dataset:
    """Return the pairs of files of one name in `images/<split>` and `<targets>/<split>`."""
    folders = {"image": root / "images" / split, column: root / targets / split}
    for folder in folders.values():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder. Expected images and their {column}s with equal names "
                f"in {root}/images/<split> and {root}/{targets}/<split>, as ADE20k's "
                "ADEChallengeData2016 has them."
            )
    files, others = (_images_by_stem(folder) for folder in folders.values())
    columns = {
        "image": list(files.values()),
        column: [others.get(stem, folders[column] / f"{stem}.png") for stem in files],
    }
    return _paired_files(columns, where=folders["image"], missing_ok=reading.skip_corrupt > 0)


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


def _nyu_pairs(root: Path, split: str, reading: ReadingArguments) -> datasets.Dataset:
    """Return the pairs of NYUv2's list of a split; errors as `load_depth`."""
    table = root / "data" / f"nyu2_{split}.csv"
    if not table.is_file():
        raise FileNotFoundError(
            f"{table}: no such file. Expected NYUv2's folder nyu_data with data/nyu2_train.csv and "
            f"data/nyu2_test.csv, or a folder with images/{split} and depths/{split}."
        )
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark first
        lines = [line for line in csv.reader(file) if line]
    for number, line in enumerate(lines, start=1):
        if len(line) != 2:
            raise ValueError(f"{table}, line {number}: expected `rgb path,depth path`; got {line}.")
        if any(os.path.isabs(p) or os.path.normpath(p).startswith("..") for p in line):
            raise ValueError(f"{table}, line {number}: a path leaves {root}; got {line}.")
    columns = {"image": [root / line[0] for line in lines], "depth": [root / li[1] for li in lines]}
    return _paired_files(columns, where=table, missing_ok=reading.skip_corrupt > 0)


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


def _hub_pairs(
    name: str, split: str, column: str, reading: ReadingArguments, dense: DenseArguments
) -> datasets.Dataset:
    """Return the images of a dataset of the Hub, and their masks or depth in `column`."""
    dataset = load_columns(name, split, reading)
    pictures = [c for c, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    others = [c for c in pictures if c != reading.image_column]
    target = dense.target_column
    if target is None and len(others) == 1:  # nothing else can be meant
        target = others[0]
    if reading.image_column not in pictures or target not in others:
        raise ValueError(
            f"{name} ({split}) has the columns of images {', '.join(pictures) or 'none'}: which "
            f"holds the images, and which their {column}? Give --image_column and --target_column."
        )
    pairs = dataset.select_columns([reading.image_column, target])
    renamed = {reading.image_column: "image", target: column}
    pairs = pairs.rename_columns({old: new for old, new in renamed.items() if old != new})
    return undecoded(pairs)


def read_mask(
    cell: dict,
    name: str,
    *,
    num_classes: int,
    first_label: int = 0,
    ignore_label: int = IGNORED,
    max_megapixels: float = ReadingArguments.max_megapixels,
) -> np.ndarray:
    """Return the classes (H, W), int64, from 0 on, `IGNORED` where there is none.

    Args:
        first_label: number of the first class in the file; lower ones are no class. 1 for ADE20k.
        ignore_label: another number in the file that is no class.

    Raises:
        ValueError: not a single-channel image, or a label that is no class.
    """
    image = open_image(cell, name=name, max_megapixels=max_megapixels)
    mask = np.asarray(image)
    if mask.ndim != 2:
        raise ValueError(
            f"{cell['path'] or name}: a mask has one channel, whose numbers are the classes (with "
            f"or without a palette); got {image.mode}, {mask.shape}. Convert colours to numbers."
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


def read_depth(
    cell: dict,
    name: str,
    *,
    unit_m: float,
    bits: int | None = None,
    max_megapixels: float = ReadingArguments.max_megapixels,
) -> np.ndarray:
    """Return the depth (H, W) in metres, float32, 0 where it is unknown.

    Args:
        unit_m: metres in one unit of the file.
        bits: of the channel, 8 or 16; None: any, floats too, whose NaN are unknown.

    Raises:
        ValueError: an image of another bit depth, with several channels, or of negative depth.
    """
    image = open_image(cell, name=name, max_megapixels=max_megapixels)
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
