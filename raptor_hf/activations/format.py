"""The files of an activation dataset: schema, names, checksums, manifest, card."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from ..runs.files import read_json
from ..runs.shards import MANIFEST, shard_problem

SCALARS = ("label", "image_id", "view")


def layer_column(layer: int) -> str:
    """Return the name of the column that holds the states after a layer."""
    return f"layer_{layer}"


def activation_features(
    layers: Sequence[int],
    num_tokens: int,
    num_channels: int,
    *,
    dtype: str = "float16",
    num_patches: int | None = None,
) -> datasets.Features:
    """Return the schema of an activation dataset.

    Args:
        layers: whose states it holds, each (num_tokens, num_channels).
        dtype: `"float16"` or `"float32"`.
        num_patches: length of the column `patches`, which says what patches were kept; None where
            all were.
    """
    shape = (num_tokens, num_channels)
    columns = {layer_column(layer): datasets.Array2D(shape, dtype) for layer in layers}
    if num_patches is not None:
        columns["patches"] = datasets.List(datasets.Value("int32"), length=num_patches)
    columns |= {name: datasets.Value("int64") for name in SCALARS}
    return datasets.Features(columns)


def states_of(column: pa.Array) -> np.ndarray:
    """Return a piece of a layer's column as (rows, N, D), without copying it."""
    values = column.storage.flatten().flatten().to_numpy(zero_copy_only=True)
    return values.reshape(len(column), *column.type.shape)


def read_manifest(path: str | Path) -> dict:
    """Return what a finished activation dataset says of itself.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: a shard that it names lies outside the folder.
    """
    if not (Path(path) / MANIFEST).exists():
        raise FileNotFoundError(
            f"{path} is not a finished activation dataset: it has no {MANIFEST}. "
            "Make it with training/extract_activations.py (--resume goes on with a part)."
        )
    manifest = read_json(Path(path) / MANIFEST)
    state = Path(path) / "state.json"  # what `datasets` goes by
    listed = read_json(state)["_data_files"] if state.exists() else []
    names = [*manifest["shards"], *(entry["filename"] for entry in listed)]
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise ValueError(f"{path} names shards outside the folder: {foreign[:3]}.")
    return manifest


def how_to_repair(shard: str) -> str:
    """Return what to do about a shard that is lost."""
    return (
        f"Delete {shard} if it is there, and run training/extract_activations.py as you did, with "
        "--resume: it writes what is missing."
    )


def lost_shards(path: str | Path) -> list[str]:
    """Return the shards of a finished dataset that are missing or truncated."""
    path = Path(path)
    shards = read_manifest(path)["shards"] if (path / MANIFEST).exists() else {}
    return [name for name, facts in shards.items() if shard_problem(path / name, facts)]


def dataset_card(manifest: dict) -> str:
    """Return the README.md of an activation dataset; it tells the Hub where the data are."""
    teacher, layers = manifest["teacher"], manifest["layers"]
    tokens = f"{manifest['num_cls']} cls, {manifest['num_registers']} registers, then "
    tokens += f"{manifest['num_patches'] or 'all'} patches"
    if manifest["num_patches"]:
        tokens += " drawn at random for each image (column `patches`)"
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
