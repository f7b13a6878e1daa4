"""How well a student follows its teacher: R² of its states."""

from collections import defaultdict
from functools import partial

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ..activations.online import OnlineActivations
from ..configuration_raptor import token_layout
from ..data import ImageViews, ReadingArguments, batches, choose_images, load_images
from ..loop import Validation
from ..metrics import RSquared, compute_over_processes, r2_reference, state_statistics
from ..modeling_raptor import rotary_angles
from ..runs.processes import process_state
from ..teachers import trajectory
from .arguments import ValidationArguments
from .matching import chain_statistics
from .rollout import Chain, rollout


@torch.no_grad()
def trajectory_r2(
    student: PreTrainedModel, activations: OnlineActivations, *, num_workers: int = 0
) -> dict:
    """Measure R² of a student's states on images against its teacher's, by two definitions.

    Args:
        student: any model with the teacher's number of states.
        activations: all of the teacher's states; the processes share the images.
        num_workers: processes that read ahead.

    Returns:
        `layers` and `mean` of `RSquared`, and `reference`: the mean of `r2_reference` over batches.
    """
    # sums over the batches of this process
    groups = activations.layout.groups()
    statistics, references = [], []
    for batch in batches(activations, 64, "R²", num_workers=num_workers):
        target = activations.states(batch).to(student.device)
        prediction = trajectory(student, activations.pixel_values(batch).to(student.device))
        statistics.append(state_statistics(prediction=prediction, target=target, groups=groups))
        references.append((len(target), r2_reference(prediction=prediction, target=target)))

    # over all processes
    references = gather_object(references)
    mean = sum(n * r2 for n, r2 in references) / sum(n for n, _ in references)
    result = compute_over_processes(RSquared, statistics)
    return {**result, "reference": mean}


@torch.no_grad()
def chains_r2(
    teacher: PreTrainedModel, images: ImageViews, chains: list[Chain], *, num_workers: int = 0
) -> dict[str, float]:
    """Measure R² of chains of blocks on images, each rolled out from the teacher's state.

    Returns:
        `<chain>/r2`, the mean over the chain's layers, over all tokens (`RSquared`) and images; the
        processes share the images.
    """
    groups = token_layout(teacher.config).groups()
    # sums over the images, chain by chain
    rows = defaultdict(list)
    for batch in batches(images, 64, "validation", num_workers=num_workers):
        pixel_values = batch["pixel_values"].to(teacher.device)
        states = trajectory(teacher, pixel_values)
        angles = rotary_angles(teacher, tuple(pixel_values.shape[-2:]))
        for chain in chains:
            first, last = chain.layers[0], chain.layers[-1]
            target = states[:, first : last + 1]
            prediction = rollout(chain.spans, target, resets={first}, angles=angles)
            rows[chain.name].append(chain_statistics(prediction, target, groups))
    # R² of the images of all processes
    scores = {}
    for chain in chains:  # a process may have seen no batch
        score = compute_over_processes(RSquared, rows[chain.name])
        scores[f"{chain.name}/r2"] = score["mean"]["all"]
    return scores


def open_validation(
    arguments: ValidationArguments,
    teacher: PreTrainedModel,
    chains: list[Chain],
    *,
    processor,
    reading: ReadingArguments,
    num_workers: int = 0,
) -> Validation | None:
    """Open the images that a training validates with (`chains_r2`); None without a dataset.

    Args:
        teacher: the backbone; it is moved to this process' device.
        processor: image processor that the blocks are trained with.
        reading: how the images are read.
        num_workers: processes that read ahead.

    Raises:
        ValueError: an interval without a dataset.
    """
    if arguments.validation_dataset is None:
        if arguments.validate_every:
            raise ValueError("--validate_every needs --validation_dataset.")
        return None

    # the same images for every run, drawn with seed 0
    dataset = load_images(arguments.validation_dataset, arguments.validation_split, reading)
    number = min(arguments.validation_images or len(dataset), len(dataset))
    image_ids = choose_images(len(dataset), number, 0)
    images = ImageViews(dataset, processor, image_ids=image_ids, reading=reading)
    teacher.to(process_state().device)
    measure = partial(chains_r2, teacher, images, chains, num_workers=num_workers)
    return Validation(measure, arguments.validate_every)
