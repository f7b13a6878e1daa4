"""How a Raptor was trained, in a file beside its weights: `training.json`."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..activations.online import Activations
from ..configuration_raptor import teacher_family
from ..loop import read_log
from ..loop.arguments import LoopArguments
from ..runs.files import json_digest, public_name, read_json, write_json
from ..runs.folder import LOCATIONS, identity_values, program_name
from ..runs.processes import process_state
from ..teachers import teacher_identity
from ..weights import weights_digest

_FILE = "training.json"


def source_inputs(teacher: PreTrainedModel, activations: Activations) -> dict[str, str]:
    """Return digests of what the states depend on, as `start_run` takes them.

    Of the weights or the store, of the configuration, which may change what equal weights compute,
    and of the image processor.
    """
    config = teacher.config.to_diff_dict()
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        config.pop(name, None)
    return {
        "activations": activations.identity(),
        "config": json_digest(config),
        "processor": json_digest(activations.processor.to_dict()),
    }


def write_training(
    teacher: PreTrainedModel,
    loop: LoopArguments,
    *parts,
    dataset: str | None,
    blocks: str | None = None,
) -> None:
    """Write how a model was trained into its folder, `loop.output_dir`.

    The file has the keys `teacher` (name, revision, SHA-256 of its weights), `dataset` and
    `stages`. Each stage has `program`, `arguments`, `images` (seen in all steps), `seconds` and
    `num_processes`.

    Args:
        teacher: as it was loaded.
        loop, parts: the arguments that are the recipe of this stage.
        dataset: the images, by name; paths are shortened.
        blocks: folder of the stage before, if there was one.
    """
    # this run, as one stage
    values = identity_values(*parts, loop)
    recipe = {name: value for name, value in values.items() if name not in LOCATIONS}
    stages = training_facts(blocks)["stages"] if blocks else []
    stage = {
        "program": program_name(),
        "arguments": recipe,
        "images": loop.steps * loop.batch_size,
        "seconds": _training_seconds(Path(loop.output_dir)),
        "num_processes": process_state().num_processes,
    }
    # the stages before it come with its blocks
    content = {
        "teacher": teacher_identity(teacher),
        "dataset": public_name(dataset) if dataset else None,
        "stages": [*stages, stage],
    }
    write_json(Path(loop.output_dir) / _FILE, content)


def check_teacher(folder: str | Path, teacher: PreTrainedModel) -> None:
    """Refuse blocks or a Raptor that were made from another teacher, as far as that is noted."""
    facts = training_facts(folder)
    if facts and facts["teacher"]["weights_sha256"] != weights_digest(teacher):
        raise ValueError(
            f"{folder} was made from another teacher, {facts['teacher']['name']}, with other "
            f"weights than {teacher.name_or_path}. Give that one."
        )


def training_facts(folder: str | Path) -> dict | None:
    """Return what `write_training` wrote; None of a model that was made otherwise."""
    path = Path(folder) / _FILE
    return read_json(path) if path.is_file() else None


def _training_seconds(folder: Path) -> float:
    """Return the seconds that a run has trained, all its resumed parts together."""
    total = last = 0.0
    for line in read_log(folder):
        if line["seconds"] < last:  # a resumed part counts its own seconds
            total += last
        last = line["seconds"]
    return round(total + last, 1)


def model_facts(model: PreTrainedModel) -> dict:
    """Return phases (None for a teacher) and the parameters of the blocks or layers."""
    phases = getattr(model.config, "phases", None)
    layers = model.blocks if phases else model.get_submodule(teacher_family(model.config).layers)
    return {
        "phases": phases,
        "block_parameters": sum(map(torch.numel, layers.parameters())),
    }
