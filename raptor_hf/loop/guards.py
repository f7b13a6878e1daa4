"""What goes wrong in training, said in words: numbers that are not finite, divergence, memory."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object, send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from .engine import Engine

logger = logging.getLogger(__name__)

_SMOOTHING = 0.9  # of the loss, a step
_WINDOW = 200  # steps over which a loss must not grow …
_GROWTH = 10.0  # … by this factor


class DivergenceGuard:
    """Warns when the smoothed loss has grown tenfold within 200 steps; once until it recovers."""

    def __init__(self):
        self.smoothed: float | None = None
        self.recent: deque[float] = deque(maxlen=_WINDOW)
        self.warned = False

    def check(self, loss: float, step: int) -> None:
        """Take notice of the loss of a step."""
        before = loss if self.smoothed is None else self.smoothed
        self.smoothed = _SMOOTHING * before + (1 - _SMOOTHING) * loss
        self.recent.append(self.smoothed)
        lowest = min(self.recent)
        diverges = self.smoothed > _GROWTH * lowest > 0
        if diverges and not self.warned:
            logger.warning(
                "The loss diverges: it has grown from %.3g to %.3g, within the last %d steps, at "
                "step %d. Try a smaller --learning_rate or more --warmup_steps.",
                lowest, self.smoothed, len(self.recent), step,
            )  # fmt: skip
        self.warned = diverges


def check_finite(
    engine: Engine,
    loss: float,
    left_out: bool,
    batches: list[dict[str, torch.Tensor]],
    *,
    step: int,
    explain: Callable[[nn.Module, dict], str | None] | None,
) -> None:
    """Stop all processes at a loss or a gradient that is NaN or infinite.

    Args:
        loss: of the whole batch, the same in all processes.
        left_out: whether its update was, which such numbers would have reached the weights with.
        batches: what this process had of it.
        explain: finds in (module, batch) what is not finite, in words.

    Raises:
        FloatingPointError: with the step, the images, and what `explain` says.
    """
    if math.isfinite(loss) and not left_out:
        return
    engine.update_module()
    accelerator = engine.accelerator
    batches = [send_to_device(batch, accelerator.device) for batch in batches]
    causes = [explain(engine.module, batch) for batch in batches] if explain else []
    images = [batch["image_id"].tolist() for batch in batches if "image_id" in batch]
    reasons = dict.fromkeys(filter(None, gather_object(causes)))
    images = [str(image) for part in gather_object(images) for image in part]
    what = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
    raise FloatingPointError(
        f"The {what} at step {step}"
        + (f": {'; '.join(reasons)}" if reasons else "")
        + f" (images {', '.join(images) or 'unknown'}). The last good checkpoint is kept in "
        f"{accelerator.project_dir}; try a smaller --learning_rate or more --warmup_steps."
    )


@contextmanager
def memory_in_words(images: int, module: nn.Module) -> Iterator[None]:
    """Turn an out-of-memory error into one that says what to do about it.

    Args:
        images: that a process computes at once.
        module: what is trained.

    Raises:
        MemoryError: there was not enough memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        knobs = [f"--per_device_batch_size {max(1, images // 2)} (as many images a step, in parts)"]
        # layers that could be checkpointed, and are not
        if any(getattr(part, "gradient_checkpointing", None) is False for part in module.modules()):
            knobs.append("--gradient_checkpointing True (a quarter more time)")
        knobs.append("accelerate launch --mixed_precision bf16 (on a GPU)")
        raise MemoryError(
            f"Out of memory with {images} images at a time in a process ({error}). Less is needed "
            f"with {', '.join(knobs)}. Then run the same command with --resume."
        ) from error
