"""Lazily decoded images with targets: a class, a mask or a depth map."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import datasets
import numpy as np

from ..data.arguments import ReadingArguments
from ..data.decoding import open_image, undecoded
from ..data.loading import list_images, load_images, read_labels
from ..runs.files import Fingerprint
from .arguments import DenseArguments


@dataclass
class LabelledImages:
    """Lazily decoded images with targets.

    Args:
        name: of the dataset, as in `load_images`.
        cells: a dataset of two columns, the undecoded `image` and its target.
        read_target: (cell, its name in errors) to a class, or to classes or metres (H, W).
        class_names: None where the target is no class.
        first_label: number of the first class in the files of masks.
    """

    name: str
    cells: datasets.Dataset
    read_target: Callable[[object, str], int | np.ndarray]
    class_names: list[str] | None = None
    first_label: int = 0

    @cached_property
    def files(self) -> Fingerprint:
        """Which images and targets these are."""
        return list_images(self.name, self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    def read(self, row: int) -> tuple[np.ndarray, int | np.ndarray]:
        """Return the bytes (H, W, 3) of an image, and its target.

        Raises:
            ValueError: a file that is missing or can't be decoded, a target that is no class or has
                another bit depth, or a target of another size than its image.
        """
        cells, name = self.cells[row], f"image {row}"
        cell = cells.pop("image")
        # decode both
        pixels = np.asarray(open_image(cell, name=name, rgb=True))
        [(kind, target)] = cells.items()
        target = self.read_target(target, f"{kind} {row}")
        if isinstance(target, np.ndarray) and target.shape != pixels.shape[:2]:
            sizes = ["×".join(map(str, shape)) for shape in (pixels.shape[:2], target.shape)]
            raise ValueError(
                f"{cell['path'] or name}: image and target must have the same size; got "
                f"{sizes[0]} and {sizes[1]}."
            )
        return pixels, target

    def target(self, row: int) -> int | np.ndarray:
        """Return the target of a row alone."""
        name = self.cells.column_names[1]
        return self.read_target(self.cells[row][name], f"{name} {row}")


def load_classification(
    name: str,
    split: str,
    reading: ReadingArguments | None = None,
    dense: DenseArguments | None = None,
) -> LabelledImages:
    """Return images and their classes; names and errors as `load_images`.

    Raises:
        ValueError: also for images without labels, or with labels that are no classes.
    """
    dataset = load_images(name, split, reading)
    # classes
    labels, names = read_labels(dataset)
    if not (labels >= 0).any():
        label = dataset.features.get("label", "none")
        raise ValueError(
            f"{name} ({split}) has no classes (its labels: {label}): expected folders of classes, "
            "or a column of classes (ClassLabel, words or numbers); --label_column names it."
        )
    # images, decoded as they are read
    cells = undecoded(dataset.select_columns("image")).add_column("label", labels)
    read = partial(_read_label, num_classes=len(names))
    return LabelledImages(name, cells, read, names)


def _read_label(label: int, name: str, *, num_classes: int) -> int:
    """Return a class, refuse labels that are none (−1: the image has no label)."""
    if not 0 <= label < num_classes:
        raise ValueError(f"{name}: expected a class from 0 to {num_classes - 1}; got {label}.")
    return label
