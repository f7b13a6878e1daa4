"""Checkpoints of a training; the newest few are kept.

A checkpoint is written under a temporary name. When all of it is on the disk, it gets its name,
`step_<updates so far>`: a process that is killed leaves none that is half written.
"""

import os
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..runs.folder import apply_umask

_KEPT = 2  # newest checkpoints


def checkpoints_of(output_dir: str | Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(output_dir) / "checkpoints"


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int) -> None:
    """Write the state after `step` updates, then drop all but the newest checkpoints.

    All processes call it, and share the file system. If it fails, because the disk is full for
    example, the checkpoints before it are untouched.
    """
    # all processes write
    folder = checkpoints_of(output_dir)
    temporary = folder / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()

    # the main one gives it its name when all of it is on the disk
    if accelerator.is_main_process:
        apply_umask(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:  # Windows syncs files that may be written only
                    os.fsync(file.fileno())
        os.replace(temporary, folder / f"step_{step:08d}")
        for checkpoint in sorted(folder.glob("step_*"))[:-_KEPT]:
            # renamed first: a kill while it is deleted must not leave a part under its name
            os.replace(checkpoint, temporary)
            shutil.rmtree(temporary)
    accelerator.wait_for_everyone()


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the checkpoint with the most steps, if any."""
    return max(checkpoints_of(output_dir).glob("step_*"), default=None)


def resume(accelerator: Accelerator, output_dir: str | Path) -> int:
    """Load the newest checkpoint; return its number of steps, 0 if there is none.

    Checkpoints of another number of processes load too. Their random states are not used: all draws
    of a step are a function of the seed and the step.
    """
    checkpoint = broadcast_object_list([newest_checkpoint(output_dir)])[0]
    if checkpoint is None:
        return 0
    step = int(checkpoint.name.removeprefix("step_"))
    accelerator.print(f"{output_dir}: going on after step {step:,}", flush=True)
    accelerator.load_state(str(checkpoint))
    accelerator.step = 0  # no part of a batch is accumulated between two steps
    return step


def remove_checkpoints(output_dir: str | Path) -> None:
    """Remove the checkpoints of a finished run."""
    shutil.rmtree(checkpoints_of(output_dir), ignore_errors=True)
