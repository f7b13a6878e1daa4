"""The training loop: `fit` and its parts."""

from .checkpoints import newest_checkpoint, remove_checkpoints
from .fit import Validation, fit
from .log import read_log
from .scalars import StepResult
from .setup import check_training, configure_compute

__all__ = [
    "StepResult", "Validation", "check_training", "configure_compute", "fit",
    "newest_checkpoint", "read_log", "remove_checkpoints",
]  # fmt: skip
