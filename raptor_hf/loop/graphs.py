"""Forward and backward pass of a step, recorded as a CUDA graph once and replayed from then on.

A step of a small model is hundreds of kernels of a few microseconds each: the host takes longer to
launch them than a GPU to run them. A graph is launched by one call.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

_PLAIN_STEPS = 3  # of a kind, before one is recorded: they compile and allocate


def can_record(accelerator: Accelerator, model: nn.Module) -> bool:
    """Return whether steps can be CUDA graphs: one GPU, whole batches, no checkpointing."""
    whole = accelerator.num_processes == accelerator.gradient_accumulation_steps == 1
    on_gpu = accelerator.device.type == "cuda" and accelerator.scaler is None
    # gradient checkpoints ask for the random state, which is forbidden while recording
    checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    return whole and on_gpu and not checkpointed


class _Recorded(NamedTuple):
    """A graph, the tensors that it reads a batch from, its result and its gradients."""

    graph: "torch.cuda.CUDAGraph"
    batch: dict[str, torch.Tensor]
    result: object
    gradients: list[torch.Tensor | None]


class StepGraphs:
    """Calls a function that computes gradients, as one CUDA graph for each kind of step.

    Args:
        backward: (batch, progress) to the result of a step; leaves the gradients in the parameters,
            whose gradients were None before.
        kind: (progress) to the properties that `backward` depends on beside the batch. It must draw
            no random numbers.
        parameters: those that get gradients.
    """

    def __init__(
        self,
        backward: Callable[[dict, float], object],
        kind: Callable[[float], Hashable],
        parameters: list[nn.Parameter],
    ):
        self.backward, self.kind, self.parameters = backward, kind, parameters
        self.seen: Counter = Counter()
        self.recorded: dict[Hashable, _Recorded] = {}
        self.pool = None

    def __call__(self, batch: dict[str, torch.Tensor], progress: float) -> object:
        """Return the result of `backward`; a replay overwrites the result before it."""
        # the first steps of a kind run as they are
        shapes = tuple((name, value.shape, value.dtype) for name, value in batch.items())
        key = (self.kind(progress), shapes)
        self.seen[key] += 1
        if self.seen[key] <= _PLAIN_STEPS:
            return self.backward(batch, progress)

        # record the step once; then copy the batch in, replay, and hand out the gradients
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
        # other threads may allocate meanwhile: a DataLoader's, which pins memory
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = self.backward(batch, progress)
        return _Recorded(graph, batch, result, [p.grad for p in self.parameters])
