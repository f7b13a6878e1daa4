"""Measure a teacher and its Raptors in one pass over the images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from raptor_hf.configuration_raptor import phase_spans
from raptor_hf.data import ImageViews, batches
from raptor_hf.dynamics.interventions import (
    SWAPS,
    contraction,
    draw_swaps,
    layer_swap,
    more_time,
    self_correction,
)
from raptor_hf.dynamics.measures import Spread, boundary_speed, measure
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.phases.cuts import check_partition, phase_contrast
from raptor_hf.phases.distance import image_distances
from raptor_hf.runs.processes import progress_bar

from .structure import ClassBasins, LinearModes

ANALYSES = (
    "class_basins",
    "self_correction",
    "layer_swap",
    "phase_contrast",
    "more_time",
    "linear_modes",
)
SWAPPED = (1, 2, 3)  # layers at once
_PUSH_GROUPS = ("cls", "patches")
_EPSILONS = (0.01, 0.1, 0.5)  # lengths of a push, as shares of the state's
_EXTRA_APPLICATIONS = 12
_IMAGES_A_CLASS = 10  # of fewer, class means say nothing, however well classes part
_BATCH_SIZE = 16


@dataclass(kw_only=True)
class StudyArguments:
    """Which analyses, and how much of each."""

    _argument_group_name = "analyses"

    analyses: list[str] = field(
        default_factory=lambda: list(ANALYSES), metadata={"help": "which; default: all"}
    )
    swap_draws: int = field(default=20, metadata={"help": "layer swap: random swaps of each kind"})
    random_partitions: int = field(
        default=100, metadata={"help": "phase contrast: random partitions to compare with"}
    )
    seed: int = field(default=0, metadata={"help": "of the images, pushes, swaps and partitions"})


def partition_name(phases: Sequence[int]) -> str:
    """Return the name of a partition in results: `"3-3-6"`."""
    return "-".join(map(str, phases))


def skipped_analyses(
    system: DepthSystem, partitions: Sequence[list[int]], wanted: Sequence[str], labels: np.ndarray
) -> dict[str, str]:
    """Return the analyses that a model or its images do not allow, each with the reason.

    Raises:
        ValueError: an analysis that does not exist.
    """
    if unknown := sorted(set(wanted) - set(ANALYSES)):
        raise ValueError(f"--analyses are {', '.join(ANALYSES)}; got {', '.join(unknown)}.")
    # images
    reasons, num_classes = {}, len(np.unique(labels))
    if (labels < 0).any():
        reasons["class_basins"] = "it needs a class of every image, and some have none"
    elif num_classes < 2 or len(labels) < _IMAGES_A_CLASS * num_classes:
        reasons["class_basins"] = (
            f"it needs two classes and {_IMAGES_A_CLASS} images a class; these are {len(labels)} "
            f"images of {num_classes} classes (more: --num_images)"
        )
    if "cls" not in system.layout.groups():
        reasons["class_basins"] = "it needs a cls token, and this model has none"
    # phases
    if not partitions:
        no_phases = "it needs phases: give --phases_file (training/find_phases.py), or a Raptor"
        for name in ("layer_swap", "phase_contrast", "linear_modes"):
            reasons[name] = no_phases
    # the model
    if not system.can_run_on:
        no_layers = "it runs layers one by one, and those of this model are not known"
        reasons["self_correction"] = reasons["layer_swap"] = no_layers
    if system.is_raptor:
        reasons["layer_swap"] = "it is for teachers: a Raptor has one block a phase"
    else:
        reasons["more_time"] = "it is for Raptors: a teacher has no block to apply again"
    return {name: reason for name, reason in reasons.items() if name in wanted}


class ModelStudy:
    """One model's part of the pass.

    Args:
        system: the model.
        partitions: of its layers into phases; a Raptor is studied by its own alone.
        labels: the classes of the images that will come, negative where there is none.
    """

    def __init__(
        self,
        system: DepthSystem,
        partitions: Sequence[list[int]],
        options: StudyArguments,
        labels: np.ndarray,
    ):
        self.system, self.options, self.num_images = system, options, len(labels)
        self.partitions = [system.phases] if system.is_raptor else list(partitions)
        for phases in self.partitions:
            check_partition(phases, system.depth)
        self.skipped = skipped_analyses(system, self.partitions, options.analyses, labels)
        self.wanted = [name for name in options.analyses if name not in self.skipped]
        self.spread = Spread()
        self.distance_sum, self.num_distances = 0.0, 0
        self.basins = ClassBasins()
        self.modes: dict[str, LinearModes] = {}
        self.swaps = self._draw_swaps() if "layer_swap" in self.wanted else {}

    def _draw_swaps(self) -> dict[tuple[str, ...], list[dict[int, int]]]:
        """Return the swaps to try, by partition, kind and number of layers."""
        swaps = {}
        for phases in self.partitions:
            for kind in SWAPS:
                for number in SWAPPED:
                    drawn = draw_swaps(
                        phases,
                        kind,
                        number,
                        draws=self.options.swap_draws,
                        seed=self.options.seed,
                    )
                    if drawn:
                        swaps[partition_name(phases), kind, str(number)] = drawn
        return swaps

    def add(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Add some images, or stored trajectories."""
        states, groups = self.system.trajectory(batch), self.system.layout.groups()
        # what needs the states alone
        self.spread.add(measure(states, self.system.layout))
        distances = image_distances(states, self.system.layout)
        self.distance_sum = self.distance_sum + distances.sum(dim=0).cpu()
        self.num_distances += len(distances)
        if "class_basins" in self.wanted:
            self.basins.add(states[:, :, 0], batch["label"])
        if "linear_modes" in self.wanted:
            for group in _PUSH_GROUPS:
                if group in groups:
                    self.modes.setdefault(group, LinearModes(self._spans(), self.num_images))
                    self.modes[group].add(states[:, :, groups[group]])
        # what runs the model again
        self._push(states, batch)
        self._swap(states, batch["label"])
        if "more_time" in self.wanted:
            self.spread.add(more_time(self.system, states, _EXTRA_APPLICATIONS, batch["label"]))

    def _push(self, states: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> None:
        """Push states at four depths, and run on."""
        if "self_correction" not in self.wanted:
            return
        depth = self.system.depth
        for group in _PUSH_GROUPS:
            if group in self.system.layout.groups():
                figures = self_correction(
                    self.system,
                    states,
                    batch,
                    group=group,
                    layers=sorted({quarter * depth // 4 for quarter in range(4)}),
                    epsilons=_EPSILONS,
                    seed=self.options.seed,
                )
                self.spread.add(figures)

    def _swap(self, states: torch.Tensor, labels: torch.Tensor) -> None:
        """Swap layers, as far as it is wanted."""
        if self.swaps and self.system.head is not None:
            right = (self.system.predict(states[:, -1]) == labels.to(states.device)).float()
            self.spread.add({("layer_swap", "untouched", "accuracy"): right})
        for key, swaps in self.swaps.items():
            figures = layer_swap(self.system, states, swaps, labels)
            self.spread.add({("layer_swap", *key, name): v for name, v in figures.items()})

    def _spans(self) -> list[tuple[int, int]]:
        """Return the spans of the phases of all partitions, each once."""
        return sorted({span for phases in self.partitions for span in phase_spans(phases)})

    def result(self) -> dict:
        """Return all figures, ready for JSON, by the names in the docstrings of the measures."""
        # means and standard deviations over the images, and what follows from the means
        figures, seed = self.spread.summary(), self.options.seed
        for group, values in figures["speed"].items():
            speed = self.spread.mean("speed", group)
            values["at_boundaries"] = {
                partition_name(phases): boundary_speed(speed, phases, seed=seed)
                for phases in self.partitions
            }
        for by_epsilon in figures.get("self_correction", {}).values():
            for by_layer in by_epsilon.values():
                for values in by_layer.values():
                    values["contraction"] = contraction(np.array(values["mean"]))
        if "layer_swap" in figures:
            figures["layer_swap"]["swaps"] = {" ".join(key): s for key, s in self.swaps.items()}
        # what waited for the last image
        if "class_basins" in self.wanted:
            figures["class_basins"] = self.basins.result()
        if "phase_contrast" in self.wanted:
            distance = (self.distance_sum / self.num_distances).numpy()
            np.fill_diagonal(distance, 0.0)
            draws = self.options.random_partitions
            figures["phase_contrast"] = {
                partition_name(phases): phase_contrast(distance, phases, draws=draws, seed=seed)
                for phases in self.partitions
            }
        if self.modes:
            figures["linear_modes"] = {group: modes.result() for group, modes in self.modes.items()}
        return {
            "model": self.system.name,
            "phases": self.system.phases,
            "partitions": self.partitions,
            "depth": self.system.depth,
            "num_images": self.num_images,
            "skipped": self.skipped,
            **figures,
        }


def study_models(
    systems: Sequence[DepthSystem],
    images: ImageViews,
    partitions: Sequence[list[int]],
    options: StudyArguments,
    *,
    num_images: int | None = None,
    batch_size: int = _BATCH_SIZE,
    num_workers: int = 0,
) -> list[dict]:
    """Measure some models on the same images, each of which is read once.

    Memory holds a batch of states, and for class basins the direction of the cls token of every
    image, (L + 1) · D numbers.

    Args:
        systems: teacher and Raptors.
        images: each is looked at once, as it is.
        partitions: of the teacher's layers into phases.
        batch_size: images at a time.
        num_images: so many, drawn at random; None: all.

    Returns:
        A dict for every model, see `ModelStudy.result`.

    Raises:
        ValueError: states that are not finite, partitions that do not cover a model's layers, or
            fewer than two images.
    """
    # the same images for all models, drawn at random
    rows = np.random.default_rng(options.seed).permutation(len(images.image_ids))[:num_images]
    labels = images.labels[images.image_ids].numpy()[rows]
    if len(rows) < 2:
        raise ValueError(f"A study needs two images at least; got {len(rows)}.")
    studies = [ModelStudy(system, partitions, options, labels) for system in systems]
    with progress_bar("depth as time", len(studies) * len(rows), unit="image") as bar:
        for batch in batches(images, batch_size, None, rows=rows, num_workers=num_workers):
            for study in studies:
                study.add(batch)
                bar.update(len(batch["label"]))
    return [study.result() for study in studies]
