"""The batches of a training: the same whatever the number of processes, read ahead by workers."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from ..data.batching import batch_loader, init_worker
from ..runs.processes import ignore_stop_signals
from .arguments import LoopArguments


class Rows(list):
    """The row numbers of a part of a batch; `step`, that of the batch, reaches the workers too."""

    def __init__(self, rows: list[int], step: int):
        super().__init__(rows)
        self.step = step


class StepSampler:
    """Row numbers for the steps first … steps − 1: shuffled epochs, incomplete batches dropped.

    It yields this process' parts of every batch, one after the other. The parts differ by at most
    one image, and gradients are weighted by images, so the mean over a batch is the same for every
    number of processes and parts.

    Args:
        num_rows: of the dataset.
        new_views: number the n rows on from epoch to epoch, e·n … (e + 1)·n − 1.

    Raises:
        ValueError: fewer images in a batch than processes times parts.
    """

    def __init__(
        self,
        num_rows: int,
        arguments: LoopArguments,
        accelerator: Accelerator,
        *,
        first: int = 0,
        new_views: bool = False,
    ):
        self.num_rows, self.batch_size = num_rows, arguments.batch_size
        self.seed, self.first, self.steps = arguments.seed, first, arguments.steps
        self.num_processes = accelerator.num_processes
        self.process_index = accelerator.process_index
        self.num_parts = accelerator.gradient_accumulation_steps
        self.new_views, self.shuffled_epoch = new_views, -1
        if self.num_processes * self.num_parts > self.batch_size:
            raise ValueError(
                f"{self.num_processes} processes with {self.num_parts} parts each can't share a "
                f"batch of {self.batch_size} images: take a larger --batch_size."
            )

    def __len__(self) -> int:
        return (self.steps - self.first) * self.num_parts

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            yield from self.parts(step)

    def parts(self, step: int) -> list[Rows]:
        """Return the rows of this process' parts of a step."""
        epoch, batch = divmod(step, self.num_rows // self.batch_size)
        if epoch != self.shuffled_epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
            self.order = order + self.new_views * epoch * self.num_rows
            self.shuffled_epoch = epoch
        rows = self.order[batch * self.batch_size : (batch + 1) * self.batch_size]
        own_rows = np.array_split(rows, self.num_processes)[self.process_index]
        return [Rows(part.tolist(), step) for part in np.array_split(own_rows, self.num_parts)]


@contextmanager
def open_batches(
    dataset: Dataset, sampler: StepSampler, arguments: LoopArguments, accelerator: Accelerator
) -> Iterator[Iterator[dict[str, torch.Tensor]]]:
    """Iterate over this process' parts of all batches, one after the other.

    Args:
        dataset: map-style; `__getitems__(rows)` returns a batch, a dict of tensors.
    """
    options = {"worker_init": _init_worker, "pin_memory": accelerator.device.type == "cuda"}
    loader = batch_loader(dataset, sampler, arguments.num_workers, **options)
    loaded = iter(loader)
    try:
        yield loaded
    finally:
        # workers ignore stop signals: Python would wait for them for ever at its exit
        if arguments.num_workers:
            loaded._shutdown_workers()  # there is no public way
            for worker in loaded._workers:  # one that still reads
                worker.kill()


def _init_worker(_worker: int) -> None:
    """Ignore stop signals, which the reading process handles; end if a batch can't be sent."""
    ignore_stop_signals()
    init_worker(_worker)
