"""How well a student follows its teacher: R² of its states, and how large it is."""

import logging

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel

from ..activations.online import Activations, check_all_layers
from ..configuration_raptor import token_layout
from ..data import ImageViews, ReadingArguments, batches, load_images
from ..data.loading import Classes
from ..loop import Validation
from ..metrics import (
    Accuracy,
    RSquared,
    compute_over_processes,
    label_ranks,
    r2_reference,
    state_statistics,
)
from ..modeling_raptor import rotary_angles
from ..modeling_raptor_heads import pool_tokens
from ..runs.processes import process_state
from ..tasks.heads import load_linear_head
from ..teachers import final_norm, trajectory
from ..teachers.states import run_layers
from .arguments import ValidationArguments
from .blocks import Chain
from .rollout import rollout

logger = logging.getLogger(__name__)


@torch.no_grad()
def trajectory_r2(
    student: PreTrainedModel,
    activations: Activations,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict:
    """Measure R² of a student's states against its teacher's, by two definitions.

    The student starts from the images where there are any (`OnlineActivations`), and from the
    teacher's embeddings, which a Raptor shares, where only states are stored.

    Args:
        student: a Raptor; online, any model with the teacher's number of states.
        activations: all of the teacher's states, from either source; the processes share them.
        num_workers: processes that read ahead.

    Returns:
        `layers` and `mean` of `RSquared`, and `reference`: the mean of `r2_reference` over batches.

    Raises:
        ValueError: some layers only.
    """
    check_all_layers(activations)
    groups = activations.layout.groups()
    statistics, references = [], []
    for batch in batches(activations, batch_size, "R²", num_workers=num_workers):
        target = activations.states(batch).to(student.device).float()
        if "pixel_values" in batch:
            prediction = trajectory(student, activations.pixel_values(batch).to(student.device))
        else:
            prediction = student.rollout(target[:, 0], image_size=activations.resolution)
        statistics.append(state_statistics(prediction=prediction, target=target, groups=groups))
        references.append((len(target), r2_reference(prediction=prediction, target=target)))
    references = gather_object(references)
    mean = sum(n * r2 for n, r2 in references) / sum(n for n, _ in references)
    result = compute_over_processes(RSquared, statistics)
    return {**result, "reference": mean}


class TrajectoryValidation:
    """Accuracy and R² of chains of blocks in training.

    Each chain starts from the teacher's state, and its last state goes through the *teacher's*
    remaining layers, final norm and linear head, as the reference trainer does. R² is the mean over
    the chain's layers, over all tokens (`RSquared`). The processes share the images.

    Args:
        teacher: the backbone; it is moved to this process' device.
        head: its linear head on [cls, mean of patches]; None leaves the accuracy out.
        images: the labelled images.
        chains: the chains in training.
        num_images: so many of them, at most; 0: all.
        num_workers: processes that read them ahead.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        head: nn.Linear | None,
        images: ImageViews,
        chains: list[Chain],
        *,
        num_images: int = 2048,
        batch_size: int = 64,
        num_workers: int = 0,
    ):
        self.state = process_state()
        self.teacher = teacher.to(self.state.device)
        self.head = None if head is None else head.to(self.state.device)
        self.images, self.chains = images, chains
        rows = np.random.default_rng(0).permutation(len(images))[: num_images or None]
        self.rows = np.sort(rows).tolist()
        self.reading = {"batch_size": batch_size, "num_workers": num_workers}

    def __call__(self) -> dict[str, float]:
        """Return `<chain>/r2` and, where there is a head, `<chain>/accuracy` of every chain."""
        groups = token_layout(self.teacher.config).groups()
        states_rows: dict[str, list] = {chain.name: [] for chain in self.chains}
        label_rows: dict[str, list] = {chain.name: [] for chain in self.chains}
        options = {"description": "validation", "rows": self.rows}
        for batch in batches(self.images, **options, **self.reading):
            # the teacher's states
            pixel_values = batch["pixel_values"].to(self.state.device)
            states = trajectory(self.teacher, pixel_values)
            angles = rotary_angles(self.teacher, tuple(pixel_values.shape[-2:]))
            for chain in self.chains:
                first, last = chain.spans[0].start, chain.spans[-1].stop
                # R² of a chain, and the classes of its last state
                target = states[:, first : last + 1]
                prediction = rollout(chain.spans, target, resets={first}, angles=angles)
                whole = torch.cat([target[:, :1], prediction], dim=1)
                rows = state_statistics(prediction=whole, target=target, groups=groups)
                states_rows[chain.name].append(rows)
                if self.head is not None:
                    size = tuple(pixel_values.shape[-2:])
                    logits = self.head(self.finish(prediction[:, -1], last, size))
                    labels = batch["label"].to(logits.device)
                    label_rows[chain.name].append(label_ranks(logits=logits, labels=labels))

        # over all images and processes
        scalars = {}
        for name, rows in states_rows.items():
            if self.head is not None:
                right = compute_over_processes(Accuracy, label_rows[name])
                scalars[f"{name}/accuracy"] = right["accuracy"]
            r2 = compute_over_processes(RSquared, rows)
            scalars[f"{name}/r2"] = r2["mean"]["all"]
        return scalars

    def finish(self, states: torch.Tensor, start: int, image_size: tuple[int, int]) -> torch.Tensor:
        """Take states (B, N, D) after layer `start` through the rest of the teacher: (B, 2·D)."""
        layers = range(start + 1, self.teacher.config.num_hidden_layers + 1)
        states = run_layers(self.teacher, states, layers, image_size)[-1]
        return pool_tokens(final_norm(self.teacher, states), self.teacher.config)


def teacher_head(
    teacher: PreTrainedModel, source: str | None, classes: Classes
) -> nn.Linear | None:
    """Load a linear head for a teacher, or its own if it is a classifier; None without one.

    Args:
        teacher: as it was loaded: its name leads to its head.
        source: as for `load_linear_head`, whose errors are raised; None: the teacher's own, which
            is left out with a warning where it does not fit.
        classes: of the images.
    """
    if source is not None:
        return load_linear_head(source, config=teacher.config, classes=classes)[0]
    architectures = teacher.config.architectures or []
    if not any(name.endswith("ForImageClassification") for name in architectures):
        return None
    try:
        return load_linear_head(teacher.name_or_path, config=teacher.config, classes=classes)[0]
    except ValueError as error:
        logger.warning("Validation without accuracy: its own head does not fit. %s", error)
        return None


def open_validation(
    arguments: ValidationArguments,
    teacher: PreTrainedModel,
    chains: list[Chain],
    *,
    processor,
    reading: ReadingArguments,
    num_workers: int = 0,
) -> Validation | None:
    """Open the images and the head that a training validates with; None without a dataset.

    Args:
        teacher: as it was loaded: its name leads to its head.
        processor: image processor that the blocks are trained with.
        reading: how the images are read, and by how many processes (`num_workers`).

    Raises:
        ValueError: an interval or a head without a dataset, or a head that doesn't fit the teacher.
    """
    if arguments.validation_dataset is None:
        for name in ("validate_every", "validation_head"):
            if getattr(arguments, name):
                raise ValueError(f"{name}={getattr(arguments, name)} needs --validation_dataset.")
        return None
    images = ImageViews(
        load_images(arguments.validation_dataset, arguments.validation_split, reading),
        processor,
        reading=reading,
    )
    head = None
    if images.labels.min() >= 0:
        head = teacher_head(teacher, arguments.validation_head, images.classes)
    elif arguments.validation_head:
        raise ValueError(f"{arguments.validation_dataset} has images without a class for the head.")
    measure = TrajectoryValidation(
        teacher,
        head,
        images,
        chains,
        num_images=arguments.validation_images,
        num_workers=num_workers,
    )
    return Validation(measure, arguments.validate_every)
