"""The batches of a training: the same whatever the number of processes, read ahead by workers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from ..data import keep_batch
from ..runs.files import read_json, write_json
from ..runs.processes import ignore_stop_signals, process_state
from .arguments import LoopArguments


@dataclass(frozen=True)
class BatchShare:
    """A process' share of every batch, in parts that are computed one after the other.

    Shares differ by at most one image, and so do parts; gradients are weighted by their images, so
    the mean over a batch is the same for every number of processes and parts.

    Args:
        batch_size: images of a step, over all processes.
        num_processes: they share the batch.
        process_index: the number of this process.
        num_parts: forward and backward passes of each process before an update.

    Raises:
        ValueError: fewer images than processes times parts.
    """

    batch_size: int
    num_processes: int = 1
    process_index: int = 0
    num_parts: int = 1

    def __post_init__(self):
        if self.num_processes * self.num_parts > self.batch_size:
            raise ValueError(
                f"{self.num_processes} processes with {self.num_parts} parts each can't share a "
                f"batch of {self.batch_size} images: take a larger --batch_size."
            )

    def split(self, rows: np.ndarray) -> list[list[int]]:
        """Return the parts of this process of a batch of rows."""
        own_rows = np.array_split(rows, self.num_processes)[self.process_index]
        return [part.tolist() for part in np.array_split(own_rows, self.num_parts)]

    def weights(self) -> list[float]:
        """Return the share of a whole batch that each part of this process is."""
        return [len(part) / self.batch_size for part in self.split(np.arange(self.batch_size))]

    @property
    def largest_part(self) -> int:
        """Images of the largest part of any process."""
        return math.ceil(math.ceil(self.batch_size / self.num_processes) / self.num_parts)

    def __str__(self) -> str:
        return (
            f"{self.batch_size} images a step, in {self.num_processes} processes of "
            f"{self.num_parts} parts of at most {self.largest_part} images"
        )


class StepSampler:
    """Row numbers for the steps first … steps − 1: shuffled epochs, incomplete batches dropped.

    It yields this process' parts of every batch, one after the other. With `new_views` the n rows
    are numbered on from epoch to epoch, e·n … (e + 1)·n − 1.
    """

    drop_last = True

    def __init__(
        self,
        num_rows: int,
        share: BatchShare,
        arguments: LoopArguments,
        *,
        first: int = 0,
        new_views: bool = False,
    ):
        self.num_rows, self.share, self.seed = num_rows, share, arguments.seed
        self.first, self.steps, self.new_views = first, arguments.steps, new_views
        self.shuffled_epoch = -1

    def __len__(self) -> int:
        return (self.steps - self.first) * self.share.num_parts

    def parts(self, step: int) -> list[list[int]]:
        """Return the rows of this process' parts of a step."""
        batch_size = self.share.batch_size
        epoch, batch = divmod(step, self.num_rows // batch_size)
        if epoch != self.shuffled_epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
            self.order = order + self.new_views * epoch * self.num_rows
            self.shuffled_epoch = epoch
        return self.share.split(self.order[batch * batch_size : (batch + 1) * batch_size])

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            yield from self.parts(step)


class StepBatches:
    """Iterates over steps: a list of this process' parts of each batch. A context manager.

    Leaving the context ends the workers. They ignore stop signals, so Python would wait for them
    for ever when it exits.

    Args:
        dataset: map-style; `__getitems__(rows)` returns a batch, a dict of tensors, perhaps with
            `skipped`, the ids of images that can't be read.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: StepSampler,
        arguments: LoopArguments,
        accelerator: Accelerator,
    ):
        self.dataset, self.sampler = dataset, sampler
        self.skipped: set[int] = set()
        self.loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=keep_batch,
            num_workers=arguments.num_workers,
            worker_init_fn=ignore_stop_signals,
            pin_memory=accelerator.device.type == "cuda",
        )

    def __enter__(self) -> "StepBatches":
        self.loaded: Iterator[dict] = iter(self.loader)
        return self

    def __exit__(self, *_) -> None:
        if hasattr(self.loaded, "_shutdown_workers"):  # there is no public way
            self.loaded._shutdown_workers()

    def __next__(self) -> list[dict[str, torch.Tensor]]:
        parts = [next(self.loaded) for _ in range(self.sampler.share.num_parts)]
        for part in parts:
            self.skipped.update(part.pop("skipped", torch.empty(0)).tolist())
        return parts

    def read_again(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Return this process' parts of a step, read without workers."""
        parts = [self.dataset.__getitems__(rows) for rows in self.sampler.parts(step)]
        for part in parts:
            part.pop("skipped", None)
        return parts

    def list_skipped(self, output_dir: str | Path) -> None:
        """Add the images that were skipped so far to `skipped_images.json`."""
        image_ids = set(gather_object(sorted(self.skipped)))
        if not image_ids or not process_state().is_main_process:
            return
        path = Path(output_dir) / "skipped_images.json"
        listed = {} if not path.exists() else {e["image_id"]: e for e in read_json(path)["images"]}
        for image_id in image_ids:
            listed[image_id] = {"image_id": image_id, "path": self.dataset.public_path(image_id)}
        write_json(path, {"images": [listed[image_id] for image_id in sorted(listed)]})
