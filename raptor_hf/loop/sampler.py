"""Which images a process sees at which step: the same batches whatever the number of processes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BatchShare:
    """A process' share of every batch, in parts that are computed one after the other.

    Shares differ by at most one image, and so do parts; gradients are weighted by their images, so
    the mean over a batch is the same for every number of processes and parts.

    Args:
        batch_size: images of a step, over all processes.
        num_processes: that share it.
        process_index: which of them this is.
        num_parts: forward and backward passes of each before an optimiser step.

    Raises:
        ValueError: fewer images than processes, or than parts.
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

    @classmethod
    def of_at_most(
        cls, batch_size: int, *, largest_part: int, least_parts: int, **processes: int
    ) -> "BatchShare":
        """Return the share with the fewest parts: `least_parts`, or more if one is too large.

        Args:
            largest_part: images of a part, at most; 0: no limit.
        """
        if largest_part < 0:
            raise ValueError(f"per_device_batch_size must be 0 or more; got {largest_part}.")
        share = math.ceil(batch_size / processes["num_processes"])
        parts = math.ceil(share / largest_part) if largest_part else 1
        return cls(batch_size, num_parts=max(parts, least_parts), **processes)

    def split(self, rows: np.ndarray) -> list[list[int]]:
        """Return the parts of this process of a batch of rows."""
        own_rows = np.array_split(rows, self.num_processes)[self.process_index]
        return [part.tolist() for part in np.array_split(own_rows, self.num_parts)]

    def weights(self) -> list[float]:
        """Return what share of a whole batch each part of this process is."""
        return [len(part) / self.batch_size for part in self.split(np.arange(self.batch_size))]

    @property
    def largest_part(self) -> int:
        """Images of the largest part of any process."""
        return math.ceil(math.ceil(self.batch_size / self.num_processes) / self.num_parts)

    def __str__(self) -> str:
        factors = [f"{self.num_processes} process{'es' if self.num_processes > 1 else ''}"]
        factors += [f"{self.num_parts} accumulated parts"] * (self.num_parts > 1)
        even = self.num_processes * self.num_parts * self.largest_part == self.batch_size
        factors += [f"{'' if even else 'at most '}{self.largest_part} images"]
        return f"{self.batch_size} images a step: {' × '.join(factors)}"


class StepSampler:
    """Row numbers for the steps first … steps − 1: shuffled epochs without their ragged ends.

    It gives this process' parts of every batch, one after the other. With `new_views` the n rows
    are numbered on from epoch to epoch, e·n … (e + 1)·n − 1.

    Raises:
        ValueError: fewer rows than a batch.
    """

    drop_last = True

    def __init__(
        self,
        num_rows: int,
        share: BatchShare,
        *,
        seed: int,
        first: int,
        steps: int,
        new_views: bool = False,
    ):
        if num_rows < share.batch_size:
            raise ValueError(
                f"A batch of {share.batch_size} needs at least as many rows; "
                f"the dataset has {num_rows}."
            )
        self.num_rows, self.share, self.seed = num_rows, share, seed
        self.first, self.steps, self.new_views = first, steps, new_views

    def __len__(self) -> int:
        return (self.steps - self.first) * self.share.num_parts

    def __iter__(self) -> Iterator[list[int]]:
        batch_size = self.share.batch_size
        batches = self.num_rows // batch_size
        shuffled_epoch = None
        for step in range(self.first, self.steps):
            epoch, batch = divmod(step, batches)
            if epoch != shuffled_epoch:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
                order += self.new_views * epoch * self.num_rows
                shuffled_epoch = epoch
            yield from self.share.split(order[batch * batch_size : (batch + 1) * batch_size])
