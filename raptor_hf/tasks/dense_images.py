"""Images with a target at every pixel, masks or depth maps, from folders and from the Hub.

A folder has pairs of files of one name: `images/<split>` beside `annotations/<split>` or
`depths/<split>`. ADE20k is such a folder. NYUv2 is one with lists of pairs.
"""

import csv
import os
from functools import partial
from itertools import chain
from pathlib import Path

import datasets

from ..data.arguments import ReadingArguments
from ..data.decoding import image_columns, undecoded
from ..data.folders import list_folder
from ..data.loading import dataset_of_files, is_folder, load_columns, real_folder
from .arguments import DenseArguments
from .digit_scenes import CLASSES, digit_scenes
from .labelled_images import LabelledImages
from .targets import IGNORED, read_class_names, read_depth, read_mask

_TABLES = ("objectInfo150.txt", "objectInfo.txt")  # of ADE20k and of datasets in its layout
_NYU_UNITS = {8: 10 / 255, 16: 1 / 1000}  # metres in a unit of NYUv2's training and test images


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
            ADE20k, or a split of the dataset by its own name.
        reading: with `skip_corrupt` missing files are refused when they are read.
        dense: column of masks, names of the classes, numbers of the labels.

    Raises:
        FileNotFoundError: no such folder or dataset, or an image without its mask.
        ValueError: no images in it, classes without names, or images that are to be shrunk.
    """
    reading, dense = reading or ReadingArguments(), dense or DenseArguments()
    cells = _load_pairs(name, split, "mask", reading, dense)
    names, first_label = CLASSES, dense.first_label or 0
    if name != "digit_scenes":
        # ADE20k's table of classes lies beside its images, and its label 0 is no class
        tables = [real_folder(name) / table for table in _TABLES]
        source = dense.class_names or next((table for table in tables if table.is_file()), None)
        names = read_class_names(source, of=name)
        if dense.first_label is None and source in tables:
            first_label = 1
    if len(names) > IGNORED:
        raise ValueError(f"{name}: masks of at most {IGNORED} classes; got {len(names)}.")
    labels = {"first_label": first_label, "ignore_label": dense.ignore_label}
    read = partial(read_mask, num_classes=len(names), **labels)
    return LabelledImages(name, cells, read, names, first_label=first_label)


def load_depth(
    name: str,
    split: str,
    reading: ReadingArguments | None = None,
    dense: DenseArguments | None = None,
) -> LabelledImages:
    """Return images and their depth maps; arguments and errors as `load_segmentation`.

    Args:
        name: `"digit_scenes"`; NYUv2's folder `nyu_data`, with `data/nyu2_{train,test}.csv`, whose
            lines are `rgb path,depth path` below that folder (the training images have depth of 8
            bits, those of other splits of 16); a folder with images/<split> and depths/<split>; or
            a dataset of the Hub with a column of depth maps.
        split, reading: as there.
        dense: column of depth maps, and their unit, which all but the first two need.

    Raises:
        ValueError: also for a line without two paths, a path out of the folder, or no unit.
    """
    reading, dense = reading or ReadingArguments(), dense or DenseArguments()
    cells = _load_pairs(name, split, "depth", reading, dense)
    # the metres in one unit of the numbers
    bits, unit_m = None, dense.depth_unit_m
    if name == "digit_scenes":
        bits, unit_m = 16, 1 / 1000
    elif _is_nyuv2(name):
        bits = 8 if split == "train" else 16
        unit_m = unit_m or _NYU_UNITS[bits]
    if unit_m is None:
        raise ValueError(
            f"{name}: the numbers in depth images have no unit of their own. Give --depth_unit_m, "
            "the metres in one of them: 0.001 where they are millimetres, 1 where they are metres."
        )
    return LabelledImages(name, cells, partial(read_depth, unit_m=unit_m, bits=bits))


def _load_pairs(
    name: str, split: str, column: str, reading: ReadingArguments, dense: DenseArguments
) -> datasets.Dataset:
    """Return undecoded images and their targets, `column` (mask or depth)."""
    if name == "digit_scenes":
        return undecoded(digit_scenes(split).select_columns(["image", column]))
    if not is_folder(name):
        return _hub_pairs(name, split, column, reading, dense)

    # a folder: pairs of files
    root = real_folder(name)
    if column == "depth" and _is_nyuv2(name):
        pairs = _nyu_pairs(root, split)
    else:
        pairs = _pairs_by_name(root, split, {"mask": "annotations", "depth": "depths"}[column])
    if not pairs:
        raise ValueError(f"{root} has no images in the split {split!r}.")
    missing = [file for file in chain(*pairs) if not os.path.isfile(file)]
    if missing and not reading.skip_corrupt:
        raise FileNotFoundError(
            f"{len(missing)} files of {root} ({split}) are missing: {', '.join(missing[:3])}."
        )
    images, targets = map(list, zip(*pairs, strict=True))
    return undecoded(dataset_of_files({"image": images, column: targets}))


def _is_nyuv2(name: str) -> bool:
    """Return whether a dataset of depth maps is a folder in NYUv2's layout."""
    return is_folder(name) and not (real_folder(name) / "depths").is_dir()


def _pairs_by_name(root: Path, split: str, kind: str) -> list[tuple[str, str]]:
    """Return the images of `images/<split>` and the files of their names in `<kind>/<split>`."""
    images, *_ = list_folder(root / "images", split)
    targets, *_ = list_folder(root / kind, split)
    names = {os.path.splitext(file)[0]: file for file in targets}
    if len(names) < len(targets):
        raise ValueError(f"{root / kind / split} has files that differ in their endings alone.")
    pairs = []
    for file in images:
        stem = os.path.splitext(file)[0]
        target = names.get(stem, f"{stem}.png")
        pairs.append((str(root / "images" / split / file), str(root / kind / split / target)))
    return pairs


def _nyu_pairs(root: Path, split: str) -> list[tuple[str, str]]:
    """Return the pairs of NYUv2's list of a split; errors as `load_depth`."""
    table = root / "data" / f"nyu2_{split}.csv"
    if not table.is_file():
        raise FileNotFoundError(
            f"{table}: no such file. Expected NYUv2's folder nyu_data with data/nyu2_train.csv and "
            f"data/nyu2_test.csv, or a folder with images/{split} and depths/{split}."
        )
    pairs = []
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark first
        for number, line in enumerate(csv.reader(file), start=1):
            # a list from elsewhere must not read other files of this machine
            paths = [os.path.normpath(path) for path in line]
            outside = any(os.path.isabs(path) or path.startswith("..") for path in paths)
            if outside or len(paths) not in (0, 2):
                raise ValueError(
                    f"{table}, line {number}: expected `rgb path,depth path` in {root}; got {line}."
                )
            if paths:
                pairs.append((str(root / paths[0]), str(root / paths[1])))
    return pairs


def _hub_pairs(
    name: str, split: str, column: str, reading: ReadingArguments, dense: DenseArguments
) -> datasets.Dataset:
    """Return the images of a dataset of the Hub, and their masks or depth in `column`."""
    # the column of targets: the one that is named, or the only other column of images
    dataset = load_columns(name, split, reading)
    others = [other for other in image_columns(dataset) if other != reading.image_column]
    target = dense.target_column
    if target is None and len(others) == 1:  # nothing else can be meant
        target = others[0]
    if reading.image_column not in image_columns(dataset) or target not in others:
        columns = ", ".join(image_columns(dataset)) or "none"
        raise ValueError(
            f"{name} ({split}) has the columns of images {columns}: which holds the images, and "
            f"which their {column}? Give --image_column and --target_column."
        )
    # both under the names that they have everywhere
    pairs = dataset.select_columns([reading.image_column, target])
    pairs = pairs.rename_columns({reading.image_column: "image", target: column})
    return undecoded(pairs)
