"""Output folders that describe themselves: made by whom, from what, and whether finished."""

import dataclasses
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from .arguments import Watching, all_values, marked_names
from .file_list import FileList
from .files import read_json, write_json
from .processes import process_state

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate")
# arguments of earlier versions, with the value that is all there is now, or that was the default
# when the default said less
_REMOVED = {"forcing_patches": 0, "refit": "none", "refit_images": 256, "ffn": "gelu"}


def _program_name() -> str:
    """Return the name of the program: of its file, or of its package."""
    path = Path(sys.argv[0])
    return path.parent.name if path.stem == "__main__" else path.stem


def environment() -> dict:
    """Return the versions, commit and number of processes that a result was made with."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:  # a machine without git
        commit = None
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "commit": commit,
        "num_processes": process_state().num_processes,
    }


def start_run(
    *parts, inputs: dict[str, str] | None = None, images: dict[str, FileList] | None = None
) -> bool:
    """Claim an output folder for a run; True where the same run is finished there already.

    Of several processes the main one claims it, and the others wait for the answer.

    Args:
        parts: the program's arguments, instances of dataclasses; `output_dir` is the folder, and
            `resume` says whether to go on with an unfinished run.
        inputs: digests of what the run reads, by name: other inputs make another run.
        images: which images it reads, by what they are for. Their lists are kept in the folder
            (`<name>.files.gz`), to say which file differs.

    Raises:
        ValueError: the folder holds something else, a run with other arguments, inputs or images,
            or an unfinished run while `resume` is off.
    """
    state = process_state()
    if state.is_main_process:
        _claim_output_dir(parts, inputs or {}, images or {})
    state.wait_for_everyone()
    output_dir = all_values(*parts)["output_dir"]
    finished = read_json(Path(output_dir) / "run.json")["finished"]
    if finished:
        state.print(f"{output_dir}: finished already, nothing to do", flush=True)
    return finished


def _claim_output_dir(parts: tuple, inputs: dict[str, str], images: dict[str, FileList]) -> None:
    """Write `run.json` into an empty folder, or check what is there; errors as `start_run`."""
    values, watching = all_values(*parts), marked_names(Watching, *parts)
    output_dir = Path(values["output_dir"])
    record = output_dir / "run.json"
    run = {
        "program": _program_name(),
        "arguments": {name: value for name, value in values.items() if name not in watching},
        "inputs": inputs,
        "images": {name: listed.digest for name, listed in images.items()},
    }
    files = {file.name for file in output_dir.iterdir()} if output_dir.exists() else set()
    files -= {"run.json.tmp"}  # of a run that was killed in the act of writing it
    files -= {_list_of(output_dir, name).name for name in images}
    if files and not record.exists():
        raise ValueError(
            f"{output_dir} is not empty and was not made by this program. "
            "Choose another --output_dir, or delete it."
        )
    if files <= {record.name} and not (files and read_json(record)["finished"]):
        # empty, or claimed by a run that stopped before it made anything
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, listed in images.items():
            if listed.lines is not None:
                listed.save(_list_of(output_dir, name))
        write_json(record, {**run, "environment": environment(), "finished": False})
        return
    before = read_json(record)
    _check_program_and_inputs(output_dir, before, run, parts)
    _check_images(output_dir, before, images)
    if not before["finished"] and not values["resume"]:
        raise ValueError(
            f"{output_dir} holds an unfinished run. Add --resume to go on with it, or delete it."
        )


def _check_program_and_inputs(output_dir: Path, before: dict, run: dict, parts: tuple) -> None:
    """Refuse another program than before, or other arguments or inputs; each is named."""
    if before["program"] != run["program"]:
        raise ValueError(
            f"{output_dir} was made by {before['program']}, not by {run['program']}. "
            "Choose another --output_dir."
        )
    watching = marked_names(Watching, *parts)
    # arguments that did not exist yet when it was made had what is now their default
    asked = run["arguments"]
    noted = {
        name: value
        for name, value in before["arguments"].items()
        if _REMOVED.get(name, ...) != value or asked.get(name) == value
    }
    noted = {k: v for k, v in {**_defaults_of(*parts), **noted}.items() if k not in watching}
    differences = [
        f"  {name}: made with {old.get(name)!r}, now asked for {new.get(name)!r}"
        for old, new in ((noted, asked), (before["inputs"], run["inputs"]))
        for name in sorted({*old, *new})
        if old.get(name) != json.loads(json.dumps(new.get(name)))
    ]
    if differences:
        raise ValueError(
            f"{output_dir} was made with other arguments or inputs:\n"
            + "\n".join(differences)
            + "\nGive the same ones, choose another --output_dir, or delete the folder to redo it."
        )


def _check_images(output_dir: Path, before: dict, images: dict[str, FileList]) -> None:
    """Refuse other images than before; a run of an earlier version did not note them."""
    for name, listed in images.items():
        if before.get("images", {}).get(name, listed.digest) != listed.digest:
            raise ValueError(
                f"{output_dir} was made with other images ({name}): "
                f"{_first_difference(_list_of(output_dir, name), listed)}. Bring them back, choose "
                "another --output_dir, or delete the folder to redo it."
            )


def _list_of(output_dir: Path, name: str) -> Path:
    """Return the file that lists the images of a run."""
    return output_dir / f"{name}.files.gz"


def _first_difference(path: Path, images: FileList) -> str:
    """Say what is another image than before."""
    if images.lines is None or not path.exists():
        return "the dataset is another version of itself"
    return images.first_difference(FileList.load(path))


def _defaults_of(*parts) -> dict:
    """Return the default of every argument that has one."""
    missing, defaults = dataclasses.MISSING, {}
    for field in (field for part in parts for field in dataclasses.fields(part)):
        if field.default is not missing:
            defaults[field.name] = field.default
        elif field.default_factory is not missing:
            defaults[field.name] = field.default_factory()
    return defaults


def reopen_run(output_dir: str | Path) -> None:
    """Mark a run as unfinished: something of it was lost."""
    _mark_run(output_dir, finished=False)


def finish_run(output_dir: str | Path) -> None:
    """Mark a run as finished."""
    _mark_run(output_dir, finished=True)


def _mark_run(output_dir: str | Path, *, finished: bool) -> None:
    """Set whether a run is finished."""
    record = Path(output_dir) / "run.json"
    write_json(record, {**read_json(record), "finished": finished})
