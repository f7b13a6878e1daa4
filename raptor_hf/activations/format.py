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
        ValueError: a shard that it names lies outside the folder.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        raise FileNotFoundError(
            f"{path} is not a finished activation dataset: it has no {MANIFEST}. "
            "Make it with training/extract_activations.py (--resume goes on with a part)."
        )
    manifest = read_json(path / MANIFEST)
    listed = read_json(path / "state.json")["_data_files"]  # the shards that `datasets` opens
    names = [*manifest["shards"], *(entry["filename"] for entry in listed)]
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise ValueError(f"{path} names shards outside the folder: {foreign[:3]}.")
    return manifest


def shard_problem(path: str | Path, name: str, facts: dict) -> str | None:
    """Return how a shard differs from the manifest, by its size; None if it does not."""
    file = Path(path) / name
    repair = (
        f"Delete {name} if it is there, and run training/extract_activations.py as you did, with "
        "--resume: it writes the missing shards."
    )
    if not file.exists():
        return f"The shard {name} of {path} is missing. {repair}"
    size = file.stat().st_size
    if size != facts["size_bytes"]:
        return (
            f"The shard {name} of {path} is truncated or changed: expected "
            f"{facts['size_bytes']:,} bytes, found {size:,}. {repair}"
        )
    return None


def lost_shards(path: str | Path) -> list[str]:
    """Return the shards of a finished dataset that are missing or truncated."""
    shards = read_manifest(path)["shards"] if (Path(path) / MANIFEST).exists() else {}
    return [name for name, facts in shards.items() if shard_problem(path, name, facts)]


def verify_activations(path: str | Path) -> list[str]:
    """Return the problems of an activation dataset: shards missing, truncated or damaged.

    Reads all of it and compares sizes and checksums with the manifest.

    Raises:
        FileNotFoundError: there is no manifest.
    """
    problems = []
    for name, facts in read_manifest(path)["shards"].items():
        problem = shard_problem(path, name, facts)
        if problem is None and checksum(Path(path) / name) != facts["xxh3_128"]:
            problem = (
                f"The shard {name} of {path} is damaged: it has another checksum. Delete it, and "
                "run training/extract_activations.py as you did, with --resume."
            )
        if problem:
            problems.append(problem)
    return problems


def dataset_card(manifest: dict) -> str:
    """Return the README.md of an activation dataset; it tells the Hub where the data are."""
    teacher, layers = manifest["teacher"], manifest["layers"]
    tokens = f"{manifest['num_cls']} cls, {manifest['num_registers']} registers, then all patches"
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
| tokens | {tokens} |
| a state | {manifest["num_tokens"]} × {manifest["num_channels"]}, {manifest["dtype"]} |
| size | {size / 1e9:.3g} GB in {len(manifest["shards"])} files |

```python
import datasets

states = datasets.load_from_disk("path/to/this/folder")  # columns layer_{layers[0]} …
```

`raptor_hf.activations.load_activations` reads batches of them at the speed of the memory map, and
`python -m raptor_hf.activations verify path/to/this/folder` checks every file.
"""
