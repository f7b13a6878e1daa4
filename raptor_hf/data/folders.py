"""Image folders, `<folder>/<split>/<class>/<image>`: which files of them are read, and as what.

A class is a folder directly below the split. Links are followed, names are taken literally. Hidden
files and what operating systems leave behind are left out, and so are texts. Anything else that
does not fit is an error with the path of the first such file.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

_LEFT_BEHIND = {"__MACOSX", "Thumbs.db", "desktop.ini"}
_TEXTS = {".csv", ".html", ".json", ".jsonl", ".log", ".md", ".tsv", ".txt", ".xml", ".yaml"}
# Pillow knows these by their names alone, or starts another program for them
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class ImageFolder(NamedTuple):
    """The images of a split, in the order of their paths."""

    root: Path  # of the split
    files: list[str]  # paths below it
    labels: list[int] | None  # None: no classes, the images lie in the split itself
    class_names: list[str] | None
    texts: list[str]  # files beside them that are left out


@functools.cache
def image_endings() -> frozenset[str]:
    """Return the endings of all image files that Pillow decodes, in lower case."""
    Image.init()
    formats = set(Image.OPEN) - _NOT_DECODED
    return frozenset(e for e, name in Image.registered_extensions().items() if name in formats)


def is_image(name: str | os.PathLike) -> bool:
    """Return whether a file has the ending of an image, in capitals or not."""
    return os.path.splitext(name)[1].lower() in image_endings()


def is_text(name: str | os.PathLike) -> bool:
    """Return whether a file has the ending of a text, which is left out where images are read."""
    return os.path.splitext(name)[1].lower() in _TEXTS


def visible(folder: str | Path) -> Iterator[os.DirEntry]:
    """Yield what lies in a folder, without what is hidden or was left behind by a system."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.name not in _LEFT_BEHIND:
                yield entry


def list_folder(folder: str | Path, split: str) -> ImageFolder:
    """Find the images of a split of a folder.

    Args:
        folder: taken literally: `photos[1]` is no pattern.
        split: the folder in it; `.` where the folder itself holds the classes.

    Raises:
        FileNotFoundError: no such split; those that there are are named.
        ValueError: no images, or a file or folder that does not fit.
    """
    root = Path(folder) / split
    if not root.is_dir():
        splits = sorted(entry.name for entry in visible(folder) if entry.is_dir())
        raise FileNotFoundError(
            f"{folder} has no split {split!r}: expected {root}/<class>/<image>. The folders in it "
            f"are: {', '.join(splits) or 'none'}. Images that lie in {folder} itself, or in "
            "folders of classes there, are the split '.'."
        )
    files, classes, texts = [], [], []
    for entry in visible(root):
        if entry.is_dir():
            classes.append(entry.name)
        else:
            _sort_in(entry.name, files, texts, root)
    if files and classes:
        raise ValueError(
            f"{root / min(files)} lies beside folders of classes ({min(classes)}, …): expected "
            f"{root}/<class>/<image>. Move it into one of them, or away."
        )
    for name in classes:
        _check_link(root / name)
        for entry in visible(root / name):
            path = f"{name}/{entry.name}"
            if entry.is_dir():
                _check_link(root / path)
                _refuse_contents(root, root / path)
            else:
                _sort_in(path, files, texts, root)
    if not files:
        raise ValueError(
            f"{root} holds no images: the split is empty. Expected {root}/<class>/<image>, with "
            f"endings like {', '.join(sorted(image_endings())[:5])}."
        )
    files.sort()
    classes.sort()
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers[file.partition("/")[0]] for file in files] if classes else None
    return ImageFolder(root, files, labels, classes or None, sorted(texts))


def _sort_in(path: str, files: list[str], texts: list[str], root: Path) -> None:
    """Add a file to the images or to the texts, or refuse it."""
    if is_image(path):
        files.append(path)
    elif is_text(path):
        texts.append(path)
    else:
        raise ValueError(
            f"{root / path} is no image that can be read: expected {root}/<class>/<image>, with "
            f"endings like {', '.join(sorted(image_endings())[:5])}. Unpack or convert it, or move "
            "it away."
        )


def _check_link(folder: Path) -> None:
    """Refuse a link that leads back to a folder that holds it."""
    if folder.parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder} is a link to a folder that holds it: {folder.resolve()}.")


def _refuse_contents(root: Path, folder: Path) -> None:
    """Refuse a folder that lies too deep, unless there is nothing in it."""
    for path, _, names in os.walk(folder):
        files = sorted(name for name in names if not name.startswith("."))
        if files:
            raise ValueError(
                f"{Path(path) / files[0]} lies too deep: expected {root}/<class>/<image>. Move it "
                f"to {folder.parent}, or away."
            )
