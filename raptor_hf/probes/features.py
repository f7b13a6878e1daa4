"""Features of a frozen backbone that are computed once and kept in files."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..data import batches
from ..data.views import first_batch
from ..modeling_raptor_heads import PatchFrame
from ..runs.files import read_json, write_json
from ..runs.processes import process_state
from ..tasks.task import Task
from ..teachers import normed_state
from ..weights import weights_digest
from .images import ProbeImages, check_one_size

_FILES = ("features", "targets")


@torch.no_grad()
def backbone_features(
    backbone: PreTrainedModel, task: Task, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Return what a head of the task looks at, for images of any size where the task is dense."""
    pixel_values = pixel_values.to(backbone.device)
    if task.dense:
        pixel_values = PatchFrame.of(pixel_values.shape[-2:], backbone.config).pad(pixel_values)
    return task.features(normed_state(backbone, pixel_values))


class StoredFeatures(Dataset):
    """Features and targets in two memory-mapped files; row r is image r mod n.

    Args:
        folder: made by `store_features`.
        image_ids: of the images to take; default: all that could be read.
    """

    def __init__(self, folder: Path, image_ids: np.ndarray | None = None):
        self.folder = folder
        self.features = np.load(folder / "features.npy", mmap_mode="r")
        self.targets = np.load(folder / "targets.npy", mmap_mode="r")
        stored = np.array(read_json(folder / "complete.json")["image_ids"])  # −1: unreadable
        kept_rows = stored >= 0 if image_ids is None else np.isin(stored, image_ids)
        self.rows, self.image_ids = np.flatnonzero(kept_rows), stored[kept_rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch of `features`, `target` and `image_id`."""
        positions = np.asarray(rows) % len(self)
        target = torch.from_numpy(self.targets[self.rows[positions]])
        return {
            "features": torch.from_numpy(self.features[self.rows[positions]]),
            "target": target.long() if target.dtype == torch.uint8 else target,
            "image_id": torch.from_numpy(self.image_ids[positions]),
        }

    def subset(self, image_ids: np.ndarray) -> "StoredFeatures":
        """Return some of the images, without those that could not be read."""
        return StoredFeatures(self.folder, image_ids)

    def batches(self, batch_size: int, *, share: bool = False) -> Iterator[dict]:
        """Yield all rows in order, the last batch as ragged as it comes; or this process' share."""
        state = process_state()
        first, step = (state.process_index, state.num_processes) if share else (0, 1)
        rows = list(range(first, len(self), step))
        for start in range(0, len(rows), batch_size):
            yield self.__getitems__(rows[start : start + batch_size])


def store_features(
    folder: str | Path,
    backbone: PreTrainedModel,
    task: Task,
    images: ProbeImages,
    *,
    batch_size: int,
    num_workers: int = 0,
) -> StoredFeatures:
    """Compute features with all processes together, unless the folder holds them already.

    Args:
        folder: where features are kept; each (model, task, images) has a folder of its own in it,
            which gets its name when it is complete.
        num_workers: processes that read images ahead.

    Raises:
        OSError: the disk is too small.
        ValueError: an image that can't be read.
    """
    state = process_state()
    folder = Path(folder) / _features_key(backbone, task, images)
    if not (folder / "complete.json").exists():
        unfinished = folder.with_name(folder.name + ".unfinished")
        files = None
        if state.is_main_process:
            first = first_batch(images)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            files = _create_files(unfinished, len(images), backbone, task, first)
        state.wait_for_everyone()
        files = files or [np.load(unfinished / f"{n}.npy", mmap_mode="r+") for n in _FILES]
        written = gather_object(_write_rows(files, backbone, task, images, batch_size, num_workers))
        if state.is_main_process:
            readable = np.isin(np.arange(len(images)), written)
            image_ids = np.where(readable, images.image_ids, -1).tolist()
            write_json(unfinished / "complete.json", {"image_ids": image_ids})
            os.replace(unfinished, folder)
        state.wait_for_everyone()
    return StoredFeatures(folder)


def _write_rows(
    files, backbone, task: Task, images: ProbeImages, batch_size: int, num_workers: int
) -> list[int]:
    """Write features and targets of this process' share; return the rows that could be read."""
    row_of = {image_id: row for row, image_id in enumerate(images.image_ids.tolist())}
    written = []
    for batch in batches(images, batch_size, "features", num_workers=num_workers):
        rows = np.array([row_of[image_id] for image_id in batch["image_id"].tolist()])
        write_batch(files, rows, backbone, task, batch)
        written += rows.tolist()
    for file in files:
        file.flush()
    return written


def write_batch(files, rows: np.ndarray, backbone, task: Task, batch: dict) -> None:
    """Write features and targets of a batch to their rows of the files.

    Raises:
        ValueError: images of another size than the first ones.
    """
    check_one_size({tuple(batch["target"].shape[1:]), files[1].shape[1:]})
    files[0][rows] = backbone_features(backbone, task, batch["pixel_values"]).float().cpu().numpy()
    files[1][rows] = batch["target"].numpy()


def _create_files(folder, number: int, backbone, task: Task, batch: dict) -> list[np.memmap]:
    """Return the empty files for features (float32) and targets as large as those of a batch."""
    features = backbone_features(backbone, task, batch["pixel_values"][:1])
    target = batch["target"]
    # classes of pixels fit into a byte (`IGNORED` is 255); labels and metres stay as they are
    small = target.ndim > 1 and not target.is_floating_point()
    kinds = ("float32", "uint8" if small else str(target.numpy().dtype))
    shapes = ((number, *features.shape[1:]), (number, *target.shape[1:]))
    needed = sum(int(np.prod(s)) * np.dtype(k).itemsize for s, k in zip(shapes, kinds, strict=True))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"Features of {number:,} images need {needed / 1e9:.3g} GB in {folder.parent}; only "
            f"{free / 1e9:.3g} GB are free. Choose another --features_dir."
        )
    return [
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape)
        for name, kind, shape in zip(_FILES, kinds, shapes, strict=True)
    ]


def _features_key(backbone: PreTrainedModel, task: Task, images: ProbeImages) -> str:
    """Return a name for features: other weights, files, sizes or preprocessing give another one."""
    config = {k: v for k, v in backbone.config.to_dict().items() if k != "_name_or_path"}
    facts = {
        "weights": weights_digest(backbone),
        "config": config,
        "task": task.name,
        "resolution": images.resolution,
        "processor": images.processor.to_dict(),
        "rows": hashlib.sha256(images.image_ids.tobytes()).hexdigest(),
        "images": images.images.files.digest,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    return f"{task.name}_{digest.hexdigest()[:16]}"
