"""List the images of a folder, `<folder>/<split>/<class>/<image>`.

A class is a folder directly below the split. Links are followed, names are taken literally. Hidden
files and leftovers of operating systems are ignored, texts too. Anything else that does not fit is
an error that names the first such file.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

_LEFTOVERS = {"__MACOSX", "Thumbs.db", "desktop.ini"}
_TEXTS = {".csv", ".html", ".json", ".jsonl", ".log", ".md", ".tsv", ".txt", ".xml", ".yaml"}
# Pillow recognises these by their names alone, or starts another program for them
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@functools.cache
def image_endings() -> frozenset[str]:
    """Return the endings of all image files that Pillow decodes, in lower case."""
    Image.init()
    formats = set(Image.OPEN) - _NOT_DECODED
    return frozenset(e for e, name in Image.registered_extensions().items() if name in formats)


def visible(folder: str | Path) -> Iterator[os.DirEntry]:
    """Yield the contents of a folder without hidden files and leftovers of a system."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.name not in _LEFTOVERS:
                yield entry


def list_folder(
    folder: str | Path, split: str
) -> tuple[list[str], list[int] | None, list[str] | None]:
    """Return the images of a split of a folder, in the order of their paths.

    Args:
        folder: taken literally: `photos[1]` is no pattern.
        split: the folder in it; `.` where the folder itself holds the classes.

    Returns:
        Paths below the split, and labels and names of classes: None where the images lie in the
        split itself.

    Raises:
        FileNotFoundError: no such split; the error lists the splits that there are.
        ValueError: no images, or a file or folder that does not fit.
    """
    root = Path(folder) / split
    if not root.is_dir():
        splits = sorted(entry.name for entry in visible(folder) if entry.is_dir())
        raise FileNotFoundError(
            f"{folder} has no split {split!r}. Its folders are: {', '.join(splits) or 'none'}. "
            "The folder itself is the split '.'."
        )

    # the folder itself: images, or folders of classes
    files, classes = _contents(root, "")
    classes.sort()
    if files and classes:
        raise ValueError(
            f"{root / min(files)} lies beside folders of classes ({classes[0]}, …): expected "
            f"{root}/<class>/<image>. Move it into one of them, or away."
        )

    # the images of the classes
    for name in classes:
        images, folders = _contents(root, name)
        files += images
        if folders:
            raise ValueError(
                f"{root / min(folders)} lies too deep: expected {root}/<class>/<image>."
            )
    if not files:
        raise ValueError(f"{root} holds no images: expected {root}/<class>/<image>.")
    files.sort()
    if not classes:
        return files, None, None
    numbers = {name: number for number, name in enumerate(classes)}
    return files, [numbers[file.partition("/")[0]] for file in files], classes


def _contents(root: Path, folder: str) -> tuple[list[str], list[str]]:
    """Return the images and the folders in a folder, as paths below the root."""
    files, folders = [], []
    for entry in visible(root / folder):
        path = os.path.join(folder, entry.name)
        ending = os.path.splitext(path)[1].lower()
        if entry.is_dir():
            folders.append(path)
        elif ending in image_endings():
            files.append(path)
        elif ending not in _TEXTS:
            raise ValueError(f"{root / path} is no image: unpack or convert it, or move it away.")
    return files, folders
