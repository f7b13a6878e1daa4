"""What a step tells of itself, without making the processor wait for the device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator


class StepResult(NamedTuple):
    """What `compute_loss` tells `fit` of a batch.

    Args:
        loss: the mean over the batch's images, to be minimised.
        scalars: for the log, means over the images too.
        statistics: functions that give rows for `RSquared`, by name; called when R² is logged.
    """

    loss: torch.Tensor
    scalars: dict[str, torch.Tensor] = {}
    statistics: dict[str, Callable[[], dict]] = {}

    def detached(self) -> "StepResult":
        """Return the same without what autograd keeps."""
        scalars = {name: value.detach() for name, value in self.scalars.items()}
        return StepResult(self.loss.detach(), scalars, self.statistics)


class StepNumbers:
    """The scalars of a step, and the stop signals, the same in all processes.

    A collective call at every step, so that all stop after the same one.

    Args:
        stop: a signal that this process received.
        scalars: shares of the sum over all processes, best on the device; one is `loss`.
    """

    def __init__(
        self, accelerator: Accelerator, stop: int | None, scalars: dict[str, torch.Tensor]
    ):
        device = accelerator.device
        values = [torch.full((), float(stop or 0), device=device), *scalars.values()]
        rows = accelerator.gather(torch.stack([value.to(device) for value in values])[None])
        self.names = list(scalars)
        self.stop, self.sums = rows[:, 0].max(), rows[:, 1:].sum(dim=0)
        self.loss = self.sums[self.names.index("loss")]

    def send(self, *, left_out: torch.Tensor) -> None:
        """Send the numbers on their way, with one more: whether the update was left out."""
        values = torch.cat([torch.stack([self.stop, left_out.to(self.stop)]), self.sums])
        on_cuda = values.device.type == "cuda"
        self.values = values.to("cpu", non_blocking=on_cuda)
        self.arrived = torch.cuda.Event() if on_cuda else None
        if on_cuda:
            self.arrived.record()

    def read(self) -> tuple[int, bool, dict[str, float]]:
        """Wait for the numbers.

        Returns:
            The stop signal (0: none), whether the update was left out, the scalars.
        """
        if self.arrived:
            self.arrived.synchronize()
        stop, left_out, *sums = self.values.tolist()
        return int(stop), bool(left_out), dict(zip(self.names, sums, strict=True))
