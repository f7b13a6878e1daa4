"""Scalars of a step and the check for NaN and infinity: on the device, until they are logged."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn

from .batches import StepBatches
from .checkpoints import newest_checkpoint


class StepResult(NamedTuple):
    """The result of `compute_loss` for a batch.

    Args:
        loss: mean over the batch's images, to be minimised.
        scalars: for the log, means over the images too.
        statistics: functions that return rows for `RSquared`, by name; called when R² is logged.
        explain: returns in words where the first value is not finite.
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

    Args:
        compute_loss: (module, batch, progress) to a `StepResult`; computes a failed step again.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        compute_loss: Callable,
        batches: StepBatches,
    ):
        self.accelerator, self.module = accelerator, module
        self.compute_loss, self.batches = compute_loss, batches
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
            FloatingPointError: in all processes, with the step, its images and the first value that
                is not finite.
        """
        failed = int(self.failed_step)
        if failed < 0 and math.isfinite(loss):
            return
        step = failed if failed >= 0 else step

        # compute the step again, and ask where it goes wrong
        reasons, images = [], []
        for part in send_to_device(self.batches.read_again(step), self.accelerator.device):
            with torch.no_grad():
                result = self.compute_loss(self.module, part, step / self.batches.sampler.steps)
            reasons.append(result.explain() if result.explain else None)
            images += part["image_id"].tolist() if "image_id" in part else []
        reasons = [*dict.fromkeys(filter(None, gather_object(reasons)))]
        images = ", ".join(map(str, gather_object(images))) or "unknown"
        newest = newest_checkpoint(self.accelerator.project_dir)
        raise FloatingPointError(
            f"The loss or a gradient is not finite at step {step}: {'; '.join(reasons) or 'NaN'} "
            f"(images {images}). Start again in another --output_dir with a smaller "
            "--learning_rate or more --warmup_steps. The newest checkpoint here is "
            f"{newest.name if newest else 'none'}."
        )
