"""Load image datasets by name: embedded digits, folders, the Hub."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub.errors import HFValidationError

from ..runs.files import Fingerprint, files_fingerprint
from ..runs.processes import process_state
from .arguments import ReadingArguments
from .decoding import image_columns, open_image, to_ppm, undecoded
from .folders import list_folder

EMBEDDED = ("digits", "digit_scenes")  # the second is a dataset of dense tasks: `tasks`


def load_images(name: str, split: str, reading: ReadingArguments | None = None) -> datasets.Dataset:
    """Load an image dataset with the column `image` and, where there are labels, `label`.

    Args:
        name: `"digits"` (embedded), a folder `<name>/<split>/<class>/<image>`, or a Hub dataset id.
            The images of a folder without classes lie in the split itself.
        split: `"train"`, `"test"`, or a split of the dataset by its own name.
        reading: configuration and columns of a Hub dataset; a cache of decoded images.

    Raises:
        FileNotFoundError: no such folder, split or Hub dataset.
        ValueError: a folder with something in it that does not fit (see `list_folder`), or a Hub
            dataset without this configuration, split or column; the error lists those it has.
    """
    if name == "digits":
        return load_digits(split)
    reading = reading or ReadingArguments()
    folder = is_folder(name)
    dataset = _load_folder(name, split) if folder else _load_from_hub(name, split, reading)
    if reading.image_cache is None:
        return dataset
    return _cached(dataset, list_images(name, dataset).digest, reading)


def is_folder(name: str) -> bool:
    """Return whether a dataset is a folder, and not one of the Hub."""
    return Path(name).expanduser().is_dir()


def _load_folder(name: str, split: str) -> datasets.Dataset:
    """Load the images of a folder; errors as `load_images`."""
    images = list_folder(real_folder(name), split)
    files = [os.path.join(images.root, file) for file in images.files]
    return dataset_of_files({"image": files}, labels=images.labels, class_names=images.class_names)


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
    except ValueError as error:  # lists the configurations or splits that there are
        raise ValueError(f"{name} ({split}): {error} (--dataset_config, --split)") from error


def _load_from_hub(name: str, split: str, reading: ReadingArguments) -> datasets.Dataset:
    """Load images and labels of a dataset of the Hub; errors as `load_images`."""
    dataset = load_columns(name, split, reading)

    # check the columns, and list them if one is missing
    kinds = ", ".join(f"{c} ({type(f).__name__})" for c, f in dataset.features.items())
    described = f"{name} ({split}) has the columns {kinds}"
    columns = {reading.image_column: "image"}
    if not isinstance(dataset.features.get(reading.image_column), datasets.Image):
        raise ValueError(
            f"{described}, and no images in {reading.image_column!r}: give --image_column."
        )
    if reading.label_column in dataset.features:
        columns[reading.label_column] = "label"
    elif reading.label_column != ReadingArguments.label_column:
        raise ValueError(f"{described}, and no {reading.label_column!r}: give --label_column.")

    # call them by our names
    dataset = dataset.select_columns(list(columns))
    return dataset.rename_columns({old: new for old, new in columns.items() if old != new})


def _cached(
    dataset: datasets.Dataset, identity: str, reading: ReadingArguments
) -> datasets.Dataset:
    """Return the same images, decoded and shrunk, from a file of `datasets` in the image cache.

    It is written by whoever asks first, under a name of its own until it is complete; `identity`
    tells other images apart. An image that can't be read stays as it is.
    """
    files = undecoded(dataset)
    # cells hold absolute paths: images that lie elsewhere get another file
    key = f"{identity} {files[0]['image']['path']} {reading.shorter_side}"
    folder = Path(reading.image_cache).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"

    # Arrow tables go in and out, because `datasets` would drop the bytes of an image with a path.
    # Decoding runs in threads, as Pillow needs no lock of Python for it.
    with ThreadPoolExecutor() as pool, process_state().local_main_process_first():
        cached = files.with_format("arrow").map(
            lambda table: _decoded(table, pool, reading.shorter_side),
            batched=True,
            batch_size=32 if reading.shorter_side else 3,  # a column of a batch has up to 2 GiB
            features=dataset.features,
            cache_file_name=str(file),
            load_from_cache_file=True,
            new_fingerprint=dataset._fingerprint,
            desc="image cache",
        )
    cached = cached.with_format(None)
    cached._fingerprint = dataset._fingerprint  # the same images in `list_images`
    return cached


def _decoded(table: pa.Table, pool: ThreadPoolExecutor, shorter_side: int) -> pa.Table:
    """Return rows with decoded images."""

    def decode(cell: dict) -> dict:
        try:
            image = open_image(cell, name="", rgb=True, shorter_side=shorter_side)
        except ValueError:
            return cell
        return {"bytes": to_ppm(image), "path": cell["path"]}

    column = table.column_names.index("image")
    cells = pa.array(list(pool.map(decode, table["image"].to_pylist())), table["image"].type)
    return table.set_column(column, "image", cells)


class Classes(NamedTuple):
    """The classes of a dataset: their names, if they have any, and their number."""

    names: list[str] | None
    number: int  # 0: no labels

    @classmethod
    def of(cls, names: list[str] | None, labels) -> "Classes":
        """Return the classes of labels (n,), which may lack some of them."""
        return cls(names, len(names) if names else int(labels.max()) + 1)


def read_labels(dataset: datasets.Dataset) -> tuple[np.ndarray, list[str] | None]:
    """Return the label of every image (n,), −1 where it has none, and the names of the classes.

    Words become classes in the order of the alphabet. Numbers are classes without names, unless
    most of them never occur: then they are ids, and those that occur are the names, in their order.
    """
    kind = dataset.features.get("label")
    names, nothing = getattr(kind, "names", None), np.full(len(dataset), -1)
    if kind is None:
        return nothing, None
    labels = dataset.select_columns("label").with_format("arrow")[:]["label"]

    # words
    if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):
        words = labels.to_pylist()
        names = sorted(set(words) - {None})
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers.get(word, -1) for word in words]), names
    if not pa.types.is_integer(labels.type):  # scores, boxes, …
        return nothing, None

    # numbers of classes, or ids
    labels = pc.fill_null(labels.cast(pa.int64()), -1).to_numpy()
    ids = np.unique(labels[labels >= 0])
    if names is None and len(ids) and ids[-1] >= 2 * len(ids):
        return np.where(labels < 0, -1, np.searchsorted(ids, labels)), ids.astype(str).tolist()
    return labels, names


def list_images(name: str, dataset: datasets.Dataset) -> Fingerprint:
    """Return the fingerprint of a dataset's images: of the files of a folder, or of the Hub.

    Args:
        name: of the dataset, as it was loaded.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() or name in EMBEDDED:
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
