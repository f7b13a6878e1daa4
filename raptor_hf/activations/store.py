"""The activation dataset: a teacher's trajectories as a plain `datasets` dataset, read and checked.

One column a layer (`layer_0` … `layer_L`, each N × D), so that a phase reads its layers only, in
Arrow files that `datasets.load_from_disk` opens. `manifest.json` beside them says which teacher and
images they are of, and the checksum of every file. `extraction.py` writes them.

    python -m raptor_hf.activations verify outputs/digits/activations
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..configuration_raptor import TokenLayout
from ..data.loading import Classes
from ..runs.shards import shard_problem
from ..teachers import teacher_identity
from .format import (
    SCALARS,
    how_to_repair,
    layer_column,
    read_manifest,
    states_of,
)

_COPYING_THREADS = 4  # a page that is not in memory is waited for; threads wait side by side
WORTH_A_THREAD = 2**16  # bytes of a state; smaller ones are copied faster than threads start


class StoredActivations(Dataset):
    """Map-style reader of an activation dataset: batches are gathered straight from the memory map.

    It hands out whole batches: `DataLoader(activations, batch_size=64, shuffle=True,
    collate_fn=keep_batch)`, with `raptor_hf.data.keep_batch`. Any number of processes can read.

    Args:
        path: folder of the dataset.
        layers: whose states are read, in this order; default: all that are stored.
        dtype: of the states; default: as they are stored.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: a shard has another size than the manifest says, or a layer is not stored.
    """

    def __init__(
        self,
        path: str | Path,
        layers: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.path, self.dtype = Path(path), dtype
        self.manifest = read_manifest(path)
        stored, self.depth = self.manifest["layers"], self.manifest["depth"]
        self.layers = list(stored if layers is None else layers)
        absent = [layer for layer in self.layers if layer not in stored]
        if absent or not self.layers:
            raise ValueError(f"{path} holds the layers {stored}; asked for {self.layers}.")
        for name, facts in self.manifest["shards"].items():
            problem = shard_problem(self.path / name, facts)
            if problem:
                kind = ValueError if (self.path / name).exists() else FileNotFoundError
                raise kind(f"{problem} {how_to_repair(name)}")
        self.layout = TokenLayout(self.manifest["num_cls"], self.manifest["num_registers"])
        table = datasets.load_from_disk(str(self.path)).data.table
        # a view (rows, N, D) of every record batch and layer
        columns = [table[layer_column(layer)].chunks for layer in self.layers]
        self.views = [[states_of(chunk) for chunk in chunks] for chunks in columns]
        self.ends = np.cumsum([len(view) for view in self.views[0]])
        scalars = [name for name in (*SCALARS, "patches") if name in table.column_names]
        self.scalars = {name: _small_column(table[name]) for name in scalars}

    @property
    def classes(self) -> Classes:
        """What the labels stand for; a store of an earlier version has no names."""
        return Classes.of(self.manifest.get("class_names"), self.scalars["label"])

    def __reduce__(self):
        # a DataLoader's worker that is not forked opens the files itself, and gets no copy
        return type(self), (self.path, self.layers, self.dtype)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return a batch: `states` (B, layers, N, D), and `label`, `image_id`, `view` (B,).

        Where only some patches of each image are stored, `patches` (B, M) says which.
        """
        rows = np.asarray(rows)
        batches = np.searchsorted(self.ends, rows, side="right")
        offsets = rows - np.concatenate([[0], self.ends])[batches]
        sample = self.views[0][0]
        # memory of torch, which is aligned: `keep_batch` need not copy it
        dtype = torch.from_numpy(np.empty(0, sample.dtype)).dtype
        states = torch.empty((len(rows), len(self.layers), *sample.shape[1:]), dtype=dtype)
        gathered = states.numpy()

        def copy(positions: np.ndarray) -> None:
            for position in positions:
                batch, offset = batches[position], offsets[position]
                for index, views in enumerate(self.views):
                    gathered[position, index] = views[batch][offset]

        positions = range(len(rows))
        if sample[0].nbytes < WORTH_A_THREAD:
            copy(positions)
        else:
            with ThreadPoolExecutor(_COPYING_THREADS) as pool:
                list(pool.map(copy, np.array_split(positions, _COPYING_THREADS)))
        scalars = {name: values[rows] for name, values in self.scalars.items()}
        return {"states": states if self.dtype is None else states.to(self.dtype), **scalars}

    def states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the states (B, layers, N, D) of a batch, as `OnlineActivations` does."""
        return batch["states"]

    @property
    def resolution(self) -> list[int]:
        """Height and width of the images in pixels."""
        return self.manifest["image_size"]

    def identity(self) -> str:
        """Return a digest of the dataset; other activations have another one."""
        digest = xxhash.xxh3_128()
        for name, facts in self.manifest["shards"].items():
            digest.update(f"{name} {facts['xxh3_128']}".encode())
        return digest.hexdigest()

    def files(self, dataset: str | None) -> dict:
        """Return no images: those that were read are a part of what the store is."""
        return {}


def _small_column(column: pa.ChunkedArray) -> torch.Tensor:
    """Return a column of numbers, or of lists of one length, in memory."""
    if pa.types.is_fixed_size_list(column.type):
        flat = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
        return torch.from_numpy(flat.reshape(-1, column.type.list_size))
    return torch.from_numpy(column.to_numpy().copy())


def load_activations(
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    teacher: PreTrainedModel | None = None,
) -> StoredActivations:
    """Open an activation dataset; with `teacher`, refuse one that another teacher's weights made.

    Args:
        path: folder of the dataset.
        layers: whose states are read; default: all that are stored.
        dtype: of the states; default: as they are stored.

    Raises:
        ValueError, FileNotFoundError: see `StoredActivations`; or the teacher is another one.
    """
    activations = StoredActivations(path, layers, dtype)
    if teacher is not None:
        made_by, given = activations.manifest["teacher"], teacher_identity(teacher)
        if made_by["weights_sha256"] != given["weights_sha256"]:
            raise ValueError(
                f"{path} holds the activations of another teacher: made with {made_by['name']} "
                f"(weights {made_by['weights_sha256'][:12]}…), given {given['name']} "
                f"(weights {given['weights_sha256'][:12]}…). Extract activations of this teacher."
            )
    return activations
