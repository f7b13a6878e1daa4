"""The activation dataset: a teacher's trajectories as a plain `datasets` dataset on disk.

One float16 column `layer_<ℓ>` (N, D) a layer, ℓ = 0 … L, plus `label`, `image_id` and `view`. The
folder is what `Dataset.save_to_disk` would write (Arrow stream shards, `state.json`,
`dataset_info.json`), so that `datasets.load_from_disk` opens it, and a `manifest.json` beside it
says where it came from.
"""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from .configuration_raptor import token_layout
from .data import ImageViews
from .runs import environment, file_digest, progress_bar, read_json, write_json
from .teachers import teacher_identity, trajectory

SCALARS = ("label", "image_id", "view")


def layer_column(layer: int) -> str:
    """Name of the column that holds the states after a layer."""
    return f"layer_{layer}"


def activation_features(num_layers: int, num_tokens: int, num_channels: int) -> datasets.Features:
    """Schema of an activation dataset of L layers, N tokens, D channels."""
    states = {
        layer_column(layer): datasets.Array2D((num_tokens, num_channels), "float16")
        for layer in range(num_layers + 1)
    }
    scalars = {name: datasets.Value("int64") for name in SCALARS}
    return datasets.Features(**states, **scalars)


def write_activations(
    teacher: PreTrainedModel,
    images: ImageViews,
    path: str | Path,
    *,
    batch_size: int = 64,
    shard_megabytes: int = 256,
    process_index: int = 0,
    num_processes: int = 1,
) -> None:
    """Write the trajectories of all images and views; a shard is complete or absent.

    A second call on the same folder writes only the shards that are missing, to the same bytes.
    Processes take turns: process p of P writes the shards p, p + P, …; call `write_manifest` after
    all of them are done.

    Raises:
        ValueError: a state beyond float16's range (layer and image are named).
        OSError: less free disk than the dataset will take.
    """
    path = Path(path)
    sample = trajectory(teacher, images[0]["pixel_values"][None].to(teacher.device))
    _, num_layers, num_tokens, num_channels = sample.shape
    features = activation_features(num_layers - 1, num_tokens, num_channels)
    row_bytes = 2 * num_layers * num_tokens * num_channels
    shards = plan_shards(len(images), row_bytes, batch_size, shard_megabytes)
    missing = [s for s in range(len(shards)) if not (path / shard_name(s, len(shards))).exists()]
    if process_index == 0:
        print(
            f"{len(images):,} trajectories of {num_layers} × {num_tokens} × {num_channels} "
            f"float16: {row_bytes * len(images) / 1e9:.2f} GB in {len(shards)} shards, "
            f"{len(missing)} of them to write",
            flush=True,
        )
    check_disk(path, row_bytes * sum(len(shards[s]) for s in missing))
    mine = [s for s in missing if s % num_processes == process_index]
    total = sum(len(shards[s]) for s in mine)
    with progress_bar("extract", total, unit="image", enabled=process_index == 0) as bar:
        for s in mine:
            final = path / shard_name(s, len(shards))
            temporary = final.with_suffix(".tmp")
            with pa.OSFile(str(temporary), "wb") as file:
                with pa.ipc.new_stream(file, features.arrow_schema) as writer:
                    for start in range(shards[s].start, shards[s].stop, batch_size):
                        rows = range(start, min(start + batch_size, shards[s].stop))
                        writer.write_batch(extract_batch(teacher, images, list(rows), features))
                        bar.update(len(rows))
            os.replace(temporary, final)


def check_disk(path: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk can't hold."""
    free_bytes = shutil.disk_usage(path).free
    if needed_bytes > 0.98 * free_bytes:
        raise OSError(
            f"{needed_bytes / 1e9:.1f} GB are to be written to {path}, but only "
            f"{free_bytes / 1e9:.1f} GB are free. Use fewer views or another disk."
        )


def plan_shards(num_rows: int, row_bytes: int, batch_size: int, megabytes: int) -> list[range]:
    """Rows of every shard: whole batches, about `megabytes` each, at least one."""
    rows = max(1, megabytes * 10**6 // (row_bytes * batch_size)) * batch_size
    return [range(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def shard_name(shard: int, num_shards: int) -> str:
    """File name of a shard, as `datasets` names them."""
    return f"data-{shard:05d}-of-{num_shards:05d}.arrow"


def extract_batch(teacher, images: ImageViews, rows: list[int], features) -> pa.RecordBatch:
    """The trajectories of some rows as one Arrow record batch, not by way of Python objects."""
    batch = images.__getitems__(rows)
    states = trajectory(teacher, batch["pixel_values"].to(teacher.device)).half().cpu()
    if not torch.isfinite(states).all():
        image, layer = torch.nonzero(~torch.isfinite(states))[0, :2].tolist()
        raise ValueError(
            f"The state after layer {layer} of image {int(batch['image_id'][image])} holds "
            "values that float16 can't (beyond ±65504, or NaN)."
        )
    schema = features.arrow_schema
    columns = [
        array2d(states[:, layer].contiguous().numpy(), schema.field(layer_column(layer)).type)
        for layer in range(states.shape[1])
    ]
    columns += [pa.array(batch[name].numpy()) for name in SCALARS]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def array2d(values: np.ndarray, field_type: pa.DataType) -> pa.Array:
    """(B, N, D) as Arrow's nested lists under `datasets`' Array2D type."""
    num_rows, num_tokens, num_channels = values.shape
    inner = np.arange(0, num_rows * num_tokens + 1, dtype=np.int32) * num_channels
    outer = np.arange(0, num_rows + 1, dtype=np.int32) * num_tokens
    lists = pa.ListArray.from_arrays(inner, pa.array(values.reshape(-1)))
    return pa.ExtensionArray.from_storage(field_type, pa.ListArray.from_arrays(outer, lists))


def write_manifest(
    path: str | Path,
    teacher: PreTrainedModel,
    images: ImageViews,
    *,
    revision: str | None = None,
) -> None:
    """Complete a dataset whose shards are written: `datasets`' own files and the manifest.

    Args:
        revision: the Hub revision that the teacher was loaded at; its commit is written down.
    """
    path = Path(path)
    shards = sorted(path.glob("data-*.arrow"))
    features = datasets.Dataset.from_file(str(shards[0])).features
    datasets.DatasetInfo(features=features).write_to_directory(str(path))
    files = {shard.name: file_digest(shard) for shard in shards}
    write_json(
        path / "state.json",
        {
            "_data_files": [{"filename": name} for name in files],
            "_fingerprint": next(iter(files.values()))[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )
    layout = token_layout(teacher.config)
    manifest = {
        "teacher": teacher_identity(teacher, revision),
        "num_images": len(images.labels),
        "views": images.views,
        "seed": images.seed,
        "image_size": list(images[0]["pixel_values"].shape[-2:]),
        "transform": images.processor.to_dict(),
        "dtype": "float16",
        "num_cls": layout.num_cls,
        "num_registers": layout.num_registers,
        "environment": environment(),
        "shards": {
            shard.name: {"size_bytes": shard.stat().st_size, "sha256": files[shard.name]}
            for shard in shards
        },
    }
    write_json(path / "manifest.json", manifest)


class ActivationDataset(Dataset):
    """Map-style reader of an activation dataset: batches are gathered straight from the memory map.

    Args:
        path: folder of the dataset.
        layers: (start, stop): only the states after the layers start … stop; None for all.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: a shard has another size than the manifest says.
    """

    def __init__(self, path: str | Path, layers: tuple[int, int] | None = None):
        self.path = Path(path)
        if not (self.path / "manifest.json").exists():
            raise FileNotFoundError(
                f"{path} is not a finished activation dataset: it has no manifest.json. "
                "Make it with training/extract_activations.py (--resume goes on with a part)."
            )
        self.manifest = read_json(self.path / "manifest.json")
        self._check_shards()
        table = datasets.load_from_disk(str(self.path)).data.table
        num_layers = len(table.column_names) - len(SCALARS) - 1
        start, stop = layers or (0, num_layers)
        if not 0 <= start <= stop <= num_layers:
            raise ValueError(
                f"{path} holds the layers 0 to {num_layers}; asked for {start} to {stop}."
            )
        self.layers = range(start, stop + 1)
        # zero-copy views of every record batch: one (rows, N, D) array a batch and layer
        self.states = [
            [
                chunk.storage.flatten().flatten().to_numpy(zero_copy_only=True)
                .reshape(len(chunk), *chunk.type.shape)
                for chunk in table[layer_column(layer)].chunks
            ]
            for layer in self.layers
        ]  # fmt: skip
        self.ends = np.cumsum([len(view) for view in self.states[0]])
        self.scalars = {name: torch.from_numpy(table[name].to_numpy().copy()) for name in SCALARS}

    def _check_shards(self) -> None:
        for name, facts in self.manifest["shards"].items():
            shard = self.path / name
            if not shard.exists():
                raise FileNotFoundError(
                    f"The shard {name} of {self.path} is missing: restore it, or delete the folder "
                    "and extract again."
                )
            if shard.stat().st_size != facts["size_bytes"]:
                raise ValueError(
                    f"The shard {name} of {self.path} is truncated or changed: expected "
                    f"{facts['size_bytes']:,} bytes, found {shard.stat().st_size:,}. "
                    "Delete the folder and extract again."
                )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """A batch: `states` (B, layers, N, D), float16, and `label`, `image_id`, `view` (B,)."""
        rows = np.asarray(rows)
        chunks = np.searchsorted(self.ends, rows, side="right")
        locals_ = rows - np.concatenate([[0], self.ends])[chunks]
        shape = (len(rows), len(self.layers), *self.states[0][0].shape[1:])
        gathered = np.empty(shape, dtype=np.float16)
        for chunk in np.unique(chunks):
            hits = np.flatnonzero(chunks == chunk)
            for index, views in enumerate(self.states):
                gathered[hits, index] = views[chunk][locals_[hits]]
        scalars = {name: values[rows] for name, values in self.scalars.items()}
        return {"states": torch.from_numpy(gathered), **scalars}


def load_activations(
    path: str | Path,
    *,
    layers: tuple[int, int] | None = None,
    teacher: PreTrainedModel | None = None,
) -> ActivationDataset:
    """Open an activation dataset; with `teacher`, refuse one that another teacher's weights made.

    Raises:
        ValueError, FileNotFoundError: see `ActivationDataset`; or the teacher is another one.
    """
    dataset = ActivationDataset(path, layers)
    if teacher is not None:
        made_by, given = dataset.manifest["teacher"], teacher_identity(teacher)
        if made_by["weights_sha256"] != given["weights_sha256"]:
            raise ValueError(
                f"{path} holds the activations of another teacher: made with {made_by['name']} "
                f"(weights {made_by['weights_sha256'][:12]}…), given {given['name']} "
                f"(weights {given['weights_sha256'][:12]}…). Extract activations of this teacher."
            )
    return dataset
