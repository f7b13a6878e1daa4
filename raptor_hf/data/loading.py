"""Image datasets by their names: embedded digits, folders, the Hub."""

import itertools
import logging
import os
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..runs.file_list import FileList
from .arguments import ReadingArguments
from .cache import cached_images
from .decoding import undecoded
from .folders import list_folder

logger = logging.getLogger(__name__)

EMBEDDED = ("digits", "digit_scenes")  # the second is a dataset of dense tasks: `tasks`


def load_images(name: str, split: str, reading: ReadingArguments | None = None) -> datasets.Dataset:
    """Load an image dataset with the column `image` and, where there are labels, `label`.

    Args:
        name: `"digits"` (embedded), a folder `<name>/<split>/<class>/<image>`, or a Hub dataset id.
            The images of a folder without classes lie in the split itself.
        split: `"train"`, `"test"`, or what the dataset calls its splits.
        reading: configuration and columns of a Hub dataset; a cache of decoded images.

    Raises:
        FileNotFoundError: no such folder, split or Hub dataset.
        ValueError: a folder with something in it that does not fit (see `list_folder`), or a Hub
            dataset without this configuration, split or column; those that there are are listed.
    """
    if name == "digits":
        warn_of_folder(name)
        return load_digits(split)
    reading = reading or ReadingArguments()
    dataset = (_load_folder if is_folder(name) else _load_from_hub)(name, split, reading)
    if reading.image_cache is None:
        return dataset
    return cached_images(dataset, name, list_images(name, dataset).digest, reading)


def _load_folder(name: str, split: str, _reading: ReadingArguments) -> datasets.Dataset:
    """Load the images of a folder; errors as `load_images`."""
    found = list_folder(Path(name).expanduser(), split)
    if found.texts:
        logger.warning(
            "%s: %d files that are no images are left out (%s)",
            found.root, len(found.texts), found.root / found.texts[0],
        )  # fmt: skip
    files = [os.path.join(found.root, file) for file in found.files]
    return dataset_of_files({"image": files}, labels=found.labels, class_names=found.class_names)


def warn_of_folder(name: str) -> None:
    """Say it where the name of an embedded dataset is that of a folder too."""
    if Path(name).is_dir():
        logger.warning("%s is the embedded dataset; ./%s is the folder of this name.", name, name)


def is_folder(name: str) -> bool:
    """Return whether a dataset is a folder, and not one of the Hub.

    Raises:
        FileNotFoundError: a path that is no folder, and can't be a name on the Hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return True
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        what = "a file, not a folder" if path.exists() else "no such folder"
        raise FileNotFoundError(
            f"{name}: {what}. Expected a folder {name}/<split>/<class>/<image>."
        )
    return False


def dataset_of_files(
    columns: dict[str, list[str]],
    *,
    labels: list[int] | None = None,
    class_names: list[str] | None = None,
) -> datasets.Dataset:
    """Return columns of image files, each opened when its row is read, and labels if there are."""
    features = {name: datasets.Image() for name in columns}
    arrays = []
    for paths in columns.values():
        cells = [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())]
        arrays.append(pa.StructArray.from_arrays(cells, ["bytes", "path"]))
    if labels is not None:
        features["label"] = datasets.ClassLabel(names=class_names)
        arrays.append(pa.array(labels, pa.int64()))
    table = pa.table(arrays, names=list(features))
    info = datasets.DatasetInfo(features=datasets.Features(features))
    # `list_images` says which files these are; a fingerprint of all paths takes seconds
    fingerprint = datasets.fingerprint.generate_random_fingerprint()
    return datasets.Dataset(table, info=info, fingerprint=fingerprint)


def load_columns(name: str, split: str, reading: ReadingArguments) -> datasets.Dataset:
    """Load a dataset of the Hub with all its columns; errors as `load_images`."""
    try:
        dataset = datasets.load_dataset(name, reading.dataset_config, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder, and no such dataset on the Hub that can be read ({error})."
        ) from error
    except ValueError as error:  # lists the configurations or splits that there are
        raise ValueError(f"{name} ({split}): {error} (--dataset_config, --split)") from error
    return dataset


def _load_from_hub(name: str, split: str, reading: ReadingArguments) -> datasets.Dataset:
    """Load images and labels of a dataset of the Hub; errors as `load_images`."""
    dataset = load_columns(name, split, reading)
    kinds = ", ".join(f"{c} ({type(f).__name__})" for c, f in dataset.features.items())
    has = f"{name} ({split}) has the columns {kinds}"
    wanted = {"image": reading.image_column}
    if not isinstance(dataset.features.get(reading.image_column), datasets.Image):
        raise ValueError(f"{has}, and no images in {reading.image_column!r}: give --image_column.")
    if reading.label_column in dataset.features:
        wanted["label"] = reading.label_column
    elif reading.label_column != ReadingArguments.label_column:
        raise ValueError(f"{has}, and no {reading.label_column!r}: give --label_column.")
    dataset = dataset.select_columns(list(wanted.values()))
    return dataset.rename_columns({old: new for new, old in wanted.items() if old != new})


class Classes(NamedTuple):
    """The classes of a dataset: what they are called, if anything, and how many there are."""

    names: list[str] | None
    number: int  # 0: no labels

    @classmethod
    def of(cls, names: list[str] | None, labels) -> "Classes":
        """Return the classes of labels (n,), which may lack some of them."""
        return cls(names, len(names) if names else int(labels.max()) + 1)


def read_labels(dataset: datasets.Dataset) -> tuple[np.ndarray, list[str] | None]:
    """Return the label of every image (n,), −1 where it has none, and the names of the classes.

    Words become classes in the order of the alphabet; numbers have no names.
    """
    kind = dataset.features.get("label")
    names, nothing = getattr(kind, "names", None), np.full(len(dataset), -1)
    if kind is None:
        return nothing, None
    labels = dataset.select_columns("label").with_format("arrow")[:]["label"]
    if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):
        words = labels.to_pylist()
        names = sorted(set(words) - {None})
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers.get(word, -1) for word in words]), names
    if not pa.types.is_integer(labels.type):  # scores, boxes, …
        return nothing, None
    return pc.fill_null(labels.cast(pa.int64()), -1).to_numpy(), names


def list_images(name: str, dataset: datasets.Dataset) -> FileList:
    """Return which images a dataset holds, as a part of what a run is.

    Args:
        name: what the dataset was loaded by.
        dataset: its cells are files where it is a folder; else it has a fingerprint.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() or name in EMBEDDED:
        return FileList(fingerprint=dataset._fingerprint)
    images = [c for c, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    table = undecoded(dataset).with_format("arrow")[:]
    paths = [pc.struct_field(table[column], "path").to_pylist() for column in images]
    return FileList.of_files(itertools.chain(*paths), folder)


def load_digits(split: str) -> datasets.Dataset:
    """Load scikit-learn's 1,797 handwritten digits (8×8 pixels): 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=labels, random_state=0
    )
    rows = {"train": train, "test": test}
    if split not in rows:
        raise ValueError(f"The digits have the splits 'train' and 'test'; got {split!r}.")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    )
    columns = {"image": list(images[rows[split]]), "label": labels[rows[split]].tolist()}
    return datasets.Dataset.from_dict(columns, features=features)
