"""Output folders that describe themselves: the arguments and inputs of a run, and its state."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from .arguments import all_values
from .files import Fingerprint, read_json, write_json
from .processes import process_state

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate")
# Arguments that say how a run is watched, stored or sped up. They change nothing that is computed,
# so a run may be resumed with others.
NOT_IDENTITY = (
    "output_dir", "resume", "dry_run", "num_workers", "per_device_batch_size", "log_every",
    "checkpoint_every", "cuda_graphs", "gradient_checkpointing", "report_to", "skip_corrupt",
    "validation_dataset", "validation_split", "validation_images", "validate_every",
)  # fmt: skip
# Arguments that only say where inputs lie: `inputs` and `images` say which ones they are.
LOCATIONS = ("teacher", "dataset", "activations", "blocks", "phases_file")
_LOCKS: dict[Path, FileLock] = {}  # held by this process


def program_name() -> str:
    """Return the name of the program that runs: of its file, or of its package."""
    path = Path(sys.argv[0])
    return path.parent.name if path.stem == "__main__" else path.stem


def environment() -> dict:
    """Return the versions, commit and number of processes that a result was made with."""
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "commit": commit,
        "num_processes": process_state().num_processes,
    }


def identity_values(*parts) -> dict:
    """Return the arguments that change what is computed, as one flat dict."""
    values = all_values(*parts)
    return {name: value for name, value in values.items() if name not in NOT_IDENTITY}


def start_run(
    *parts, inputs: dict[str, str] | None = None, images: dict[str, Fingerprint] | None = None
) -> bool:
    """Claim an output folder for a run; True where there is nothing to do.

    That is so for a run that is finished there already, and for a dry run, which checks the same
    and writes nothing. Of several processes the main one claims the folder; the others wait.

    Args:
        parts: the program's arguments, instances of dataclasses; `output_dir` is the folder, and
            `resume` says whether to go on with an unfinished run.
        inputs: digests of what the run reads, by name: other inputs make another run.
        images: which images it reads, by what they are for.

    Raises:
        ValueError: the folder holds something else, a run with other arguments, inputs or images,
            an unfinished run while `resume` is off, or another process writes to it.
    """
    state, values = process_state(), all_values(*parts)
    output_dir, dry_run = Path(values["output_dir"]), values.get("dry_run", False)
    # one process claims the folder for all
    if state.is_main_process:
        read = {name: str(one) for name, one in (images or {}).items()}
        run = {
            "program": program_name(),
            "arguments": json.loads(json.dumps(identity_values(*parts))),
            "inputs": {**(inputs or {}), **read},
        }
        _claim_folder(output_dir, run, resume=values["resume"], dry_run=dry_run)
    state.wait_for_everyone()
    if dry_run:
        return True
    # a finished run is not run again
    finished = read_json(output_dir / "run.json")["finished"]
    if finished:
        state.print(f"{output_dir}: finished already, nothing to do", flush=True)
        unlock_folder(output_dir)
    return finished


def _claim_folder(output_dir: Path, run: dict, *, resume: bool, dry_run: bool) -> None:
    """Write `run.json` into an empty folder, or check the one that is there."""
    record = output_dir / "run.json"
    records = ("run.json", ".lock")  # they only say who works there
    made = [path for path in output_dir.glob("*") if not path.name.startswith(records)]
    if made and not record.exists():
        raise ValueError(f"{output_dir} is not empty and was not made by this program.")

    # what was claimed by a run that stopped before it made anything counts as empty
    before = read_json(record) if record.exists() else {"finished": False}
    empty = not made and not before["finished"]
    if not empty:
        _check_same_run(output_dir, before, run)
        if not before["finished"] and not resume:
            raise ValueError(f"{output_dir} holds an unfinished run. Add --resume, or delete it.")
    if dry_run:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    lock_folder(output_dir)
    if empty:
        write_json(record, {**run, "environment": environment(), "finished": False})


def _check_same_run(output_dir: Path, before: dict, run: dict) -> None:
    """Refuse another program than before, other arguments or inputs; each is named."""
    if before["program"] != run["program"]:
        raise ValueError(f"{output_dir} was made by {before['program']}, not by {run['program']}.")

    # one line a difference
    differences = ""
    for kind, ignored in (("arguments", LOCATIONS), ("inputs", ())):
        for name in sorted({*before[kind], *run[kind]} - {*ignored}):
            old, new = before[kind].get(name), run[kind].get(name)
            if old != new:
                differences += f"\n  {name}: made with {old!r}, now asked for {new!r}"
    if differences:
        raise ValueError(
            f"{output_dir} was made with other arguments or inputs:{differences}\nGive the same "
            "ones, choose another --output_dir, or delete the folder to redo it."
        )


def lock_folder(folder: str | Path) -> None:
    """Let this process alone write to a folder, until it ends or `unlock_folder`.

    Raises:
        ValueError: another process writes to it; the error says which, and since when.
    """
    folder = Path(folder).resolve()
    if folder in _LOCKS:
        return
    lock, owner = FileLock(folder / ".lock"), folder / ".lock.json"
    # hold the lock until this process ends, or say who holds it
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = "another process"
        if owner.exists():
            holder = "process {process} of {host} since {since}".format(**read_json(owner))
        raise ValueError(
            f"{folder} is being written by {holder}. Wait until it ends, or choose another folder."
        ) from error
    _LOCKS[folder] = lock
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    write_json(owner, {"host": socket.gethostname(), "process": os.getpid(), "since": since})


def unlock_folder(folder: str | Path) -> None:
    """Let other processes write to a folder again."""
    folder = Path(folder).resolve()
    if folder in _LOCKS:
        (folder / ".lock.json").unlink(missing_ok=True)
        _LOCKS.pop(folder).release()


def mark_run(output_dir: str | Path, *, finished: bool) -> None:
    """Note whether a run is finished."""
    record = Path(output_dir) / "run.json"
    write_json(record, {**read_json(record), "finished": finished})


def finish_run(output_dir: str | Path) -> None:
    """Mark a run as finished; its weights get the permissions of other new files."""
    apply_umask(output_dir)
    mark_run(output_dir, finished=True)
    unlock_folder(output_dir)


def apply_umask(folder: str | Path) -> None:
    """Give weights the permissions of other new files: safetensors writes for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in Path(folder).rglob("*.safetensors"):
        if not file.is_symlink():
            file.chmod(0o666 & ~umask)
