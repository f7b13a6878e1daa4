"""The files of an activation dataset: schema, shards, checksums, manifest, card."""

import mmap
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import xxhash

from ..runs.files import read_json

MANIFEST = "manifest.json"
SCALARS = ("label", "image_id", "view")


def layer_column(layer: int) -> str:
    """Return the name of the column of the states after a layer."""
    return f"layer_{layer}"


def activation_features(
    layers: Sequence[int], num_tokens: int, num_channels: int, dtype: str
) -> datasets.Features:
    """Return the schema: a column (num_tokens, num_channels) a layer, label, image and view.

    Args:
        dtype: `"float16"` or `"float32"`.
    """
    shape = (num_tokens, num_channels)
    columns = {layer_column(layer): datasets.Array2D(shape, dtype) for layer in layers}
    columns |= {name: datasets.Value("int64") for name in SCALARS}
    return datasets.Features(columns)


def array2d(values: np.ndarray, field_type: pa.DataType) -> pa.Array:
    """Return (B, N, D) as Arrow's nested lists under `datasets`' Array2D type."""
    # the offsets of the tokens in the numbers, and of the rows in the tokens
    num_rows, num_tokens, num_channels = values.shape
    inner = np.arange(0, num_rows * num_tokens + 1, dtype=np.int32) * num_channels
    outer = np.arange(0, num_rows + 1, dtype=np.int32) * num_tokens
    lists = pa.ListArray.from_arrays(inner, pa.array(values.reshape(-1)))
    return pa.ExtensionArray.from_storage(field_type, pa.ListArray.from_arrays(outer, lists))


def states_of(column: pa.Array) -> np.ndarray:
    """Return a piece of a layer's column as (rows, N, D), without copying it."""
    values = column.storage.flatten().flatten().to_numpy(zero_copy_only=True)
    return values.reshape(len(column), *column.type.shape)


def checksum(path: str | Path) -> str:
    """Return XXH3 (128 bits) of a file, which finds damage at the speed of the disk."""
    with open(path, "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return xxhash.xxh3_128(content).hexdigest()


def read_manifest(path: str | Path) -> dict:
    """Return the manifest of a finished activation dataset.

    Raises:
        FileNotFoundError: there is no manifest.
    """
    if not (Path(path) / MANIFEST).exists():
        raise FileNotFoundError(
            f"{path} is not a finished activation dataset: it has no {MANIFEST}. "
            "Make it with training/extract_activations.py (--resume goes on with a part)."
        )
    return read_json(Path(path) / MANIFEST)


def shard_problem(file: Path, facts: dict, *, checksums: bool) -> str | None:
    """Return how a shard differs from its size and checksum; None if it does not."""
    if not file.exists():
        return f"{file} is missing"
    size = file.stat().st_size
    if size != facts["size_bytes"]:
        return f"{file} has {size:,} bytes instead of {facts['size_bytes']:,}"
    if checksums and checksum(file) != facts["xxh3_128"]:
        return f"{file} is damaged: it has another checksum"
    return None


def verify_activations(path: str | Path, *, checksums: bool = True) -> dict[str, str]:
    """Return the problem of every shard that is missing, truncated or damaged, by its name.

    Args:
        checksums: read all of it and compare checksums, not only sizes.

    Raises:
        FileNotFoundError: there is no manifest.
    """
    problems = {}
    for name, facts in read_manifest(path)["shards"].items():
        problem = shard_problem(Path(path) / name, facts, checksums=checksums)
        if problem:
            problems[name] = (
                f"{problem}. Delete it if it is there, and run training/extract_activations.py as "
                "you did, with --resume: it writes missing shards."
            )
    return problems


def dataset_card(manifest: dict) -> str:
    """Return the README.md of an activation dataset; it tells the Hub where the data are."""
    teacher, layers = manifest["teacher"], manifest["layers"]
    size = sum(facts["size_bytes"] for facts in manifest["shards"].values())
    return f"""---
tags:
- raptor_hf
- activations
configs:
- config_name: default
  data_files: data-*.arrow
---

# Hidden states of {teacher["name"]}

| | |
| --- | --- |
| teacher | {teacher["name"]}, commit {teacher["revision"]}, weights {teacher["weights_sha256"]} |
| images | {manifest["num_images"]:,} in {manifest["views"]} views of {manifest["image_size"]} |
| layers | {layers}; 0 is the embeddings, each before the final norm |
| tokens | {manifest["num_cls"]} cls, {manifest["num_registers"]} registers, then all patches |
| a state | {manifest["num_tokens"]} × {manifest["num_channels"]}, {manifest["dtype"]} |
| size | {size / 1e9:.3g} GB in {len(manifest["shards"])} files |

`datasets.load_from_disk` opens it; `raptor_hf.activations.load_activations` reads batches of it at
the speed of the memory map, and `python -m raptor_hf.activations verify` checks every file.
"""
