"""The atlas as a dataset of the Hub: a row a teacher, the maps themselves, the page, a card."""

import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets

from raptor_hf.hub import upload_files
from raptor_hf.reports.tables import markdown_table

from .maps import file_name, load_atlas
from .page import cuts_of_all, overview

_ROWS = "data/train-00000-of-00001.parquet"
_FACTS = {
    "name": "string", "model_type": "string", "source": "string", "revision": "string",
    "weights_sha256": "string", "num_layers": "int32", "num_channels": "int32",
    "num_tokens": "int32", "num_parameters": "int64", "dataset": "string", "split": "string",
    "images_sha256": "string", "num_images": "int32", "seed": "int32",
}  # fmt: skip
_NUMBERS = datasets.List(datasets.Value("float64"))
_CUT = {
    "method": datasets.Value("string"),
    "k": datasets.Value("int32"),
    "phases": datasets.List(datasets.Value("int32")),
    **{name: datasets.Value("float64") for name in ("same", "shared", "agreement", "no_partition")},
    "resamples": datasets.Value("int32"),
    "boundaries": _NUMBERS,
}
_CURVES = {  # by token group, or by kind of rank
    "speed": {"name": datasets.Value("string"), "mean": _NUMBERS, "std": _NUMBERS},
    "norm": {"name": datasets.Value("string"), "mean": _NUMBERS, "std": _NUMBERS},
    "update_rank": {"name": datasets.Value("string"), "mean": _NUMBERS, "std": _NUMBERS},
    "variance": {"name": datasets.Value("string"), "mean": _NUMBERS},
}


def atlas_rows(maps: Sequence[dict]) -> datasets.Dataset:
    """Return a row a teacher; what a map lacks is None."""
    features = {name: datasets.Value(kind) for name, kind in _FACTS.items()}
    features |= {"image_size": datasets.List(datasets.Value("int32"))}
    features |= {"distance": datasets.List(_NUMBERS), "cuts": datasets.List(_CUT)}
    features |= {name: datasets.List(parts) for name, parts in _CURVES.items()}
    rows = []
    for one in maps:
        row = {name: one.get(name) for name in (*_FACTS, "image_size", "distance")}
        row["cuts"] = [
            {name: (int(k) if name == "k" else cut[name]) for name in _CUT}
            for cuts in one["cuts"].values()
            for k, cut in cuts.items()
        ]
        for curve, parts in _CURVES.items():
            row[curve] = [
                {"name": name, **({"mean": found} if isinstance(found, list)
                                  else {part: found[part] for part in parts if part != "name"})}
                for name, found in one[curve].items()
            ]  # fmt: skip
        rows.append(row)
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def atlas_card(maps: Sequence[dict], repo_id: str) -> str:
    """Return the README.md of the dataset: the two tables of the page, and how to read it."""
    heading, rows, method = cuts_of_all(maps)
    tables = [
        markdown_table(head, [[cell.replace("|", "\\|") for cell in row] for row in cells])
        for head, cells in (overview(maps), (heading, rows))
    ]
    return f"""---
tags:
- raptor_hf
- phases
configs:
- config_name: default
  data_files:
  - split: train
    path: {_ROWS}
---

# Atlas of phases: {len(maps)} Vision Transformer{"" if len(maps) == 1 else "s"}

Where the depth of a Vision Transformer falls into phases, runs of similar layers, after
"Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941). A row a teacher: the distances
of its layers, cuts into phases with their stability, speeds, ranks, norms and variances.
`atlas.html` shows all of it, `maps/` holds the files that it is made of.

{tables[0]}

Lengths of the phases; in brackets, the share of bootstrap resamples of the images in which exactly
these come out. Method: {method}.

{tables[1]}

```python
import datasets

atlas = datasets.load_dataset("{repo_id}", split="train")
print(atlas[0]["name"], atlas[0]["cuts"][0]["phases"])
```
"""


def atlas_files(folder: str | Path, repo_id: str) -> dict[str, bytes]:
    """Return the files of the dataset, by their paths in it.

    Args:
        folder: of the maps, and of `atlas.html` made of them.

    Raises:
        ValueError: there is no map.
    """
    maps = load_atlas(folder)
    if not maps:
        raise ValueError(f"{folder} holds no phase map: make some with atlas.py.")
    rows = io.BytesIO()
    atlas_rows(maps).to_parquet(rows)
    own = {
        f"maps/{file_name(one['name'])}.json": json.dumps(one, ensure_ascii=False, indent=1)
        for one in maps
    }
    texts = {"README.md": atlas_card(maps, repo_id), **own}
    return {
        _ROWS: rows.getvalue(),
        "atlas.html": (Path(folder) / "atlas.html").read_bytes(),
        **{name: text.encode() for name, text in texts.items()},
    }


def publish_atlas(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload the atlas; return the commit. Errors as `atlas_files` and `upload_files`."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in atlas_files(folder, repo_id).items():
            file = Path(scratch) / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        return upload_files(
            scratch, repo_id, ["**/*"], repo_type="dataset", private=private, message="Phases"
        )
