"""How a model was made: what its card tells, read off the folders of the runs that made it."""

import json
from pathlib import Path

from transformers import PreTrainedModel

from ..activations.arguments import ImageArguments
from ..configuration_raptor import teacher_family
from ..loop.arguments import LoopArguments
from ..runs.arguments import OnCard, marked_names
from ..runs.files import public_name, read_json
from ..teachers import teacher_identity
from .arguments import BlockArguments, ObjectiveArguments, SpanArguments

# the arguments of a training that make its recipe; the others are names of files, or say how a run
# is watched
RECIPE = marked_names(OnCard, LoopArguments, ObjectiveArguments, SpanArguments, ImageArguments)
# say nothing of blocks that are there already
_OF_NEW_BLOCKS = marked_names(OnCard, BlockArguments)


def training_facts(folder: str | Path, teacher: PreTrainedModel) -> dict | None:
    """Return the teacher and stages of a Raptor that the training programs made.

    Args:
        folder: of `distill_raptor.py`; its `run.json` leads to that of the blocks.

    Returns:
        `teacher` (name, commit on the Hub or None, digest of the weights), `dataset`, and `stages`,
        first to last: program, arguments, images that were seen, seconds, number of processes.
        None of a model that was made otherwise, or whose earlier runs are not there any more.
    """
    stages: list[dict] = []
    run_folder, arguments = folder, {}
    while run_folder:
        if not (Path(run_folder) / "run.json").is_file():
            return None
        run = read_json(Path(run_folder) / "run.json")
        arguments = run["arguments"]
        stages.insert(0, _stage_facts(Path(run_folder), run))
        run_folder = arguments.get("blocks")
    identity = teacher_identity(teacher, arguments.get("revision"))
    return {
        "teacher": {**identity, "name": public_name(identity["name"])},
        "dataset": _training_dataset(arguments),
        "stages": stages,
    }


def _training_dataset(arguments: dict) -> str | None:
    """Return the images that a training saw, itself or by way of its stored activations."""
    if arguments.get("dataset"):
        return public_name(arguments["dataset"])
    extraction = Path(arguments["activations"]) / "run.json"
    if not extraction.is_file():
        return None
    return public_name(read_json(extraction)["arguments"]["dataset"])


def _stage_facts(folder: Path, run: dict) -> dict:
    """Return what one training took."""
    arguments = run["arguments"]
    names = RECIPE if arguments.get("blocks") else RECIPE + _OF_NEW_BLOCKS
    return {
        "program": run["program"],
        "arguments": {name: arguments[name] for name in names if name in arguments},
        "images": arguments["steps"] * arguments["batch_size"],
        "seconds": _training_seconds(folder),
        "num_processes": run["environment"].get("num_processes", 1),
    }


def _training_seconds(folder: Path) -> float:
    """Return the time that a run trained, all its resumed parts together; each counts its own
    seconds.
    """
    log = folder / "log.jsonl"
    total = last = 0.0
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        seconds = json.loads(line)["seconds"]
        if seconds < last:
            total += last
        last = seconds
    return round(total + last, 1)


def model_facts(model: PreTrainedModel) -> dict:
    """Return phases (None for a teacher) and the parameters of the blocks or layers."""
    phases = getattr(model.config, "phases", None)
    layers = model.blocks if phases else model.get_submodule(teacher_family(model.config).layers)
    return {
        "phases": phases,
        "block_parameters": sum(parameter.numel() for parameter in layers.parameters()),
    }
