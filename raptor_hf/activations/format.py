"""The files of an activation dataset: schema, shards, checksums, manifest, card."""

import mmap
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets.features.features import numpy_to_pyarrow_listarray

from ..runs.files import read_json

MANIFEST = "manifest.json"
SCALARS = ("label", "image_id", "view")


def activation_features(
    layers: Sequence[int], num_tokens: int, num_channels: int, dtype: str
) -> datasets.Features:
    """Return the schema: a column (num_tokens, num_channels) a layer, label, image and view."""
    state = datasets.Array2D((num_tokens, num_channels), dtype)
    columns = dict.fromkeys([f"layer_{layer}" for layer in layers], state)
    return datasets.Features(columns | dict.fromkeys(SCALARS, datasets.Value("int64")))


def array2d(values: np.ndarray, field_type: pa.DataType) -> pa.Array:
    """Return (B, N, D) under `datasets`' Array2D type, without a detour by Python objects."""
    return pa.ExtensionArray.from_storage(field_type, numpy_to_pyarrow_listarray(values))


def states_of(column: pa.Array) -> np.ndarray:
    """Return a piece of a layer's column as (rows, N, D), without copying it."""
    values = column.storage.flatten().flatten().to_numpy(zero_copy_only=True)
    return values.reshape(len(column), *column.type.shape)


def shard_facts(file: Path) -> dict:
    """Return the size of a shard, and XXH3 (128 bits), which works at the speed of the disk."""
    with file.open("rb") as opened:
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return {"size_bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}


def read_manifest(path: str | Path) -> dict:
    """Return the manifest of a finished activation dataset.

    Raises:
        FileNotFoundError: there is no manifest.
    """
    if not (Path(path) / MANIFEST).exists():
        raise FileNotFoundError(
            f"{path} is not a finished activation dataset: it has no {MANIFEST}. Make it with "
            "training/extract_activations.py; --resume goes on with a part."
        )
    return read_json(Path(path) / MANIFEST)


def verify_activations(path: str | Path, *, checksums: bool = True) -> dict[str, str]:
    """Return the problem of every shard that is missing, truncated or damaged, by its name.

    Args:
        checksums: read all of it and compare checksums, not only sizes.

    Raises:
        FileNotFoundError: there is no manifest.
    """
    problems = {}
    for name, facts in read_manifest(path)["shards"].items():
        file, problem = Path(path) / name, None
        if not file.exists():
            problem = "is missing"
        elif file.stat().st_size != facts["size_bytes"]:
            problem = f"has {file.stat().st_size:,} bytes instead of {facts['size_bytes']:,}"
        elif checksums and shard_facts(file) != facts:
            problem = "is damaged: it has another checksum"
        if problem:
            problems[name] = (
                f"{file} {problem}. Delete it if it is there, and run the extraction as before "
                "with --resume: it writes missing shards."
            )
    return problems


def dataset_card(manifest: dict) -> str:
    """Return the README.md of an activation dataset; it tells the Hub where the data are."""
    teacher, size = manifest["teacher"], f"{manifest['num_tokens']} × {manifest['num_channels']}"
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
| layers | {manifest["layers"]}; 0 is the embeddings, each before the final norm |
| a state | {size}, {manifest["dtype"]}: cls, {manifest["num_registers"]} registers, all patches |

`datasets.load_from_disk` opens it; `raptor_hf.activations.load_activations` reads batches of it at
the speed of the memory map, and `python -m raptor_hf.activations verify` checks every file.
"""
