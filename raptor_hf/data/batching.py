"""Batches of a dataset, shared out among the processes of a run."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.queues import Queue

import torch
from torch.utils.data import DataLoader, Dataset

from ..runs.processes import process_state, progress_bar


def keep_batch(batch: dict) -> dict:
    """Collate function for datasets that return whole batches (`__getitems__`)."""
    return batch


def init_worker(_worker: int) -> None:
    """Let a worker of a DataLoader end if it can't send a batch: its reader would wait for ever.

    It must not ignore SIGTERM: a reader that fails ends its workers by it, and waits for them.
    """

    def end(error: Exception, _batch: object) -> None:
        hint = "If shared memory is full: fewer --num_workers, or docker run --shm-size 8g."
        try:
            print(f"A batch can't be handed over: {error}. {hint}", file=sys.stderr, flush=True)
        finally:
            time.sleep(2)  # the batches before it are still fetched from this process
            os._exit(1)

    Queue._on_queue_feeder_error = staticmethod(end)


def batch_loader(
    dataset: Dataset,
    batches: Iterable,
    num_workers: int,
    *,
    worker_init: Callable[[int], None] = init_worker,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of batches, each a sequence of rows, which workers read ahead."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=keep_batch,
        num_workers=num_workers,
        worker_init_fn=worker_init,
        pin_memory=pin_memory,
    )


def batches(
    dataset: Dataset,
    batch_size: int,
    description: str | None,
    *,
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this process' share of a dataset in whole batches, with a progress bar.

    Args:
        description: of the progress bar; None: no bar.
        rows: the rows to read, in this order; default: all. The last batch may be smaller.
        num_workers: processes that read ahead.
    """
    # batch i of all goes to process i mod P
    state = process_state()
    if rows is None:
        rows = range(len(dataset))
    starts = range(state.process_index * batch_size, len(rows), state.num_processes * batch_size)
    shares = [list(rows[start : start + batch_size]) for start in starts]
    loader = batch_loader(dataset, shares, num_workers)
    total = sum(map(len, shares))
    shown = description is not None and state.is_main_process
    with progress_bar(description, total, unit="image", enabled=shown, leave=False) as bar:
        for share, batch in zip(shares, loader, strict=True):
            yield batch
            bar.update(len(share))
