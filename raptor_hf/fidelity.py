"""How well a student follows its teacher: R² of its states, and how large it is."""

from collections.abc import Iterator

import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from .configuration_raptor import teacher_family, token_layout
from .metrics import RSquared, compute_over_processes, r2_reference, state_statistics
from .runs import process_state, progress_bar
from .teachers import trajectory


def image_batches(images: Dataset, batch_size: int, description: str) -> Iterator[dict]:
    """This process' share of an image dataset's rows, in batches, the last one ragged."""
    state = process_state()
    starts = range(state.process_index * batch_size, len(images), state.num_processes * batch_size)
    with progress_bar(description, len(starts), unit="batch", enabled=state.is_main_process) as bar:
        for start in starts:
            yield images.__getitems__(list(range(start, min(start + batch_size, len(images)))))
            bar.update()


@torch.no_grad()
def trajectory_r2(
    student: PreTrainedModel, teacher: PreTrainedModel, images: Dataset, *, batch_size: int = 64
) -> dict:
    """R² of a student's states against its teacher's, by two definitions.

    Args:
        images: `ImageViews`, or `ProbeImages`; the processes share them.

    Returns:
        `layers` and `mean` of `RSquared`, and `reference`: the mean of `r2_reference` over batches.
    """
    groups = token_layout(teacher.config).groups()
    rows, references = [], []
    for batch in image_batches(images, batch_size, "R²"):
        pixel_values = batch["pixel_values"].to(teacher.device)
        states = {
            "prediction": trajectory(student, pixel_values),
            "target": trajectory(teacher, pixel_values),
        }
        rows.append(state_statistics(**states, groups=groups))
        references.append((len(pixel_values), r2_reference(**states)))
    references = gather_object(references)
    mean = sum(n * r2 for n, r2 in references) / sum(n for n, _ in references)
    result = compute_over_processes(RSquared(keep_in_memory=True), rows)
    return {**result, "reference": mean}


def model_facts(model: PreTrainedModel) -> dict:
    """Phases (None for a teacher) and the parameters of the blocks or of the teacher's layers."""
    phases = getattr(model.config, "phases", None)
    layers = model.blocks if phases else model.get_submodule(teacher_family(model.config).layers)
    return {
        "phases": phases,
        "block_parameters": sum(parameter.numel() for parameter in layers.parameters()),
    }
