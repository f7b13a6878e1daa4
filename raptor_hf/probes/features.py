"""Features of a frozen backbone, computed once and kept as a `datasets` dataset."""

import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..data import batches
from ..data.decoding import check_one_size
from ..modeling_raptor_heads import PatchFrame
from ..runs.processes import process_state
from ..tasks.task import Task
from ..teachers import normed_state


class Features(Dataset):
    """Batches of tensors from a dataset with the columns `features`, `target` and `image_id`.

    Row r is image r mod n: every view of an image has the same features.
    """

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows.with_format("arrow")
        self.image_ids = np.array(rows["image_id"][:])

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch of `features` (float32), `target` and `image_id` (int64)."""
        table = self.rows[[row % len(self) for row in rows]]
        batch = {name: torch.tensor(from_arrow(table[name])) for name in table.column_names}
        if batch["target"].dtype == torch.uint8:
            batch["target"] = batch["target"].long()
        return batch


@torch.no_grad()
def backbone_features(
    backbone: PreTrainedModel, task: Task, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Return the input of the task's heads; dense tasks take images of any size."""
    pixel_values = pixel_values.to(backbone.device)
    if task.dense:
        pixel_values = PatchFrame.of(pixel_values.shape[-2:], backbone.config).pad(pixel_values)
    return task.features(normed_state(backbone, pixel_values))


def compute_features(
    backbone: PreTrainedModel,
    task: Task,
    images: Dataset,
    folder: Path,
    *,
    batch_size: int,
    num_workers: int = 0,
) -> Features:
    """Compute the features of all images, or read those that an interrupted run left.

    Every process writes its share of the images to a file in `folder`, which gets its name when it
    is complete. All processes read all files; the rows are in the order of the image numbers.

    Raises:
        ValueError: an image that can't be read, or images of several sizes.
    """
    state = process_state()
    names = [f"part_{i}_of_{state.num_processes}.arrow" for i in range(state.num_processes)]
    part = folder / names[state.process_index]
    if not part.exists():
        folder.mkdir(parents=True, exist_ok=True)
        read = batches(images, batch_size, "features", num_workers=num_workers)
        _write_features(part, backbone, task, read)
    state.wait_for_everyone()

    # a process without any images has an empty file
    files = [folder / name for name in names if (folder / name).stat().st_size]
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    # an image that took the place of one that can't be read counts once
    _, order = np.unique(rows["image_id"][:], return_index=True)
    return Features(rows.select(order))


def _write_features(
    path: Path, backbone: PreTrainedModel, task: Task, read: Iterator[dict[str, torch.Tensor]]
) -> None:
    """Write features, targets and image numbers of some batches to one Arrow file."""
    # write to another name until the file is whole
    unfinished, writer = path.with_suffix(".tmp"), None
    with open(unfinished, "wb") as file:
        for batch in read:
            target = batch["target"]
            if target.ndim > 1 and not target.is_floating_point():
                target = target.to(torch.uint8)  # classes of pixels: 0 … 254 and `IGNORED`
            features = backbone_features(backbone, task, batch["pixel_values"]).float().cpu()
            # append them to the file, all of one size
            columns = {"features": features, "target": target, "image_id": batch["image_id"]}
            table = pa.table({name: to_arrow(values.numpy()) for name, values in columns.items()})
            if writer is None:
                writer, size = pa.ipc.new_stream(file, table.schema), target.shape[1:]
            check_one_size([size, target.shape[1:]])
            writer.write_table(table)
        if writer is not None:
            writer.close()
    os.replace(unfinished, path)


# `datasets` has columns of arrays, too; to read them takes three times as long
def to_arrow(array: np.ndarray) -> pa.Array:
    """Return an array (n, …) as n Arrow values, nested lists of fixed lengths."""
    column = pa.array(np.ascontiguousarray(array).ravel())
    for length in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, length)
    return column


def from_arrow(column: pa.ChunkedArray) -> np.ndarray:
    """Return the array (n, …) that `to_arrow` was given."""
    column, shape = column.combine_chunks(), [len(column)]
    while pa.types.is_fixed_size_list(column.type):
        shape.append(column.type.list_size)
        column = column.flatten()
    return column.to_numpy().reshape(shape)
