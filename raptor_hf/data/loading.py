"""Load image datasets by name: embedded digits, folders, the Hub."""

import os
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub.errors import HFValidationError

from ..runs.files import Fingerprint, files_fingerprint
from .arguments import ReadingArguments
from .decoding import image_columns, undecoded
from .folders import list_folder

EMBEDDED = ("digits", "digit_scenes")  # the second is a dataset of dense tasks: `tasks`


def load_images(name: str, split: str, reading: ReadingArguments | None = None) -> datasets.Dataset:
    """Load an image dataset with the column `image` and, where there are labels, `label`.

    Args:
        name: `"digits"` (embedded), a folder (see `list_folder`), or a Hub dataset id.
        split: `"train"`, `"test"`, or a split of the dataset by its own name.
        reading: configuration and columns of a Hub dataset.

    Raises:
        FileNotFoundError: no such folder, split or Hub dataset.
        ValueError: a folder with something in it that does not fit, or a Hub dataset without this
            configuration, split or column; the error lists those it has.
    """
    if name == "digits":
        return load_digits(split)
    if not is_folder(name):
        return _load_from_hub(name, split, reading or ReadingArguments())
    files, labels, class_names = list_folder(real_folder(name), split)
    root = real_folder(name) / split
    paths = [os.path.join(root, file) for file in files]
    return dataset_of_files({"image": paths}, labels=labels, class_names=class_names)


def is_folder(name: str) -> bool:
    """Return whether a dataset is a folder, and not one of the Hub."""
    return Path(name).expanduser().is_dir()


def real_folder(name: str) -> Path:
    """Return the absolute path of a folder, the same however it is spelt."""
    return Path(name).expanduser().resolve()


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
        try:
            cells = [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())]
        except UnicodeEncodeError as error:
            name = os.fsencode(error.object)
            raise ValueError(f"{name!r}: names must be UTF-8. Rename this file.") from error
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
        return datasets.load_dataset(name, reading.dataset_config, split=split)
    except (FileNotFoundError, ConnectionError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder, and no such dataset on the Hub that can be read ({error})."
        ) from error


def _load_from_hub(name: str, split: str, reading: ReadingArguments) -> datasets.Dataset:
    """Load images and labels of a dataset of the Hub; errors as `load_images`."""
    dataset, columns = load_columns(name, split, reading), {reading.image_column: "image"}
    named = reading.label_column != ReadingArguments.label_column
    if named or reading.label_column in dataset.features:
        columns[reading.label_column] = "label"
    is_image = isinstance(dataset.features.get(reading.image_column), datasets.Image)
    if not is_image or not set(columns) <= set(dataset.features):
        kinds = ", ".join(f"{c} ({type(f).__name__})" for c, f in dataset.features.items())
        raise ValueError(
            f"{name} ({split}) has the columns {kinds}: give --image_column and --label_column."
        )
    dataset = dataset.select_columns(list(columns))
    return dataset.rename_columns(columns)


def read_labels(dataset: datasets.Dataset) -> tuple[np.ndarray, list[str] | None]:
    """Return the label of every image (n,), −1 where it has none, and the names of the classes.

    There are none without labels. Words become classes in the order of the alphabet. Numbers are
    classes of these names, unless most of them never occur: then they are ids, and those that occur
    are the classes, in their order.
    """
    kind = dataset.features.get("label")
    names, nothing = getattr(kind, "names", None), np.full(len(dataset), -1)
    if kind is None:
        return nothing, None
    labels = dataset.select_columns("label").with_format("arrow")[:]["label"]
    if str(labels.type).endswith("string"):
        numbers, words = pd.factorize(labels.to_pandas(), sort=True)
        return numbers, words.tolist()
    if not pa.types.is_integer(labels.type):  # scores, boxes, …
        return nothing, None

    # numbers of classes, or ids
    labels = pc.fill_null(labels.cast(pa.int64()), -1).to_numpy()
    ids = np.unique(labels[labels >= 0])
    if names is None and len(ids):
        if ids[-1] >= 2 * len(ids):
            return np.where(labels < 0, -1, np.searchsorted(ids, labels)), ids.astype(str).tolist()
        names = list(map(str, range(ids[-1] + 1)))
    return labels, names


def list_images(name: str, dataset: datasets.Dataset) -> Fingerprint:
    """Return the fingerprint of a dataset's images: of the files of a folder, or of the Hub.

    Args:
        name: of the dataset, as it was loaded.
    """
    if name in EMBEDDED or not is_folder(name):
        return Fingerprint(len(dataset), dataset._fingerprint, dataset._fingerprint)
    table = undecoded(dataset).with_format("arrow")[:]
    paths = []
    for column in image_columns(dataset):
        paths += pc.struct_field(table[column], "path").to_pylist()
    return files_fingerprint(paths, real_folder(name))


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
