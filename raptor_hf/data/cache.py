"""Decoded images on the disk: what takes long to read is read once.

An image cache is a plain `datasets` dataset of uncompressed images (PPM), in the order of those
that it was made of. It is written in shards that are whole or absent, so a killed run goes on. Its
folder is named after the images, their sizes and times, so changed images get another one.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa

from ..runs.files import public_name, read_json, size
from ..runs.processes import process_state, progress_bar
from ..runs.shards import (
    MANIFEST,
    Shard,
    ShardPart,
    complete_dataset,
    missing_shards,
    plan_shards,
    remove_leftovers,
    shard_problem,
    write_manifest,
    write_shards,
)
from .arguments import ReadingArguments
from .decoding import read_image, to_ppm, undecoded

_SHARD_ROWS = 1024
_PART_BYTES = 2**30  # of a column that Arrow numbers by 32 bits


def cached_images(
    dataset: datasets.Dataset, name: str, identity: str, reading: ReadingArguments
) -> datasets.Dataset:
    """Return the same images, decoded and shrunk, from `reading.image_cache`; they are written
    there first if they are not yet. An image that can't be read stays what it is.

    Args:
        dataset: columns `image`, and `label`, if there are labels.
        name: of the dataset, for the manifest.
        identity: digest of which images these are.

    Raises:
        OSError: the disk is too small, or full before the end; what is whole is kept.
    """
    key = f"{identity} {reading.shorter_side} {reading.max_megapixels}"
    path = Path(reading.image_cache).expanduser() / hashlib.sha256(key.encode()).hexdigest()[:16]
    state = process_state()
    state.wait_for_everyone()
    if not _is_whole(path):
        _write(path, dataset, name, reading)
        state.wait_for_everyone()
    cached = datasets.load_from_disk(str(path))
    cached._fingerprint = dataset._fingerprint  # they are the same images to those who ask
    return cached


def _is_whole(path: Path) -> bool:
    """Return whether a cache is there, with all its shards in their sizes."""
    manifest = path / MANIFEST
    shards = read_json(manifest)["shards"] if manifest.exists() else {}
    return bool(shards) and not any(shard_problem(path / s, f) for s, f in shards.items())


def _write(path: Path, dataset: datasets.Dataset, name: str, reading: ReadingArguments) -> None:
    """Write the shards that are missing, all processes together."""
    path.mkdir(parents=True, exist_ok=True)
    state, features = process_state(), dataset.features
    dataset, shards = undecoded(dataset), plan_shards(len(dataset), _SHARD_ROWS)
    missing = missing_shards(path, shards)
    if state.is_main_process:
        remove_leftovers(path)
        _check_disk(path, dataset, sum(len(shard.rows) for shard in missing), reading)
    state.wait_for_everyone()
    own = missing[state.process_index :: state.num_processes]
    write_shards(path, own, features.arrow_schema, _parts(dataset, own, reading))
    state.wait_for_everyone()
    if state.is_main_process:
        facts = complete_dataset(path, features, shards)
        manifest = {"dataset": public_name(name), "num_images": len(dataset)}
        manifest |= {"shorter_side": reading.shorter_side, "shards": facts}
        write_manifest(path, manifest)


def _check_disk(
    path: Path, dataset: datasets.Dataset, missing: int, reading: ReadingArguments
) -> None:
    """Say what the cache will take, as some of the images tell, and refuse what the disk can't
    hold.
    """
    sample = range(0, len(dataset), max(1, len(dataset) // 16))
    needed = missing * sum(len(_cell(dataset[i]["image"], reading)["bytes"] or b"") for i in sample)
    needed, free = needed / len(sample), shutil.disk_usage(path).free
    print(
        f"image cache: {missing:,} images to write, about {size(needed)}, to {path} "
        f"({size(free)} free)",
        flush=True,
    )
    if needed > 0.98 * free:
        raise OSError(
            f"The image cache takes about {size(needed)}, and {path} has {size(free)} free. Shrink "
            "the images (--shorter_side), take another disk, or leave --image_cache out."
        )


def _parts(
    dataset: datasets.Dataset, shards: list[Shard], reading: ReadingArguments
) -> Iterator[ShardPart]:
    """Yield the rows of shards, with decoded images."""
    state, schema = process_state(), dataset.features.arrow_schema
    rows = max(1, min(32, int(_PART_BYTES / (3e6 * reading.max_megapixels))))
    total, table = sum(len(shard.rows) for shard in shards), dataset.with_format("arrow")
    threads = max(1, (os.cpu_count() or 1) // state.num_processes)  # decoding runs beside Python
    with (
        ThreadPoolExecutor(threads) as pool,
        progress_bar("image cache", total, unit="image", enabled=state.is_main_process) as bar,
    ):
        for shard in shards:
            for start in range(shard.rows.start, shard.rows.stop, rows):
                part = table[start : min(start + rows, shard.rows.stop)]
                columns = {name: part[name].combine_chunks() for name in schema.names}
                cells = pool.map(lambda cell: _cell(cell, reading), columns["image"].to_pylist())
                columns["image"] = pa.array(list(cells), schema.field("image").type)
                batch = pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)
                yield ShardPart(len(batch), batch, [])
                bar.update(len(batch))


def _cell(cell: dict, reading: ReadingArguments) -> dict:
    """Return an image decoded and shrunk, with its path; as it is where it can't be read."""
    try:
        image = read_image(cell, name="", **reading.sizes)
    except ValueError:
        return cell
    return {"bytes": to_ppm(image), "path": cell["path"]}
