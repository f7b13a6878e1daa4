"""Measure a teacher and its Raptors in one pass over the images."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.data import ImageViews, batches
from raptor_hf.dynamics.interventions import draw_swaps, layer_swap, more_time, self_correction
from raptor_hf.dynamics.measures import Spread, boundary_speed, measure
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.phases.cuts import check_partition, phase_contrast
from raptor_hf.phases.distance import image_distances, tidy_distances
from raptor_hf.runs.processes import progress_bar

SWAPPED = 3  # layers at once
_SWAP_DRAWS = 20  # of each kind
_SWAPS = ("same_phase", "other_phase_near")
_EPSILONS = (0.01, 0.1, 0.5)  # lengths of a push, as shares of the state's
_EXTRA_APPLICATIONS = 12
_RANDOM_PARTITIONS = 100
_BATCH_SIZE = 16


def partition_name(phases: Sequence[int]) -> str:
    """Return the name of a partition in results: `"3-3-6"`."""
    return "-".join(map(str, phases))


def skipped_analyses(system: DepthSystem, partitions: Sequence[list[int]]) -> dict[str, str]:
    """Return the analyses that a model does not allow, each with the reason."""
    reasons = {}
    if not partitions:
        no_phases = "it needs phases: give --phases_file (training/find_phases.py), or a Raptor"
        reasons = dict.fromkeys(("layer_swap", "phase_contrast"), no_phases)
    if not system.can_run_on:
        no_layers = "it runs layers one by one, and those of this model are not known"
        reasons |= dict.fromkeys(("self_correction", "layer_swap"), no_layers)
    if system.is_raptor:
        reasons["layer_swap"] = "it is for teachers: a Raptor has one block a phase"
    else:
        reasons["more_time"] = "it is for Raptors: a teacher has no block to apply again"
    return reasons


class ModelStudy:
    """One model's part of the pass.

    Args:
        system: the model.
        partitions: of its layers into phases; a Raptor is studied by its own alone.
        seed: of pushes, swaps and partitions.
    """

    def __init__(self, system: DepthSystem, partitions: Sequence[list[int]], *, seed: int):
        self.system, self.seed = system, seed
        self.partitions = [system.phases] if system.is_raptor else list(partitions)
        for phases in self.partitions:
            check_partition(phases, system.depth)
        self.skipped = skipped_analyses(system, self.partitions)
        self.spread = Spread()
        self.distance_sum, self.num_images = 0.0, 0
        # the swaps to try, by partition, kind and number of layers
        self.swaps: dict[tuple[str, ...], list[dict[int, int]]] = {}
        for phases in self.partitions if "layer_swap" not in self.skipped else ():
            for kind in _SWAPS:
                drawn = draw_swaps(phases, kind, SWAPPED, draws=_SWAP_DRAWS, seed=seed)
                if drawn:
                    self.swaps[partition_name(phases), kind, str(SWAPPED)] = drawn

    def add(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Add some images."""
        system = self.system
        states, labels = system.trajectory(batch), batch["label"]
        # what needs the states alone
        self.spread.add(measure(states, system.layout))
        distances = image_distances(states, system.layout)
        self.distance_sum = self.distance_sum + distances.mean(dim=0).cpu() * len(states)
        self.num_images += len(states)
        # what runs the model again
        if "self_correction" not in self.skipped:
            self._push(states, batch, system.layout)
        if self.swaps and system.head is not None:
            right = (system.predict(states[:, -1]) == labels.to(states.device)).float()
            self.spread.add({("layer_swap", "untouched", "accuracy"): right})
        for key, swaps in self.swaps.items():
            figures = layer_swap(system, states, swaps, labels)
            self.spread.add({("layer_swap", *key, name): v for name, v in figures.items()})
        if "more_time" not in self.skipped:
            self.spread.add(more_time(system, states, _EXTRA_APPLICATIONS, labels))

    def _push(
        self, states: torch.Tensor, batch: Mapping[str, torch.Tensor], layout: TokenLayout
    ) -> None:
        """Push cls and patches at four depths, and run on."""
        depth = self.system.depth
        layers = sorted({quarter * depth // 4 for quarter in range(4)})
        for group in ("cls", "patches"):
            if group in layout.groups():
                figures = self_correction(
                    self.system,
                    states,
                    batch,
                    group=group,
                    layers=layers,
                    epsilons=_EPSILONS,
                    seed=self.seed,
                )
                self.spread.add(figures)

    def result(self) -> dict:
        """Return all figures, ready for JSON, by the names in the docstrings of the measures."""
        # means and standard deviations over the images, and what follows from the means
        figures, seed = self.spread.summary(), self.seed
        for group, values in figures["speed"].items():
            speed = self.spread.mean("speed", group)
            values["at_boundaries"] = {
                partition_name(phases): boundary_speed(speed, phases, seed=seed)
                for phases in self.partitions
            }
        if "layer_swap" in figures:
            figures["layer_swap"]["swaps"] = {" ".join(key): s for key, s in self.swaps.items()}
        if "phase_contrast" not in self.skipped:
            distance = tidy_distances((self.distance_sum / self.num_images).numpy())
            figures["phase_contrast"] = {}
            for phases in self.partitions:
                contrast = phase_contrast(distance, phases, draws=_RANDOM_PARTITIONS, seed=seed)
                figures["phase_contrast"][partition_name(phases)] = contrast
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
    *,
    seed: int = 0,
    num_images: int | None = None,
    batch_size: int = _BATCH_SIZE,
    num_workers: int = 0,
) -> list[dict]:
    """Measure some models on the same images, each of which is read once.

    Memory holds a batch of states.

    Args:
        systems: teacher and Raptors.
        images: each is looked at once, as it is.
        partitions: of the teacher's layers into phases.
        seed: of the images, pushes, swaps and partitions.
        num_images: so many, drawn at random; None: all.
        batch_size: images at a time.

    Returns:
        A dict for every model, see `ModelStudy.result`.

    Raises:
        ValueError: states that are not finite, partitions that do not cover a model's layers, or
            fewer than two images.
    """
    # the same images for all models, drawn at random
    rows = np.random.default_rng(seed).permutation(len(images.image_ids))[:num_images]
    if len(rows) < 2:
        raise ValueError(f"A study needs two images at least; got {len(rows)}.")
    studies = [ModelStudy(one, partitions, seed=seed) for one in systems]
    with progress_bar("depth as time", len(studies) * len(rows), unit="image") as bar:
        for batch in batches(images, batch_size, None, rows=rows, num_workers=num_workers):
            for study in studies:
                study.add(batch)
                bar.update(len(batch["label"]))
    return [study.result() for study in studies]
