"""Checkpoints of a training: whole or not used, the newest few are kept.

A checkpoint is written under a temporary name; when all of it is on the disk and its checksums are
written down, it gets its name, `step_<optimiser updates so far>`.
"""

import logging
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from ..runs.files import file_digest, read_json, size, write_json

logger = logging.getLogger(__name__)

ADAMW_BYTES = 12  # a parameter in a checkpoint: float32 weight and two moments
_FILES = "files.json"  # sizes and checksums of the other files; written last
_UNFINISHED, _REMOVED = "unfinished", "removed"


def checkpoints_of(output_dir: str | Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(output_dir) / "checkpoints"


def check_room(output_dir: Path, parameters: list[torch.Tensor], keep: int) -> None:
    """Refuse to begin a training whose checkpoints the disk can't hold.

    Raises:
        OSError: too little is free.
    """
    folder = checkpoints_of(output_dir)
    each = ADAMW_BYTES * sum(parameter.numel() for parameter in parameters)
    to_come = keep + 1 - len(list(folder.glob("step_*")))  # one more while it is written
    free = shutil.disk_usage(output_dir).free
    if to_come * each > free:
        raise OSError(
            f"{to_come} checkpoints of {size(each)} are to come in {folder}, and only {size(free)} "
            "are free. Make room, or take another --output_dir or a smaller --keep."
        )


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, keep: int) -> None:
    """Write everything that goes on after `step` updates, then drop all but `keep` checkpoints.

    All processes call it, and share the file system.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    folder = checkpoints_of(output_dir)
    temporary = folder / _UNFINISHED
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_down_files(temporary)
    # torch and safetensors have exceptions of their own for a disk that is full
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = sorted(checkpoint.name for checkpoint in folder.glob("step_*"))
        raise OSError(
            f"The checkpoint after step {step:,} could not be written to {folder} ({error}); "
            f"{size(shutil.disk_usage(folder).free)} are free. "
            + (f"{kept[-1]} is kept" if kept else "There was none before it")
            + ": make room and run the same command with --resume."
        ) from error
    if accelerator.is_main_process:
        name = folder / f"step_{step:08d}"
        shutil.rmtree(name, ignore_errors=True)  # one that was found damaged
        os.replace(temporary, name)
        for checkpoint in sorted(folder.glob("step_*"))[:-keep]:
            # renamed first: one that is half deleted must not look like one that is half written
            shutil.rmtree(folder / _REMOVED, ignore_errors=True)
            os.replace(checkpoint, folder / _REMOVED)
        shutil.rmtree(folder / _REMOVED, ignore_errors=True)
    accelerator.wait_for_everyone()


def _write_down_files(checkpoint: Path) -> None:
    """Sync the files of a checkpoint to disk; write their sizes and checksums beside them."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        facts = {"size_bytes": path.stat().st_size, "sha256": file_digest(path)}
        files[str(path.relative_to(checkpoint))] = facts
    write_json(checkpoint / _FILES, files)


def _checkpoint_problem(checkpoint: Path) -> str | None:
    """Return what keeps a checkpoint from being used, in words; None if it is whole."""
    if not (checkpoint / _FILES).exists():
        return f"it was only half written ({_FILES} is missing)"
    for name, facts in read_json(checkpoint / _FILES).items():
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != facts["size_bytes"]:
            return f"{name} has {path.stat().st_size:,} of {facts['size_bytes']:,} bytes"
        if file_digest(path) != facts["sha256"]:
            return f"{name} has another checksum than when it was written"
    return None


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Return the whole checkpoint with the most steps, if any; warn of damaged ones by name."""
    folder = checkpoints_of(output_dir)
    damaged = [(folder / _UNFINISHED, "it was only half written")]
    newest = None
    for checkpoint in sorted(folder.glob("step_*"), reverse=True):
        problem = _checkpoint_problem(checkpoint)
        if problem is None:
            newest = checkpoint
            break
        damaged.append((checkpoint, problem))
    for checkpoint, problem in damaged:
        if checkpoint.exists():
            logger.warning("The checkpoint %s is skipped: %s.", checkpoint, problem)
    return newest


def resume(accelerator: Accelerator, output_dir: Path) -> int:
    """Load the newest whole checkpoint; the steps that it has behind it, 0 where there is none.

    Checkpoints of another number of processes load too. What they hold of random generators is not
    used: everything that a step draws is a function of the seed and the step.
    """
    newest = [newest_checkpoint(output_dir) if accelerator.is_main_process else None]
    checkpoint = broadcast_object_list(newest)[0]
    if checkpoint is None:
        return 0
    step = _step_of(checkpoint)
    accelerator.print(f"{output_dir}: going on after step {step:,}", flush=True)
    accelerator.load_state(str(checkpoint))
    accelerator.step = 0  # parts of a batch that were accumulated: none between two steps
    return step


def _step_of(checkpoint: Path) -> int:
    """Return how many updates a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("step_"))


def remove_checkpoints(output_dir: str | Path) -> None:
    """Remove the checkpoints of a run whose result is saved."""
    shutil.rmtree(checkpoints_of(output_dir), ignore_errors=True)
