"""Shards of a dataset that we write: files that are whole or absent.

A shard is written under a temporary name; when all of it is on the disk its checksum is written
down beside it, and then it gets its name.
"""

import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import xxhash

from .files import read_json, write_json

if TYPE_CHECKING:  # takes seconds, and most that imports this never writes
    import datasets

MANIFEST = "manifest.json"
_WAITING_BATCHES = 2  # computed ahead of the disk, at most: memory stays where it is


class Shard(NamedTuple):
    """A file of the dataset and the rows that it holds."""

    name: str
    rows: range


class ShardPart(NamedTuple):
    """Some rows of a shard: how many there are, what is written of them, images left out."""

    num_rows: int
    batch: pa.RecordBatch | None
    skipped: list[int]


def plan_shards(number: int, rows: int) -> list[Shard]:
    """Return the files of a dataset of so many rows, with so many rows each."""
    starts = range(0, number, rows)
    return [
        Shard(f"data-{i:05d}-of-{len(starts):05d}.arrow", range(s, min(s + rows, number)))
        for i, s in enumerate(starts)
    ]


def missing_shards(path: Path, shards: list[Shard]) -> list[Shard]:
    """Return the shards that are not there, or plainly not whole."""
    known = known_shards(path)
    return [shard for shard in shards if shard_problem(path / shard.name, known.get(shard.name))]


def remove_leftovers(path: Path) -> None:
    """Remove what a killed run was writing."""
    for leftover in path.glob("*.tmp"):
        leftover.unlink()


def shard_digest(path: str | Path) -> str:
    """Return the checksum of a file (XXH3, 128 bits: it finds damage at the speed of the disk)."""
    with open(path, "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return xxhash.xxh3_128(content).hexdigest()


def shard_problem(path: Path, facts: dict | None) -> str | None:
    """Return how a shard plainly differs from the manifest; None if it does not."""
    if not path.exists():
        return f"The shard {path.name} of {path.parent} is missing."
    if facts is None:
        return f"The shard {path.name} of {path.parent} is in no manifest."
    size = path.stat().st_size
    if size != facts["size_bytes"]:
        return (
            f"The shard {path.name} of {path.parent} is truncated or changed: expected "
            f"{facts['size_bytes']:,} bytes, found {size:,}."
        )
    return None


def known_shards(path: Path) -> dict[str, dict]:
    """Return the size and checksum of every shard that was ever finished, by its name."""
    manifest = path / MANIFEST
    known = read_json(manifest)["shards"] if manifest.exists() else {}
    # newer than what a manifest says: a shard that was written again
    return known | {f"{file.stem}.arrow": read_json(file) for file in path.glob("data-*.json")}


def write_shards(
    path: Path, shards: list[Shard], schema: pa.Schema, parts: Iterator[ShardPart]
) -> None:
    """Write batches to the shards that they belong to, while the next ones are computed.

    Raises:
        OSError: the disk is full, or writing fails otherwise; what is whole is kept.
    """
    waiting = deque()

    def wait(at_most: int) -> None:
        while len(waiting) > at_most:
            try:
                waiting.popleft().result()
            except OSError as error:
                whole = len(list(path.glob("data-*.arrow")))
                raise OSError(
                    error.errno,
                    f"{path} could not be written ({error.strerror or error}). {whole:,} shards "
                    "are whole and kept: make room and run the same command with --resume.",
                ) from error

    try:
        # one thread each keeps the order; a shard is put on the disk while the next is written
        with ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as publishing:
            for shard in shards:
                file = ShardFile(path / shard.name, schema)
                rows = 0
                while rows < len(shard.rows):
                    part = next(parts)
                    rows += part.num_rows
                    file.skipped.update(part.skipped)
                    if part.batch is not None:
                        file.rows += len(part.batch)
                        waiting.append(writing.submit(file.write, part.batch))
                    wait(_WAITING_BATCHES)
                waiting.append(publishing.submit(file.publish, waiting[-1] if waiting else None))
            wait(0)
    except BaseException:
        for shard in shards:  # the room of unfinished ones
            _temporary_name(path / shard.name).unlink(missing_ok=True)
        raise


def _temporary_name(shard: Path) -> Path:
    """Return what a shard is called until it is whole."""
    return shard.with_suffix(".tmp")


class ShardFile:
    """An Arrow file that gets its name when all of it is on the disk and its checksum is known.

    Attributes:
        rows: that it is to hold.
        skipped: the images that are left out of it.
    """

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self.rows, self.written = path, 0, 0
        self.skipped: set[int] = set()
        self.file = pa.OSFile(str(_temporary_name(path)), "wb")
        self.writer = pa.ipc.new_stream(self.file, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a record batch."""
        self.writer.write_batch(batch)
        self.written += len(batch)

    def publish(self, last_write: Future | None) -> None:
        """Close the file, put it on the disk, write down its checksum, give it its name.

        Args:
            last_write: of this file; it is waited for, and what it raised is raised again.

        Raises:
            RuntimeError: rows are missing, as after a write that failed: no name then.
        """
        if last_write:
            last_write.result()
        if self.written != self.rows:
            raise RuntimeError(f"{self.path} has {self.written} of {self.rows} rows.")
        self.writer.close()
        self.file.close()
        temporary = _temporary_name(self.path)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        facts = {"rows": self.rows, "size_bytes": temporary.stat().st_size}
        facts["xxh3_128"] = shard_digest(temporary)
        if self.skipped:
            facts["skipped"] = sorted(self.skipped)
        write_json(self.path.with_suffix(".json"), facts)
        os.replace(temporary, self.path)


def complete_dataset(
    path: Path, features: "datasets.Features", shards: list[Shard]
) -> dict[str, dict]:
    """Make of shards that are all there what `datasets.load_from_disk` opens.

    Returns:
        Their sizes and checksums, for `write_manifest`.
    """
    from datasets import DatasetInfo

    known = known_shards(path)
    facts = {shard.name: known[shard.name] for shard in shards}
    DatasetInfo(features=features).write_to_directory(str(path))
    state = {
        "_data_files": [{"filename": name} for name in facts],
        "_fingerprint": next(iter(facts.values()))["xxh3_128"][:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(path / "state.json", state)
    return facts


def write_manifest(path: Path, manifest: dict) -> None:
    """Write the manifest, with which a dataset is complete."""
    write_json(path / MANIFEST, manifest)
    for entry in path.glob("data-*.json"):  # it holds what they hold
        entry.unlink()
