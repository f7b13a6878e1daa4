"""The batches of a training: the same whatever the number of processes, read ahead by workers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from ..data import keep_batch
from ..runs.files import read_json, write_json
from ..runs.processes import ignore_stop_signals
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
                f"A batch of {self.batch_size} images can't be shared by {self.num_processes} "
                f"processes in {self.num_parts} parts each, at least one image a part. Take a "
                "larger --batch_size, or fewer processes, or a larger --per_device_batch_size."
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
        parts = f" × {self.num_parts} accumulated parts" if self.num_parts > 1 else ""
        even = self.num_processes * self.num_parts * self.largest_part == self.batch_size
        return (
            f"{self.batch_size} images a step: {self.num_processes} process"
            f"{'es' if self.num_processes > 1 else ''}{parts} × "
            f"{'' if even else 'at most '}{self.largest_part} images"
        )


class StepSampler:
    """Row numbers for the steps first … steps − 1: shuffled epochs, incomplete batches dropped.

    It yields this process' parts of every batch, one after the other. With `new_views` the n rows
    are numbered on from epoch to epoch, e·n … (e + 1)·n − 1.

    Raises:
        ValueError: fewer rows than a batch.
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
        if num_rows < share.batch_size:
            raise ValueError(
                f"A batch of {share.batch_size} needs at least as many rows; "
                f"the dataset has {num_rows}."
            )
        self.num_rows, self.share, self.seed = num_rows, share, arguments.seed
        self.first, self.steps, self.new_views = first, arguments.steps, new_views

    def __len__(self) -> int:
        return (self.steps - self.first) * self.share.num_parts

    def __iter__(self) -> Iterator[list[int]]:
        batch_size, shuffled_epoch = self.share.batch_size, None
        for step in range(self.first, self.steps):
            epoch, batch = divmod(step, self.num_rows // batch_size)
            if epoch != shuffled_epoch:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
                order += self.new_views * epoch * self.num_rows
                shuffled_epoch = epoch
            yield from self.share.split(order[batch * batch_size : (batch + 1) * batch_size])


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
        self.dataset, self.accelerator = dataset, accelerator
        self.num_parts = sampler.share.num_parts
        self.path = Path(arguments.output_dir) / "skipped_images.json"
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
        self.parts: Iterator[dict] = iter(self.loader)
        return self

    def __exit__(self, *_) -> None:
        if hasattr(self.parts, "_shutdown_workers"):  # there is no public way
            self.parts._shutdown_workers()

    def __next__(self) -> list[dict[str, torch.Tensor]]:
        parts = list(islice(self.parts, self.num_parts))
        for part in parts:
            self.skipped.update(part.pop("skipped", torch.empty(0)).tolist())
        return parts

    def list_skipped(self) -> None:
        """Add the images that were skipped so far to `skipped_images.json`."""
        image_ids = set(gather_object(sorted(self.skipped)))
        if not image_ids or not self.accelerator.is_main_process:
            return
        before = read_json(self.path)["images"] if self.path.exists() else []
        listed = {entry["image_id"]: entry for entry in before}
        for image_id in image_ids:
            listed[image_id] = {"image_id": image_id, "path": self.dataset.public_path(image_id)}
        write_json(self.path, {"images": [listed[image_id] for image_id in sorted(listed)]})
