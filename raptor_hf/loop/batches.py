"""The batches of a training: the same whatever the number of processes, read ahead by workers."""

from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from ..data import keep_batch
from ..data.batching import init_worker
from ..runs.processes import StopSignals, ignore_stop_signals
from .arguments import LoopArguments

_PATIENCE = 5  # seconds without a batch, until a stop signal ends the wait


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

    def parts(self, step: int) -> list[list[int]]:
        """Return the rows of this process' parts of a step."""
        epoch, batch = divmod(step, self.num_rows // self.batch_size)
        if epoch != self.shuffled_epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
            self.order = order + self.new_views * epoch * self.num_rows
            self.shuffled_epoch = epoch
        return self._split(self.order[batch * self.batch_size : (batch + 1) * self.batch_size])

    def weights(self) -> list[float]:
        """Return the share of a whole batch that each part of this process is."""
        return [len(part) / self.batch_size for part in self._split(np.arange(self.batch_size))]

    def _split(self, rows: np.ndarray) -> list[list[int]]:
        """Return the parts of this process of a batch of rows."""
        own_rows = np.array_split(rows, self.num_processes)[self.process_index]
        return [part.tolist() for part in np.array_split(own_rows, self.num_parts)]


class StepBatches:
    """Iterates over steps: a list of this process' parts of each batch. A context manager.

    The list is empty where a stop signal came while the batch was waited for. Leaving the context
    ends the workers: they ignore stop signals, so Python would wait for them for ever at its exit.

    Args:
        dataset: map-style; `__getitems__(rows)` returns a batch, a dict of tensors.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: StepSampler,
        arguments: LoopArguments,
        accelerator: Accelerator,
        signals: StopSignals,
    ):
        self.dataset, self.sampler, self.signals = dataset, sampler, signals
        self.loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=keep_batch,
            num_workers=arguments.num_workers,
            worker_init_fn=_init_worker,
            pin_memory=accelerator.device.type == "cuda",
            timeout=_PATIENCE if arguments.num_workers else 0,
        )

    def __enter__(self) -> "StepBatches":
        self.loaded: Iterator[dict] = iter(self.loader)
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        if not self.loader.num_workers:
            return
        self.loaded._shutdown_workers()  # there is no public way
        for worker in self.loaded._workers:  # one that is stuck
            worker.kill()
        ended = any(text in str(error) for text in ("exited unexpectedly", "killed by signal"))
        if ended or isinstance(error, ConnectionError):
            raise OSError(
                "A worker of the DataLoader ended; its error is above. If shared memory is full: "
                "fewer --num_workers, or docker run --shm-size 8g."
            ) from error

    def __next__(self) -> list[dict[str, torch.Tensor]]:
        parts = []
        while len(parts) < self.sampler.num_parts:
            try:
                parts.append(next(self.loaded))
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                # other processes wait for this one in a step: they can't stop before it
                if self.signals.received and self.sampler.num_processes == 1:
                    return []
        return parts

    def read_again(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Return this process' parts of a step, read without workers."""
        return [self.dataset.__getitems__(rows) for rows in self.sampler.parts(step)]


def _init_worker(_worker: int) -> None:
    """Ignore stop signals, which the reading process handles; end if a batch can't be sent."""
    ignore_stop_signals()
    init_worker(_worker)
