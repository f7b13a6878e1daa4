"""The files that a run reads, as a part of what the run is: paths, sizes and times."""

import gzip
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


class FileList:
    """Files by their paths, or data of another kind by a fingerprint.

    Args:
        lines: `size<tab>time in nanoseconds<tab>path`, one a file, in the order in which they are
            read.
        fingerprint: of data that are no files.
    """

    def __init__(self, lines: list[str] | None = None, *, fingerprint: str = ""):
        self.lines, self.fingerprint = lines, fingerprint

    @classmethod
    def of_files(cls, paths: Iterable[str], root: str | Path) -> "FileList":
        """List files, with paths below a folder; one that is missing has the size −1."""
        lines, start = [], len(os.path.join(root, ""))
        for path in paths:
            try:
                status = os.stat(path)
                facts = f"{status.st_size}\t{status.st_mtime_ns}"
            except OSError:
                facts = "-1\t0"
            name = path[start:].replace("\n", "\\n")  # a file may be called so
            lines.append(f"{facts}\t{name}")
        return cls(lines)

    @property
    def digest(self) -> str:
        """SHA-256 of paths, sizes and times: equal where nothing was touched."""
        return self.fingerprint or _digest(self.lines)

    @property
    def content_digest(self) -> str:
        """SHA-256 of paths and sizes: equal for copies of the same files, on any machine."""
        return self.fingerprint or _digest(_without_time(line) for line in self.lines)

    def save(self, path: str | Path) -> None:
        """Write the list, compressed, whole or not at all."""
        temporary = Path(path).with_suffix(".tmp")
        with gzip.GzipFile(temporary, "wb", compresslevel=1, mtime=0) as file:
            file.write("\n".join(self.lines).encode("utf-8", "surrogateescape"))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "FileList":
        """Read what `save` wrote."""
        with gzip.open(path) as file:
            return cls(file.read().decode("utf-8", "surrogateescape").split("\n"))

    def first_difference(self, before: "FileList") -> str:
        """Say which file is the first that differs from an earlier list, and how."""
        old, new = ({path: facts for facts, path in map(_parts, f.lines)} for f in (before, self))
        for path in sorted(old.keys() | new.keys()):
            if old.get(path) != new.get(path):
                how = "is gone" if path not in new else "is new" if path not in old else "changed"
                return f"{path} {how} ({len(old):,} files before, {len(new):,} now)"
        return "the same files in another order"


def _parts(line: str) -> tuple[str, str]:
    """Return the facts of a line, and its path."""
    size, time, path = line.split("\t", 2)
    return f"{size} {time}", path


def _without_time(line: str) -> str:
    """Return a line without the time."""
    size, _, path = line.split("\t", 2)
    return f"{size}\t{path}"


def _digest(lines: Iterable[str]) -> str:
    """Return SHA-256 of lines."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
