"""Forward and backward pass of a step, recorded as a CUDA graph once and replayed from then on.

A step of a small model is hundreds of kernels of a few microseconds each: the processor takes
longer to ask for them than a GPU to run them. What is recorded is asked for in one call.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import nn

_PLAIN_STEPS = 3  # of a kind, before it is recorded: they compile, and allocate


class _Recorded(NamedTuple):
    """A graph, the tensors that it reads a batch from, and what it leaves behind."""

    graph: "torch.cuda.CUDAGraph"
    batch: dict[str, torch.Tensor]
    result: object
    gradients: list[torch.Tensor | None]


class StepGraphs:
    """A function that computes gradients, as one CUDA graph for each kind of step.

    Args:
        learn: (batch, progress) to what `fit` needs of a step; leaves the gradients in the
            parameters, whose gradients were None before.
        kind: (progress) to what `learn` depends on beside the batch; None for a step that draws
            random numbers, which is never recorded.
        parameters: that get gradients.
    """

    def __init__(
        self,
        learn: Callable[[dict, float], object],
        kind: Callable[[float], Hashable | None],
        parameters: list[nn.Parameter],
    ):
        self.learn, self.kind, self.parameters = learn, kind, parameters
        self.seen: Counter = Counter()
        self.recorded: dict[Hashable, _Recorded] = {}
        self.pool = None

    def __call__(self, batch: dict[str, torch.Tensor], progress: float) -> object:
        """Return what `learn` does; a recorded result lies where the one before it was.

        Raises:
            RuntimeError: the step does something that can't be recorded, such as to wait.
        """
        kind = self.kind(progress)
        if kind is None:
            return self.learn(batch, progress)
        key = kind, tuple((name, value.shape, value.dtype) for name, value in batch.items())
        self.seen[key] += 1
        if self.seen[key] <= _PLAIN_STEPS:
            return self.learn(batch, progress)
        if key not in self.recorded:
            self.recorded[key] = self._record(batch, progress)
        recorded = self.recorded[key]
        for name, values in batch.items():
            recorded.batch[name].copy_(values, non_blocking=True)
        recorded.graph.replay()
        for parameter, gradient in zip(self.parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        return recorded.result

    def _record(self, batch: dict[str, torch.Tensor], progress: float) -> _Recorded:
        """Record a step without running it."""
        graph, batch = torch.cuda.CUDAGraph(), {name: v.clone() for name, v in batch.items()}
        self.pool = self.pool or torch.cuda.graph_pool_handle()  # kinds never run side by side
        try:
            # other threads may allocate meanwhile: a DataLoader's, which pins memory
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = self.learn(batch, progress)
        except RuntimeError as error:
            raise RuntimeError(
                f"This step can't be recorded as a CUDA graph: {error}\nRun the same command with "
                "--cuda_graphs False and --resume."
            ) from error
        return _Recorded(graph, batch, result, [p.grad for p in self.parameters])
