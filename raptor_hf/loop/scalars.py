"""Scalars of a step and the check for NaN and infinity: on the device, until they are logged."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from .batches import StepSampler
from .checkpoints import newest_checkpoint


class StepResult(NamedTuple):
    """The result of `compute_loss` for a batch.

    Args:
        loss: mean over the batch's images, to be minimised.
        scalars: for the log, means over the images too.
        statistics: functions that return rows for `RSquared`, by name; called when R² is logged.
    """

    loss: torch.Tensor
    scalars: dict[str, torch.Tensor] = {}
    statistics: dict[str, Callable[[], dict]] = {}

    def detached(self) -> "StepResult":
        """Return the result without its graph of gradients."""
        scalars = {name: value.detach() for name, value in self.scalars.items()}
        return StepResult(self.loss.detach(), scalars, self.statistics)


class StepScalars:
    """The scalars of a step, added up over the parts of a batch.

    Args:
        logging: they are logged, and so the rows for R² are kept.
    """

    def __init__(self, *, logging: bool):
        self.logging = logging
        self.sums: dict[str, torch.Tensor] = {}
        self.statistics: list[dict[str, dict]] = []

    def add(self, result: StepResult, weight: float) -> None:
        """Add the result of a part that is `weight` of the whole batch."""
        for name, value in {"loss": result.loss, **result.scalars}.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value.float()
        if self.logging:
            self.statistics.append({name: rows() for name, rows in result.statistics.items()})

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the sums over all processes; the host waits for the device."""
        row = torch.stack([value.to(accelerator.device) for value in self.sums.values()])
        totals = accelerator.gather(row[None]).sum(dim=0).tolist()
        return dict(zip(self.sums, totals, strict=True))


class FiniteCheck:
    """Notes the first step with a gradient that is not finite; from then on no weight changes.

    The note stays on the device: the host reads it before a log line, a validation, a checkpoint.
    """

    def __init__(self, accelerator: Accelerator, dataset: Dataset, sampler: StepSampler):
        self.accelerator, self.dataset, self.sampler = accelerator, dataset, sampler
        self.failed_step = torch.full((), -1.0, device=accelerator.device)

    def note(self, norms: list[torch.Tensor], step: int) -> torch.Tensor:
        """Return `found_inf`: 1 if this or an earlier step failed, else 0; a scalar on the device.

        Args:
            norms: of gradients, equal in all processes. With fp16 they are the scaler's business.
        """
        if not self.accelerator.scaler:
            finite = torch.stack([norm.to(self.failed_step) for norm in norms]).isfinite().all()
            failed_now = ~finite & (self.failed_step < 0)
            self.failed_step = torch.where(failed_now, float(step), self.failed_step)
        return (self.failed_step >= 0).float()

    def read(self, loss: float = 0.0, step: int = -1) -> None:
        """Stop the run if a step failed.

        Args:
            loss, step: the loss of this step is checked, too.

        Raises:
            FloatingPointError: in all processes, with the step and its images.
        """
        failed = int(self.failed_step)
        if failed < 0 and math.isfinite(loss):
            return
        if failed >= 0:
            step = failed

        # read its images again, for their ids
        image_ids = []
        for rows in self.sampler.parts(step):
            image_ids += self.dataset.__getitems__(rows).get("image_id", torch.empty(0)).tolist()
        images = ", ".join(map(str, gather_object(image_ids)))
        newest = newest_checkpoint(self.accelerator.project_dir)
        raise FloatingPointError(
            f"The loss or a gradient is not finite at step {step} (images {images or 'unknown'}). "
            "Start again in another --output_dir with a smaller --learning_rate or more "
            f"--warmup_steps. The newest checkpoint here is {newest.name if newest else 'none'}."
        )
