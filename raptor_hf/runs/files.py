"""Small files: JSON that is written whole, digests, readable sizes."""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# a list of numbers, as json writes it over several lines; no string holds a line break
_NUMBERS = re.compile(r"\[\n\s+((?:[-+.\deE]+|null)(?:,\n\s+(?:[-+.\deE]+|null))*)\n\s+\]")


def size(num_bytes: float) -> str:
    """Return bytes in a readable unit: `5.21 MB`."""
    power = min(4, int(math.log10(max(num_bytes, 1))) // 3)
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def free_bytes(path: str | Path) -> int:
    """Return the free bytes on the disk of a path that need not exist yet."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_json(path: str | Path, content: dict) -> None:
    """Write a JSON file whole or not at all; a list of numbers takes one line."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = _NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def rounded(content, digits: int = 6):
    """Round all numbers of nested dicts and lists to so many significant digits; NaN is None."""
    if isinstance(content, dict):
        return {key: rounded(value, digits) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value, digits) for value in content]
    if isinstance(content, float):
        return float(f"{content:.{digits}g}") if math.isfinite(content) else None
    return content


def read_json(path: str | Path) -> dict:
    """Read a JSON file; a ValueError names one that is damaged."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error


def read_text(path: str | Path) -> str:
    """Read a text file; a ValueError names one that is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from error


def file_digest(path: str | Path) -> str:
    """Return SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def json_digest(content: dict) -> str:
    """Return SHA-256 of what JSON can hold; other values count as their text."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def folder_digest(path: str | Path) -> str:
    """Return SHA-256 of what a folder of ours holds: weights, manifest or result.

    Raises:
        FileNotFoundError: there is nothing of the kind in the folder.
    """
    names = ("*.safetensors", "manifest.json", "phases.json")
    files = [file for name in names for file in Path(path).glob(name)]
    if not files:
        raise FileNotFoundError(f"{path} holds no weights and no results: make them first.")
    return json_digest({file.name: file_digest(file) for file in files})


class Fingerprint(NamedTuple):
    """Which files a dataset consists of.

    Attributes:
        num_files: their number.
        digest: SHA-256 of paths, sizes and times: equal where nothing was touched.
        content_digest: SHA-256 of paths and sizes: equal for copies, on any machine.
    """

    num_files: int
    digest: str
    content_digest: str

    def __str__(self) -> str:
        return f"{self.num_files:,} files ({self.digest[:16]})"


def files_fingerprint(paths: Sequence[str], root: str | Path) -> Fingerprint:
    """Fingerprint files by their paths below a folder; one that is missing has the size −1."""
    times, contents, start = hashlib.sha256(), hashlib.sha256(), len(os.path.join(root, ""))
    # a file that can't be looked at has no size
    for path in paths:
        try:
            status = os.stat(path)
            size, time = status.st_size, status.st_mtime_ns
        except OSError:
            size, time = -1, 0
        name = os.fsencode(path[start:])
        contents.update(b"%d\t%s\0" % (size, name))
        times.update(b"%d\t%d\t%s\0" % (size, time, name))
    return Fingerprint(len(paths), times.hexdigest(), contents.hexdigest())


def public_name(name_or_path: str) -> str:
    """Return a Hub id unchanged and shorten a local path to its last part, for cards."""
    is_path = name_or_path.count("/") > 1 or name_or_path.startswith((".", "~", "/"))
    if is_path or (name_or_path and Path(name_or_path).exists()):
        return Path(name_or_path).resolve().name
    return name_or_path
