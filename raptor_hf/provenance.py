"""How a model was made: what its card tells, read off the folders of the runs that made it."""

import json
from pathlib import Path

from transformers import PreTrainedModel

from .runs import read_json
from .teachers import teacher_identity

# the arguments of a training that make its recipe; the others are names of files, or say how a run
# is watched
RECIPE = (
    "steps",
    "batch_size",
    "learning_rate",
    "final_learning_rate",
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "seed",
    "objective",
    "loss",
    "token_weights",
    "last_block_weights",
    "noise_std",
    "precision",
)
OF_NEW_BLOCKS = ("init", "ffn", "depth_scaling")  # say nothing of blocks that are there already


def public_name(name_or_path: str) -> str:
    """A Hub id as it is; of a path its last part: nobody else has the folders of this machine."""
    path = Path(name_or_path)
    return path.name if path.is_absolute() or path.exists() else name_or_path


def is_hub_id(name: str) -> bool:
    """Whether a name can be a model or a dataset on the Hub: `owner/name`, and no folder here."""
    return name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()


def training_facts(folder: str | Path, teacher: PreTrainedModel) -> dict | None:
    """Teacher and stages of a Raptor that the training programs made; None of any other model.

    Args:
        folder: of `distill_raptor.py`; its `run.json` leads to that of the blocks.

    Returns:
        `teacher` (name, commit on the Hub, digest of the weights), and `stages`, first to last:
        program, arguments, images that were seen, seconds, number of processes.
    """
    stages: list[dict] = []
    run_folder: Path | None = Path(folder)
    while run_folder is not None and (run_folder / "run.json").is_file():
        run = read_json(run_folder / "run.json")
        arguments = run["arguments"]
        stages.insert(0, stage_facts(run_folder, run))
        blocks = arguments.get("blocks")
        run_folder = Path(blocks) if blocks else None
    if not stages:
        return None
    identity = teacher_identity(teacher)
    return {"teacher": {**identity, "name": public_name(identity["name"])}, "stages": stages}


def stage_facts(folder: Path, run: dict) -> dict:
    """What one training took."""
    arguments = run["arguments"]
    names = RECIPE if arguments.get("blocks") else RECIPE + OF_NEW_BLOCKS
    return {
        "program": run["program"],
        "arguments": {name: arguments[name] for name in names if name in arguments},
        "images": arguments["steps"] * arguments["batch_size"],
        "seconds": training_seconds(folder),
        "num_processes": run["environment"].get("num_processes", 1),
    }


def training_seconds(folder: Path) -> float:
    """Time that a run trained, all its resumed parts together; each counts its own seconds."""
    log = folder / "log.jsonl"
    total = last = 0.0
    for line in log.read_text().splitlines() if log.exists() else ():
        seconds = json.loads(line)["seconds"]
        if seconds < last:
            total += last
        last = seconds
    return round(total + last, 1)
