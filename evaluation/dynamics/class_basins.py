"""Class-dependent angular basins: do the cls tokens of a class gather, layer by layer?

Needs the mean directions of all classes before any angle to them, so the directions of the cls
tokens wait in a file, not in memory, until the last image has come by.
"""

import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from raptor_hf.dynamics.measures import angles, directions

_AT_ONCE = 256  # images that are looked at
_ROUNDING = 1e-3  # degrees; a smaller angle is none: all cls tokens start out as the same one
_PER_CLASS, CLASSES = 6, 10  # trajectories that are kept for a picture


class ClassBasins:
    """Directions of cls tokens as they stream by, and what they say of their classes.

    Args:
        number: of images.
        shape: (L + 1, D) of a cls token's trajectory.
        folder: where the directions wait; nothing stays there.

    Raises:
        OSError: no room for them.
    """

    def __init__(self, number: int, shape: tuple[int, int], folder: str | Path):
        # no name in the folder: gone with the process, however that ends
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        if hasattr(os, "posix_fallocate"):  # a full disk would kill whoever writes to the map later
            os.posix_fallocate(self.file.fileno(), 0, 4 * number * math.prod(shape))
        self.directions = np.memmap(self.file, np.float32, "w+", shape=(number, *shape))
        self.labels = np.empty(number, dtype=np.int64)
        self.count = 0

    def add(self, cls: torch.Tensor, labels: torch.Tensor) -> None:
        """Add some images: (B, L + 1, D) and (B,)."""
        rows = slice(self.count, self.count + len(labels))
        self.directions[rows] = directions(cls).cpu().numpy()
        self.labels[rows] = labels.cpu().numpy()
        self.count += len(labels)

    def result(self) -> dict:
        """Return, per layer 0 … L, means (`mean`) and standard deviations (`std`) over images.

        Returns:
            `own_angle`: degrees to the mean direction of the other images of the same class;
            `other_angle`: to the nearest mean direction of another class; `silhouette`:
            (other − own) / max(other, own), from −1 to 1; `nearest_mean`: share of the images that
            are nearer to their own class than to any other. Images that are alone in their class
            have no own angle and are left out: `num_images` counts the others.
            `trajectories`: some images' paths (L + 1, 2) on the first two principal components of
            the last layer's directions, which hold `explained` of their variance; and `labels`.
        """
        classes, member = np.unique(self.labels[: self.count], return_inverse=True)
        counts = np.bincount(member)
        rows = np.flatnonzero(counts[member] > 1)
        columns: dict[str, list[np.ndarray]] = {}
        for layer in range(self.directions.shape[1]):
            units = self.directions[:, layer]
            sums = np.zeros((len(classes), units.shape[1]))
            for part in _chunked(np.arange(self.count)):
                np.add.at(sums, member[part], units[part])
            chunks = [_class_angles(units[part], sums, member[part]) for part in _chunked(rows)]
            own, other = (np.concatenate(part) for part in zip(*chunks, strict=True))
            larger = np.maximum(np.maximum(own, other), np.finfo(float).tiny)
            for name, values in {
                "own_angle": own,
                "other_angle": other,
                "silhouette": (other - own) / larger,
                "nearest_mean": own < other,
            }.items():
                columns.setdefault(name, []).append(values)
        result = {
            name: {"mean": [v.mean() for v in column], "std": [v.std() for v in column]}
            for name, column in columns.items()
        }
        return {"num_images": len(rows), "num_classes": len(classes), **result, **self.paths()}

    def paths(self) -> dict:
        """Return the picture's part of `result`."""
        last, everyone = self.directions[:, -1], np.arange(self.count)
        centre = sum(last[part].sum(axis=0, dtype=np.float64) for part in _chunked(everyone))
        centre = centre / self.count
        deviations = (last[part] - centre for part in _chunked(everyone))
        variances, components = np.linalg.eigh(sum(part.T @ part for part in deviations))
        basis = components[:, ::-1][:, :2]
        basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), [0, 1]])
        rows = np.concatenate(
            [
                np.flatnonzero(self.labels[: self.count] == label)[:_PER_CLASS]
                for label in np.unique(self.labels[: self.count])[:CLASSES]
            ]
        )
        return {
            "explained": float(variances[-2:].sum() / max(variances.sum(), np.finfo(float).tiny)),
            "trajectories": ((self.directions[rows] - centre) @ basis).tolist(),
            "labels": self.labels[rows].tolist(),
        }


def _chunked(rows: np.ndarray) -> list[np.ndarray]:
    """Return rows, a few at once."""
    return np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE))


def _class_angles(
    units: np.ndarray, sums: np.ndarray, member: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return angles in degrees to the own class without the image, and to the nearest other.

    Args:
        units: (n, D) directions.
        sums: (classes, D): the sum of every class' directions, these images among them.
        member: (n,), row of `sums` that each belongs to.
    """
    units, sums = (torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in (units, sums))
    own = angles(units, sums[member] - units)
    cosines = units @ directions(sums).T
    cosines[range(len(units)), member] = -2  # of no angle
    other = angles(units, sums[cosines.argmax(dim=1)])
    return tuple(torch.where(angle < _ROUNDING, 0, angle).numpy() for angle in (own, other))


def check_classes(labels: np.ndarray, num_classes: int) -> None:
    """Refuse images that basins can't be seen in.

    Args:
        labels: of the images that will come by.
        num_classes: of the dataset.

    Raises:
        ValueError: fewer images than classes, or fewer than two classes with two images.
    """
    pairs = (np.unique(labels, return_counts=True)[1] > 1).sum()
    if len(labels) < num_classes or pairs < 2:
        raise ValueError(
            f"Class basins need as many images as classes at least, and two classes with two "
            f"images: got {len(labels)} images of {num_classes} classes, {pairs} of them with two "
            "or more. Give more (--num_images), or leave class_basins out of --analyses."
        )
