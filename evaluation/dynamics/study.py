"""All analyses of depth as time in one pass over the images, for a teacher and its Raptors."""
# `study_models` is over 40 lines: half of it is signature and docstring.

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from raptor_hf.activations.store import StoredActivations
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
from raptor_hf.dynamics.systems import System
from raptor_hf.phases.cuts import check_partition, phase_contrast
from raptor_hf.phases.distance import image_distances
from raptor_hf.runs.processes import process_state, progress_bar

from .arguments import StudyArguments
from .class_basins import ClassBasins, check_classes
from .linear_modes import LinearModes

SWAPPED = (1, 2, 3)  # layers at once
_TOKENS_ON_CPU, _TOKENS_ON_GPU = 64 * 21, 64 * 257  # of the images in a batch


def partition_name(phases: Sequence[int]) -> str:
    """Return what a partition is called in results: `"3-3-6"`."""
    return "-".join(map(str, phases))


def left_out(
    system: System, partitions: Sequence[list[int]], options: StudyArguments, *, labelled: bool
) -> dict[str, str]:
    """Return which of the wanted analyses a model can't be asked for, and why.

    Args:
        labelled: whether every image has a class.
    """
    no_cls = "it needs a cls token, and this model has none"
    no_layers = "it runs layers one by one, and those of this model are not known"
    no_phases = "it needs phases: give --phases_file (training/find_phases.py), or a Raptor"
    reasons = {}
    if not labelled:
        reasons["class_basins"] = "it needs a class of every image, and some have none"
    if "cls" not in system.layout.groups():
        reasons["class_basins"] = no_cls
    if not system.can_run_on:
        reasons["self_correction"] = no_layers
    for group in options.push_groups:
        if group not in (*system.layout.groups(), "all"):
            reasons[f"self_correction of {group}"] = f"this model has no token of the group {group}"
    if not system.can_run_on or system.is_raptor:
        reasons["layer_swap"] = (
            "it is for teachers: a Raptor has one block for all layers of a phase"
            if system.is_raptor
            else no_layers
        )
    if not system.is_raptor:
        reasons["more_time"] = "it is for Raptors: a teacher has no block to apply again"
    if not partitions:
        for name in ("layer_swap", "phase_contrast", "linear_modes"):
            reasons.setdefault(name, no_phases)
    return {n: why for n, why in reasons.items() if n.split(" ")[0] in options.analyses}


class ModelStudy:
    """One model's part of the pass.

    Args:
        system: the model.
        partitions: into phases, of its layers; a Raptor has its own alone.
        number: of images that will come by.
        labelled: whether each has a class.
        folder: for what waits on the disk meanwhile.
    """

    def __init__(
        self,
        system: System,
        partitions: Sequence[list[int]],
        options: StudyArguments,
        *,
        number: int,
        labelled: bool,
        folder: str | Path,
    ):
        self.system, self.options, self.number, self.folder = system, options, number, folder
        self.partitions = [system.phases] if system.is_raptor else list(partitions)
        for phases in self.partitions:
            check_partition(phases, system.depth)
        self.left_out = left_out(system, self.partitions, options, labelled=labelled)
        self.wanted = [name for name in options.analyses if name not in self.left_out]
        self.spread, self.distance, self.compared = Spread(), 0.0, 0
        self.basins: ClassBasins | None = None
        self.modes: dict[str, LinearModes] = {}
        self.swaps = self.all_swaps() if "layer_swap" in self.wanted else {}
        depth = system.depth
        self.push_layers = options.push_layers or sorted({n * depth // 4 for n in range(4)})

    def all_swaps(self) -> dict[tuple[str, ...], list[dict[int, int]]]:
        """Return the swaps that will be tried, by partition, kind and number of layers."""
        draws, seed = self.options.swap_draws, self.options.seed
        swaps = {
            (partition_name(phases), kind, str(number)): draw_swaps(
                phases, kind, number, draws=draws, seed=seed
            )
            for phases in self.partitions
            for kind in SWAPS
            for number in SWAPPED
        }
        return {key: swaps_of_kind for key, swaps_of_kind in swaps.items() if swaps_of_kind}

    @property
    def num_parts(self) -> int:
        """How many steps `add` takes."""
        pushed = self.options.push_groups if "self_correction" in self.wanted else []
        return 1 + len(pushed) + ("more_time" in self.wanted) + len(self.swaps)

    def add(self, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Add some images, or stored trajectories, step by step, so that a bar can move."""
        states, groups = self.system.trajectory(batch), self.system.layout.groups()
        self.spread.add(measure(states, self.system.layout))
        distances = image_distances(states, self.system.layout)
        self.distance = self.distance + distances.sum(dim=0).cpu()
        self.compared += len(distances)
        if "class_basins" in self.wanted:
            if self.basins is None:
                shape = (states.shape[1], states.shape[3])
                self.basins = ClassBasins(self.number, shape, self.folder)
            self.basins.add(states[:, :, 0], batch["label"])
        if "linear_modes" in self.wanted:
            for group in [name for name in ("cls", "patches") if name in groups]:
                self.modes.setdefault(group, LinearModes(self.spans(), self.number))
                self.modes[group].add(states[:, :, groups[group]])
        yield
        yield from self.intervene(states, batch)

    def intervene(self, states: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Push, go on, swap, as far as it is wanted."""
        system, options, labels = self.system, self.options, batch["label"]
        pushed = options.push_groups if "self_correction" in self.wanted else []
        for group in pushed:
            if f"self_correction of {group}" not in self.left_out:
                figures = self_correction(
                    system, states, batch, group=group, layers=self.push_layers,
                    epsilons=options.epsilons, seed=options.seed,
                )  # fmt: skip
                self.spread.add(figures)
            yield
        if "more_time" in self.wanted:
            self.spread.add(more_time(system, states, options.extra_applications, labels))
            yield
        if self.swaps and system.head is not None:
            right = (system.predict(states[:, -1]) == labels.to(states.device)).float()
            self.spread.add({("layer_swap", "untouched", "accuracy"): right})
        for key, swaps in self.swaps.items():
            figures_of_swaps = layer_swap(system, states, swaps, labels)
            self.spread.add({("layer_swap", *key, name): v for name, v in figures_of_swaps.items()})
            yield

    def spans(self) -> list[tuple[int, int]]:
        """Return the spans of the phases of all partitions, each once."""
        return sorted({span for phases in self.partitions for span in phase_spans(phases)})

    def result(self) -> dict:
        """Return all figures, ready for JSON: see the docstrings of what made them."""
        system, figures = self.system, self.spread.summary()
        for group, values in figures["speed"].items():
            speed = self.spread.mean("speed", group)
            values["at_boundaries"] = {
                partition_name(phases): boundary_speed(speed, phases, seed=self.options.seed)
                for phases in self.partitions
            }
        for by_epsilon in figures.get("self_correction", {}).values():
            for by_layer in by_epsilon.values():
                for values in by_layer.values():
                    values["contraction"] = contraction(np.array(values["mean"]))
        if "layer_swap" in figures:
            figures["layer_swap"]["swaps"] = {" ".join(key): s for key, s in self.swaps.items()}
        if self.basins is not None:
            figures["class_basins"] = self.basins.result()
        if "phase_contrast" in self.wanted:
            distance = (self.distance / self.compared).numpy()
            np.fill_diagonal(distance, 0.0)
            draws, seed = self.options.random_partitions, self.options.seed
            figures["phase_contrast"] = {
                partition_name(phases): phase_contrast(distance, phases, draws=draws, seed=seed)
                for phases in self.partitions
            }
        if self.modes:
            figures["linear_modes"] = {group: modes.result() for group, modes in self.modes.items()}
        return {
            "model": system.name,
            "phases": system.phases,
            "partitions": self.partitions,
            "depth": system.depth,
            "num_images": self.number,
            "left_out": self.left_out,
            **figures,
        }


def study_models(
    systems: Sequence[System],
    images: ImageViews | StoredActivations,
    partitions: Sequence[list[int]],
    options: StudyArguments,
    *,
    folder: str | Path,
    num_images: int | None = None,
    batch_size: int = 0,
    num_workers: int = 0,
) -> list[dict]:
    """Measure some models on the same images, each of which is read once.

    Memory does not grow with the number of images: what has to wait, waits in a file.

    Args:
        systems: teacher and Raptors; of stored trajectories, those that run on from layer 0.
        images: each is looked at once, as it is: of augmented views none is.
        partitions: of the teacher's layers into phases.
        folder: for that file.
        batch_size: images at a time; 0: as many as take seconds, fewer of large ones on a CPU.
        num_images: so many, drawn at random; None: all.

    Returns:
        A dict for every model, see `ModelStudy.result`.

    Raises:
        ValueError: states that are not finite, partitions that do not cover a model's layers, too
            few images for class basins, no image.
    """
    rows, labels = plain_images(images)
    num_classes = len(np.unique(labels))
    positions = np.random.default_rng(options.seed).permutation(len(rows))[:num_images]
    rows, labels = rows[positions], labels[positions]
    batch_size = batch_size or _images_at_once(images, systems)
    if len(rows) < 2:
        raise ValueError(f"A study needs two images at least; got {len(rows)}.")
    labelled = bool((labels >= 0).all())
    studies = [
        ModelStudy(system, partitions, options, number=len(rows), labelled=labelled, folder=folder)
        for system in systems
    ]
    if any("class_basins" in study.wanted for study in studies):
        check_classes(labels, num_classes)
    parts = sum(study.num_parts for study in studies)
    with progress_bar("depth as time", parts * len(rows), unit="part") as bar:
        for batch in batches(images, batch_size, None, rows=rows, num_workers=num_workers):
            for study in studies:
                for _ in study.add(batch):
                    bar.update(len(batch["label"]))
    return [study.result() for study in studies]


def _images_at_once(images: ImageViews | StoredActivations, systems: Sequence[System]) -> int:
    """Return a batch size with so few tokens that a part of the study takes seconds."""
    first = images.__getitems__([0])
    num_tokens = systems[0].trajectory(first).shape[2]
    on_cpu = process_state().device.type == "cpu"
    return max(1, min(64, (_TOKENS_ON_CPU if on_cpu else _TOKENS_ON_GPU) // num_tokens))


def plain_images(images: ImageViews | StoredActivations) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that hold every image as it is, not a random view of it, and their labels."""
    if isinstance(images, StoredActivations):
        rows = np.flatnonzero(images.scalars["view"] == 0)
        return rows, images.scalars["label"].numpy()[rows]
    return np.arange(len(images.image_ids)), images.labels[images.image_ids].numpy()
