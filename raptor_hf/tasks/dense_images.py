"""Images with a target at every pixel, masks or depth maps, from folders and from the Hub.

A folder has pairs of files of one name: `images/<split>` beside `annotations/<split>` or
`depths/<split>`. ADE20k is such a folder. NYUv2 is one with lists of pairs.
"""

import csv
import os
from functools import partial
from pathlib import Path

import datasets

from ..data.arguments import ReadingArguments
from ..data.decoding import undecoded
from ..data.folders import is_image, is_text, visible
from ..data.loading import dataset_of_files, is_folder, load_columns, real_folder
from .arguments import DenseArguments
from .digit_scenes import CLASSES, digit_scenes
from .labelled_images import LabelledImages
from .targets import IGNORED, read_class_names, read_depth, read_mask

_TABLES = ("objectInfo150.txt", "objectInfo.txt")  # of ADE20k and of datasets in its layout
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
            ADE20k, or a split of the dataset by its own name.
        reading: with `skip_corrupt` missing files are refused when they are read.
        dense: column of masks, names of the classes, numbers of the labels.

    Raises:
        FileNotFoundError: no such folder or dataset, or an image without its mask.
        ValueError: no images in it, classes without names, or images that are to be shrunk.
    """
    reading, dense = reading or ReadingArguments(), dense or DenseArguments()
    cells = _load_pairs(name, split, "mask", reading, dense)
    if name == "digit_scenes":
        names, first_label = CLASSES, 0
    else:
        # ADE20k's table of classes lies beside its images, and its label 0 is no class
        tables = [real_folder(name) / table for table in _TABLES]
        table = next((table for table in tables if table.is_file()), None)
        names = read_class_names(dense.class_names or table, of=name)
        first_label = dense.first_label
        if first_label is None:
            first_label = 1 if table and not dense.class_names else 0
    if len(names) > IGNORED:
        raise ValueError(f"{name}: masks of at most {IGNORED} classes; got {len(names)}.")
    read = partial(
        read_mask,
        num_classes=len(names),
        first_label=first_label,
        ignore_label=dense.ignore_label,
    )
    return LabelledImages(name, cells, read, names, reading, first_label)


def load_depth(
    name: str,
    split: str,
    reading: ReadingArguments | None = None,
    dense: DenseArguments | None = None,
) -> LabelledImages:
    """Return images and their depth maps.

    Args:
        name: `"digit_scenes"` (embedded); NYUv2's folder `nyu_data`, with
            `data/nyu2_{train,test}.csv`, whose lines are `rgb path,depth path` below that folder
            (the training images have depth of 8 bits, those of other splits of 16); a folder with
            images/<split> and depths/<split>; or a dataset of the Hub with a column of depth maps.
        split: `"train"`, `"test"`, or a split of the dataset by its own name.
        reading: with `skip_corrupt` missing files are refused when they are read.
        dense: column of depth maps, and their unit, which all but the first two need.

    Raises:
        FileNotFoundError: no such folder, dataset or list, or a missing file.
        ValueError: an empty list, a line without two paths, a path out of the folder, or no unit.
    """
    reading, dense = reading or ReadingArguments(), dense or DenseArguments()
    cells = _load_pairs(name, split, "depth", reading, dense)
    bits, unit_m = None, dense.depth_unit_m
    if name == "digit_scenes":
        bits, unit_m = 16, _MILLIMETRES
    elif _is_nyuv2(name):
        bits = 8 if split == "train" else 16
        unit_m = unit_m or _NYU_UNITS[bits]
    if unit_m is None:
        raise ValueError(
            f"{name}: the numbers in depth images have no unit of their own. Give --depth_unit_m, "
            "the metres in one of them: 0.001 where they are millimetres, 1 where they are metres."
        )
    read = partial(read_depth, unit_m=unit_m, bits=bits)
    return LabelledImages(name, cells, read, reading=reading)


def _load_pairs(
    name: str, split: str, column: str, reading: ReadingArguments, dense: DenseArguments
) -> datasets.Dataset:
    """Return undecoded images and their targets, `column` (mask or depth)."""
    if reading.shorter_side or reading.image_cache:
        raise ValueError(
            "--shorter_side and --image_cache are for images without masks or depth maps: leave "
            "them out. --resolution resizes images and targets alike."
        )
    if name == "digit_scenes":
        return undecoded(digit_scenes(split).select_columns(["image", column]))
    if not is_folder(name):
        return _hub_pairs(name, split, column, reading, dense)
    root, missing_ok = real_folder(name), reading.skip_corrupt > 0
    if column == "depth" and _is_nyuv2(name):
        return _nyu_pairs(root, split, missing_ok)
    return _folder_of_pairs(root, split, column, missing_ok)


def _is_nyuv2(name: str) -> bool:
    """Return whether a dataset of depth maps is a folder in NYUv2's layout."""
    return is_folder(name) and not (real_folder(name) / "depths").is_dir()


def _folder_of_pairs(root: Path, split: str, column: str, missing_ok: bool) -> datasets.Dataset:
    """Return the pairs of files of one name in `images/<split>` and `<targets>/<split>`."""
    kind = {"mask": "annotations", "depth": "depths"}[column]
    folders = {"image": root / "images" / split, column: root / kind / split}
    for folder in folders.values():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder. Expected images and their {column}s with equal names "
                f"in {root}/images/<split> and {root}/{kind}/<split>."
            )
    # the target of an image has its name, but for the ending
    images, targets = _images_by_stem(folders["image"]), _images_by_stem(folders[column])
    columns: dict[str, list[Path]] = {"image": [], column: []}
    for stem, image in images.items():
        columns["image"].append(image)
        columns[column].append(targets.get(stem, folders[column] / f"{stem}.png"))
    return _paired_files(columns, folders["image"], missing_ok)


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


def _nyu_pairs(root: Path, split: str, missing_ok: bool) -> datasets.Dataset:
    """Return the pairs of NYUv2's list of a split; errors as `load_depth`."""
    table = root / "data" / f"nyu2_{split}.csv"
    if not table.is_file():
        raise FileNotFoundError(
            f"{table}: no such file. Expected NYUv2's folder nyu_data with data/nyu2_train.csv and "
            f"data/nyu2_test.csv, or a folder with images/{split} and depths/{split}."
        )
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark first
        lines = [line for line in csv.reader(file) if line]
    columns: dict[str, list[Path]] = {"image": [], "depth": []}
    for number, line in enumerate(lines, start=1):
        if len(line) != 2:
            raise ValueError(f"{table}, line {number}: expected `rgb path,depth path`; got {line}.")
        for name, path in zip(columns, line, strict=True):
            # a list from elsewhere must not read other files of this machine
            if os.path.isabs(path) or os.path.normpath(path).startswith(".."):
                raise ValueError(f"{table}, line {number}: a path leaves {root}; got {line}.")
            columns[name].append(root / path)
    return _paired_files(columns, table, missing_ok)


def _paired_files(
    columns: dict[str, list[Path]], where: Path, missing_ok: bool
) -> datasets.Dataset:
    """Return the files as a dataset of undecoded images; errors as in the loaders."""
    if not columns["image"]:
        raise ValueError(f"{where} holds no images: the split is empty.")
    missing = []
    for files in columns.values():
        missing += [str(file) for file in files if not file.is_file()]
    if missing and not missing_ok:
        raise FileNotFoundError(
            f"{len(missing)} of the files that belong to {where} are missing: "
            f"{', '.join(missing[:3])}{' …' * (len(missing) > 3)}"
        )
    paths = {name: [str(file) for file in files] for name, files in columns.items()}
    return undecoded(dataset_of_files(paths))


def _hub_pairs(
    name: str, split: str, column: str, reading: ReadingArguments, dense: DenseArguments
) -> datasets.Dataset:
    """Return the images of a dataset of the Hub, and their masks or depth in `column`."""
    dataset = load_columns(name, split, reading)
    columns = [c for c, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    others = [c for c in columns if c != reading.image_column]
    target = dense.target_column
    if target is None and len(others) == 1:  # nothing else can be meant
        target = others[0]
    if reading.image_column not in columns or target not in others:
        raise ValueError(
            f"{name} ({split}) has the columns of images {', '.join(columns) or 'none'}: which "
            f"holds the images, and which their {column}? Give --image_column and --target_column."
        )
    pairs = dataset.select_columns([reading.image_column, target])
    renamed = {reading.image_column: "image", target: column}
    pairs = pairs.rename_columns({old: new for old, new in renamed.items() if old != new})
    return undecoded(pairs)
