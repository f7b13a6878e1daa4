"""The files of an activation dataset: shards, checksums, manifest, card."""

import mmap
from pathlib import Path

import xxhash

from ..runs.files import read_json

MANIFEST = "manifest.json"
SCALARS = ("label", "image_id", "view")


def shard_facts(file: Path) -> dict:
    """Return the size of a shard, and XXH3 (128 bits), which works at the speed of the disk."""
    with file.open("rb") as opened:
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return {"size_bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}


def read_manifest(path: str | Path) -> dict:
    """Return the manifest of a finished activation dataset, or raise FileNotFoundError."""
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
    teacher = manifest["teacher"]
    return f"""---
tags:
- raptor_hf
- activations
configs:
- config_name: default
  data_files: data-*.arrow
---

# Hidden states of {teacher["name"]}

{manifest["num_images"]:,} images of {manifest["image_size"]} pixels in {manifest["views"]} views,
layers {manifest["layers"]}, each before the final norm; `layer_0` is the embeddings. A
state has {manifest["num_cls"]} cls, {manifest["num_registers"]} registers and all patches, in
{manifest["dtype"]}. The teacher's commit is {teacher["revision"]}; `manifest.json` says the rest.

`datasets.load_from_disk` opens it; `raptor_hf.activations.load_activations` reads batches of it at
the speed of the memory map, and `python -m raptor_hf.activations verify` checks every file.
"""
