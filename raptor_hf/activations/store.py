"""Read an activation dataset: a teacher's trajectories as a plain `datasets` dataset.

One column a layer (`layer_0` … `layer_L`, each N × D), so that a phase reads its layers only.
`manifest.json` names the teacher and the images, and holds the checksum of every Arrow file.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..configuration_raptor import TokenLayout
from ..runs.files import json_digest
from ..teachers import load_processor, teacher_identity
from .format import SCALARS, read_manifest, verify_activations

_COPYING_THREADS = 4  # a page that is not in memory is waited for; threads wait side by side
WORTH_A_THREAD = 2**16  # bytes of a state; smaller ones are copied faster than threads start


class StoredActivations(Dataset):
    """Map-style reader of an activation dataset: batches are gathered straight from the memory map.

    It returns whole batches: `DataLoader(activations, 64, collate_fn=keep_batch)`, with
    `raptor_hf.data.keep_batch`. `load_activations` opens one.
    """

    def __init__(self, path: str | Path, layers: Sequence[int] | None = None):
        self.path = Path(path)
        self.manifest = read_manifest(path)
        stored, self.depth = self.manifest["layers"], self.manifest["depth"]
        self.layers = list(layers or stored)
        if not set(self.layers) <= set(stored):
            raise ValueError(f"{path} holds the layers {stored}; asked for {self.layers}.")
        for problem in verify_activations(path, checksums=False).values():
            raise ValueError(problem)
        self.layout = TokenLayout(self.manifest["num_cls"], self.manifest["num_registers"])
        self.resolution = self.manifest["image_size"]  # height and width in pixels

        # a view (rows, N, D) of every layer and record batch, without a copy
        table, self.views = datasets.load_from_disk(str(self.path)).data.table, []
        for layer in self.layers:
            views = []
            for chunk in table[f"layer_{layer}"].chunks:
                values = chunk.storage.flatten().flatten().to_numpy(zero_copy_only=True)
                views.append(values.reshape(len(chunk), *chunk.type.shape))
            self.views.append(views)

        # the last rows + 1 of the record batches
        self.ends = np.cumsum([len(view) for view in self.views[0]])
        self.scalars = {name: torch.tensor(table[name].to_numpy()) for name in SCALARS}

    def __reduce__(self):
        # a DataLoader's worker that is not forked opens the files itself, and gets no copy
        return type(self), (self.path, self.layers)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return a batch: `states` (B, layers, N, D), and `label`, `image_id`, `view` (B,)."""
        # find the record batch of each row, and the row's place in it
        rows = np.asarray(rows)
        batches = np.searchsorted(self.ends, rows, side="right")
        offsets = rows - np.concatenate([[0], self.ends])[batches]

        # allocate by torch: kernels choose their way by the address, which it aligns
        sample = self.views[0][0]
        shape, dtype = (len(rows), len(self.layers), *sample.shape[1:]), str(sample.dtype)
        states = torch.empty(shape, dtype=getattr(torch, dtype))
        gathered = states.numpy()

        # copy the states from the memory map, large ones in several threads
        def copy(positions: np.ndarray) -> None:
            for position in positions:
                batch, offset = batches[position], offsets[position]
                for index, views in enumerate(self.views):
                    gathered[position, index] = views[batch][offset]

        positions = np.arange(len(rows))
        if sample[0].nbytes < WORTH_A_THREAD:
            copy(positions)
        else:
            with ThreadPoolExecutor(_COPYING_THREADS) as pool:
                list(pool.map(copy, np.array_split(positions, _COPYING_THREADS)))
        scalars = {name: values[rows] for name, values in self.scalars.items()}
        return {"states": states, **scalars}

    def states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the states (B, layers, N, D) of a batch, as `OnlineActivations` does."""
        return batch["states"]

    @cached_property
    def processor(self):
        """The image processor that made the images; models of these states need the same."""
        return load_processor(str(self.path))

    def identity(self) -> str:
        """Return a digest of the dataset; other activations have another one."""
        return json_digest(self.manifest["shards"])

    def files(self, dataset: str | None) -> dict:
        """Return no images: those that were read are a part of the store's own identity."""
        return {}


def load_activations(
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    teacher: PreTrainedModel | None = None,
) -> StoredActivations:
    """Open an activation dataset.

    Args:
        layers: the layers to read, in this order; default: all that are stored.
        teacher: refuse a dataset of another teacher's weights.

    Raises:
        FileNotFoundError: no manifest.
        ValueError: a missing or truncated shard, a layer that is not stored, or another teacher.
    """
    activations = StoredActivations(path, layers)
    if teacher is not None:
        maker, given = activations.manifest["teacher"], teacher_identity(teacher)
        if maker["weights_sha256"] != given["weights_sha256"]:
            raise ValueError(
                f"{path} holds the activations of another teacher, {maker['name']}; given "
                f"{given['name']}: their weights differ. Extract activations of this teacher."
            )
    return activations
