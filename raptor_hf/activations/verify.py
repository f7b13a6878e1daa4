"""Check an activation dataset: its files, their checksums, what is in them.

python -m raptor_hf.activations verify outputs/digits/activations
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from ..runs.files import read_json
from ..runs.processes import print_anything, progress_bar
from ..runs.shards import MANIFEST, shard_digest, shard_problem
from .format import (
    activation_features,
    how_to_repair,
    read_manifest,
    states_of,
)


def verify_activations(path: str | Path) -> Iterator[str]:
    """Yield everything that is wrong with an activation dataset, each in a sentence.

    Reads all of it: sizes, checksums, schema, that every number is finite, and that every view of
    every image is there exactly once.

    Raises:
        FileNotFoundError: there is no manifest.
    """
    path, manifest = Path(path), read_manifest(path)
    expected = activation_features(
        manifest["layers"],
        manifest["num_tokens"],
        manifest["num_channels"],
        dtype=manifest["dtype"],
        num_patches=manifest["num_patches"],
    ).arrow_schema
    listed = [entry["filename"] for entry in read_json(path / "state.json")["_data_files"]]
    if listed != list(manifest["shards"]):
        yield f"state.json of {path} does not list the shards of {MANIFEST}."
    seen: list[tuple[int, int]] = []
    whole = True
    total = sum(facts["size_bytes"] for facts in manifest["shards"].values())
    with progress_bar("verify", total // 2**20, unit="MB") as bar:
        for name, facts in manifest["shards"].items():
            problem = shard_problem(path / name, facts)
            if problem is None and shard_digest(path / name) != facts["xxh3_128"]:
                problem = f"The shard {name} of {path} is damaged: its checksum is another one."
            if problem:
                whole = False
                yield f"{problem} {how_to_repair(name)}"
            else:
                yield from _shard_contents(path / name, facts["rows"], expected, seen)
            bar.update(facts["size_bytes"] // 2**20)
    counts = (
        len({image_id for image_id, _ in seen}),
        len({view for _, view in seen}),
        len(set(seen)),
    )
    images, views = manifest["num_images"], manifest["views"]
    if whole and (counts != (images, views, images * views) or len(seen) > len(set(seen))):
        yield (
            f"{path} must hold {views} views of {images:,} images, each once; it has {len(seen):,} "
            f"trajectories, {counts[2]:,} of them different, of {counts[0]:,} images."
        )


def _shard_contents(path: Path, rows: int, expected: pa.Schema, seen: list) -> Iterator[str]:
    """Yield what is wrong inside a shard; adds its (image, view) to `seen`."""
    table = datasets.Dataset.from_file(str(path)).data.table
    if not table.schema.equals(expected) or len(table) != rows:
        yield f"The shard {path.name} has {len(table):,} rows of {table.schema.names}, not {rows}."
        return
    for name in (name for name in expected.names if name.startswith("layer_")):
        if not all(np.isfinite(states_of(chunk)).all() for chunk in table[name].chunks):
            yield f"The shard {path.name} has numbers in {name} that are not finite."
    ids, views = (table[name].to_pylist() for name in ("image_id", "view"))
    seen += zip(ids, views, strict=True)


def main() -> None:
    """Run `verify PATH`: print what is wrong; exit with 1 if anything is."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m raptor_hf.activations")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check a dataset: files, checksums, contents")
    verify.add_argument("path", help="folder of the activation dataset")
    path = parser.parse_args().path
    try:
        problems = list(verify_activations(path))
    except FileNotFoundError as error:
        problems = [str(error)]
    if problems:
        sys.exit("\n".join(problems))
    manifest = read_manifest(path)
    size = sum(facts["size_bytes"] for facts in manifest["shards"].values())
    print(
        f"{path} is whole: {manifest['num_images']:,} images × {manifest['views']} views, "
        f"layers {manifest['layers']}, {len(manifest['shards'])} shards, {size / 1e9:.3g} GB, "
        f"of {manifest['teacher']['name']}"
    )
