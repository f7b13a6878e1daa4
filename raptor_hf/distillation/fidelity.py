"""How well a student follows its teacher: R² of its states, and how large it is."""

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ..activations.online import Activations, check_all_layers
from ..configuration_raptor import teacher_family
from ..data import batches
from ..metrics import RSquared, compute_over_processes, r2_reference, state_statistics
from ..teachers import trajectory


@torch.no_grad()
def trajectory_r2(
    student: PreTrainedModel,
    activations: Activations,
    *,
    batch_size: int = 64,
    rows: Sequence[int] | None = None,
) -> dict:
    """R² of a student's states against its teacher's, by two definitions.

    The student starts from the images where there are any (`OnlineActivations`), and from the
    teacher's embeddings, which a Raptor shares, where only states are stored.

    Args:
        student: a Raptor; online, any model with the teacher's number of states.
        activations: all of the teacher's states, from either source; the processes share them.
        rows: which of them; default: all.

    Returns:
        `layers` and `mean` of `RSquared`, and `reference`: the mean of `r2_reference` over batches.

    Raises:
        ValueError: some layers only.
    """
    check_all_layers(activations)
    groups = activations.layout.groups()
    statistics, references = [], []
    for batch in batches(activations, batch_size, "R²", rows=rows):
        target = activations.states(batch).to(student.device).float()
        if "pixel_values" in batch:
            prediction = trajectory(student, batch["pixel_values"].to(student.device))
        else:
            prediction = student.rollout(target[:, 0])
        statistics.append(state_statistics(prediction=prediction, target=target, groups=groups))
        references.append((len(target), r2_reference(prediction=prediction, target=target)))
    references = gather_object(references)
    mean = sum(n * r2 for n, r2 in references) / sum(n for n, _ in references)
    result = compute_over_processes(RSquared(keep_in_memory=True), statistics)
    return {**result, "reference": mean}


def model_facts(model: PreTrainedModel) -> dict:
    """Phases (None for a teacher) and the parameters of the blocks or of the teacher's layers."""
    phases = getattr(model.config, "phases", None)
    layers = model.blocks if phases else model.get_submodule(teacher_family(model.config).layers)
    return {
        "phases": phases,
        "block_parameters": sum(parameter.numel() for parameter in layers.parameters()),
    }
