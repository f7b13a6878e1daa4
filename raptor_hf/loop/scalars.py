"""Per-step scalars, copied to the host asynchronously, and the checks for NaN and infinity."""

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn

from .checkpoints import newest_checkpoint


class StepResult(NamedTuple):
    """The result of `compute_loss` for a batch.

    Args:
        loss: mean over the batch's images, to be minimised.
        scalars: for the log, means over the images too.
        statistics: functions that return rows for `RSquared`, by name; called when R² is logged.
        explain: returns in words where the first value is not finite; called if the loss is not.
    """

    loss: torch.Tensor
    scalars: dict[str, torch.Tensor] = {}
    statistics: dict[str, Callable[[], dict]] = {}
    explain: Callable[[], str | None] | None = None

    def detached(self) -> "StepResult":
        """Return the result without its graph of gradients."""
        scalars = {name: value.detach() for name, value in self.scalars.items()}
        return StepResult(self.loss.detach(), scalars, self.statistics)


class StepScalars:
    """The scalars of a step: added up over the parts of a batch, then over the processes."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.statistics: list[dict[str, dict]] = []

    def add(self, result: StepResult, weight: float, *, logging: bool) -> None:
        """Add the result of a part that is `weight` of the whole batch.

        Args:
            logging: R² is logged after this step, so keep the rows that it needs.
        """
        for name, value in {"loss": result.loss, **result.scalars}.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value.float()
        if logging:
            self.statistics.append({name: rows() for name, rows in result.statistics.items()})

    def gather(self, accelerator: Accelerator, stop_signal: int | None) -> torch.Tensor:
        """Add up over the processes; return the loss.

        Also tells all processes of a stop signal that one received, so that all stop after the
        same step.
        """
        signal = torch.full((), float(stop_signal or 0), device=accelerator.device)
        row = torch.stack([signal, *(value.to(signal.device) for value in self.sums.values())])
        rows = accelerator.gather(row[None])
        self.stop_signal, self.totals = rows[:, 0].max(), rows[:, 1:].sum(dim=0)
        return self.totals[list(self.sums).index("loss")]

    def send(self, found_inf: torch.Tensor) -> None:
        """Start the copy to the host, together with `found_inf` of the update."""
        values = torch.cat([torch.stack([self.stop_signal, found_inf]), self.totals])
        on_cuda = values.device.type == "cuda"
        self.values = values.to("cpu", non_blocking=on_cuda)
        self.arrived = torch.cuda.Event() if on_cuda else None
        if on_cuda:
            self.arrived.record()

    def read(self) -> tuple[int, bool, dict[str, float]]:
        """Wait for the copy; return the stop signal (0: none), `found_inf` and the scalars."""
        if self.arrived:
            self.arrived.synchronize()
        stop_signal, found_inf, *totals = self.values.tolist()
        return int(stop_signal), bool(found_inf), dict(zip(self.sums, totals, strict=True))


class StepMonitor:
    """Reads the scalars of a step while the next one runs; stops at values that are not finite.

    Args:
        compute_loss: (module, batch, progress) to a `StepResult`; called again for a step that
            failed.
        steps: of the whole training.

    Attributes:
        scalars: of the last step that was read.
        stop_signal: the first signal that any process received; 0: none.
    """

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, compute_loss: Callable, steps: int
    ):
        self.accelerator, self.module = accelerator, module
        self.compute_loss, self.steps = compute_loss, steps
        self.pending: deque[tuple[int, StepScalars, list[dict]]] = deque()
        self.scalars: dict[str, float] = {}
        self.stop_signal = 0

    def add(self, step: int, scalars: StepScalars, batches: list[dict]) -> None:
        """Queue the scalars of a step, with this process' batches of it for an error message."""
        self.pending.append((step, scalars, batches))

    def read(self, *, leave: int = 0) -> None:
        """Read the queued scalars, except for those of the newest `leave` steps.

        Raises:
            FloatingPointError: a loss or a gradient is NaN or infinite, in all processes.
        """
        while len(self.pending) > leave:
            step, scalars, batches = self.pending.popleft()
            stop_signal, found_inf, self.scalars = scalars.read()
            self.stop_signal = self.stop_signal or stop_signal
            if found_inf:
                self._raise_not_finite(step, batches)

    def _raise_not_finite(self, step: int, batches: list[dict]) -> None:
        """Raise an error with the step, its images and the first value that is not finite."""
        # compute the step again, and ask what went wrong in it
        reasons, images = [], []
        for batch in send_to_device(batches, self.accelerator.device):
            with torch.no_grad():
                explain = self.compute_loss(self.module, batch, step / self.steps).explain
            reasons.append(explain() if explain else None)
            images += batch["image_id"].tolist() if "image_id" in batch else []
        reasons = dict.fromkeys(filter(None, gather_object(reasons)))
        images = ", ".join(map(str, gather_object(images)))

        loss, folder = self.scalars["loss"], Path(self.accelerator.project_dir)
        finding = "A gradient is not finite" if math.isfinite(loss) else f"The loss is {loss}"
        reason = f": {'; '.join(reasons)}" if reasons else ""
        newest = newest_checkpoint(folder)
        kept = f"{newest.name}, from before this step" if newest else "no checkpoint"
        raise FloatingPointError(
            f"{finding} at step {step}{reason} (images {images or 'unknown'}). Start again in "
            "another --output_dir with a smaller --learning_rate or more --warmup_steps. "
            f"{folder} holds {kept}."
        )
