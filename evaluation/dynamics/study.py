"""Measure a teacher, its Raptors and its nulls in one pass over the images."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch

from evaluation.verdicts import estimate
from raptor_hf import make_raptor
from raptor_hf.data import ImageViews, batches
from raptor_hf.dynamics.fixed_points import apply_again, held_block, spectral_radius
from raptor_hf.dynamics.measures import measure
from raptor_hf.dynamics.nulls import null_networks
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.dynamics.tangents import tangent_growth
from raptor_hf.phases import find_phases
from raptor_hf.phases.cuts import check_partition
from raptor_hf.phases.distance import image_distances, tidy_distances
from raptor_hf.runs.files import read_json
from raptor_hf.runs.processes import progress_bar

from .claims import figures_of_claims

_DRAWS = 5  # null networks of each kind
_FEW = 50  # images of what runs a model again, and of nulls
_TIMES = 64  # applications of the held block
_BATCH_SIZE = 32


def find_partitions(phases_file: str | None, systems: Sequence[DepthSystem]) -> list[list[int]]:
    """Return the partitions of the teacher's layers: those of a file, or of the Raptors."""
    if phases_file:
        content = read_json(phases_file)
        if not isinstance(content.get("phases"), dict):
            raise ValueError(f"{phases_file} must be a phases.json of training/find_phases.py.")
        return list(content["phases"].values())
    partitions = {tuple(system.phases) for system in systems if system.phases}
    return sorted(map(list, partitions), key=lambda phases: (len(phases), phases))


def skipped_analyses(system: DepthSystem, partitions: Sequence[list[int]]) -> dict[str, str]:
    """Return the analyses that a model does not allow, each with the reason."""
    reasons = {}
    if not partitions:
        reasons["jump"] = "it needs phases: give --phases_file (training/find_phases.py)"
    if not system.can_run_on:
        no_layers = "it runs layers one by one, and those of this model are not known"
        reasons |= dict.fromkeys(("push", "nulls"), no_layers)
    if not system.is_raptor:
        reasons["held"] = "it is for Raptors: a teacher has no block to apply again"
    return reasons


def null_studies(
    teacher: DepthSystem, partitions: Sequence[list[int]], seed: int, *, held: bool
) -> list["NetworkStudy"]:
    """Return the studies of networks like the teacher, untrained and with layers in random order.

    With `held`, and phases, each holds the last block of a Raptor that is the mean of its layers.
    """
    studies = []
    for system in null_networks(teacher, _DRAWS, seed=seed):
        raptor = None
        if held and partitions:
            with torch.random.fork_rng():
                torch.manual_seed(seed + int(system.name.rpartition(" ")[2]))
                blocks = make_raptor(system.model, list(partitions[0]))
            blocks = blocks.eval().requires_grad_(False).to(system.model.device)
            raptor = replace(system, model=blocks)
        studies.append(NetworkStudy(system, partitions, seed=seed, null=True, raptor=raptor))
    return studies


class NetworkStudy:
    """One network's part of the pass.

    Args:
        system: the network.
        partitions: of its layers into phases; a Raptor is studied by its own alone, a null by its
            own max-cut into as many phases.
        seed: of pushes and tangents.
        null: whether the network is one.
        raptor: whose last block is held, by default the system if it is a Raptor.
    """

    def __init__(
        self,
        system: DepthSystem,
        partitions: Sequence[list[int]],
        *,
        seed: int,
        null: bool = False,
        raptor: DepthSystem | None = None,
    ):
        self.system, self.seed, self.null = system, seed, null
        self.raptor = system if system.is_raptor else raptor
        self.partitions = [system.phases] if system.is_raptor else list(partitions)
        for phases in self.partitions:
            check_partition(phases, system.depth)
        self.parts: dict[tuple[str, ...], list[torch.Tensor]] = {}
        self.distance_sum = 0.0

    def add(self, batch: Mapping[str, torch.Tensor], *, run: bool) -> None:
        """Add some images; with `run` what runs the network again, too."""
        system = self.system
        states = system.trajectory(batch)
        self._keep(measure(states, system.layout))
        distances = image_distances(states, system.layout)
        self.distance_sum = self.distance_sum + distances.sum(dim=0).cpu()
        if run and system.can_run_on:
            self._push(states, batch)
        if run and self.raptor is not None:
            last = states if system.is_raptor else self.raptor.trajectory(batch)
            self._hold(last[:, -1])

    def _keep(self, figures: Mapping[tuple[str, ...], torch.Tensor]) -> None:
        """Keep figures (B, …) of some images."""
        for key, values in figures.items():
            self.parts.setdefault(key, []).append(values.double().cpu())

    def _push(self, states: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> None:
        """Carry tangents on cls and on patches through the layers, from four depths each."""
        groups = [name for name in ("cls", "patches") if name in self.system.layout.groups()]
        starts = sorted({quarter * self.system.depth // 4 for quarter in range(4)})
        for group, start in product(groups, starts):
            options = {"group": group, "start": start, "seed": self.seed}
            found = tangent_growth(self.system, states, batch, **options)
            for name, values in found.items():
                self._keep({("push", group, str(start), name): values})

    def _hold(self, states: torch.Tensor) -> None:
        """Apply the last block again and again; of a Raptor, take its Jacobian, too."""
        step = held_block(self.raptor, states)
        run = apply_again(step, states, _TIMES)
        figures = {"update": (run[:, 1:] - run[:, :-1]).flatten(2).norm(dim=-1)}
        if not self.null:
            figures["radius"] = spectral_radius(step, states, seed=self.seed)
        self._keep({("held", name): values for name, values in figures.items()})

    def result(self) -> dict:
        """Return all figures, ready for JSON: means and standard deviations over the images."""
        found = {key: torch.cat(parts).numpy() for key, parts in self.parts.items()}
        number = len(found["speed", "patches"])
        partitions, tree = self.partitions, {}
        if self.null:
            distance = tidy_distances((self.distance_sum / number).numpy())
            partitions = [find_phases(distance, len(p), "maxcut") for p in self.partitions]
        for key, values in found.items():
            node = tree
            for part in key:
                node = node.setdefault(part, {})
            node |= {"mean": values.mean(axis=0).tolist(), "std": values.std(axis=0).tolist()}
        figures = figures_of_claims(found, partitions)
        return {
            "model": self.system.name,
            "phases": self.system.phases,
            "partitions": partitions,
            "depth": self.system.depth,
            "num_images": number,
            "skipped": skipped_analyses(self.system, self.partitions),
            # of the claims: mean, standard error, degrees of freedom
            "figures": {name: list(estimate(values)) for name, values in figures.items()},
            **tree,
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
) -> tuple[list[dict], list[dict]]:
    """Measure some models and their nulls on the same images, each of which is read once.

    Memory holds the states of a batch, and some numbers an image.

    Args:
        systems: teacher and Raptors.
        images: each is looked at once, as it is. The first 50 serve the nulls, and what runs a
            model again.
        partitions: of the teacher's layers into phases.
        seed: of the images, nulls, pushes and tangents.
        num_images: so many, drawn at random; None: all.
        batch_size: images at a time.

    Returns:
        A dict for every model, see `NetworkStudy.result`, and the same for every null.

    Raises:
        ValueError: states that are not finite, partitions that do not cover a model's layers, or
            fewer than two images.
    """
    rows = np.random.default_rng(seed).permutation(len(images.image_ids))[:num_images]
    if len(rows) < 2:
        raise ValueError(f"A study needs two images at least; got {len(rows)}.")
    studies, nulls = [NetworkStudy(one, partitions, seed=seed) for one in systems], []
    if not systems[0].is_raptor:
        held = any(system.is_raptor for system in systems)
        nulls = null_studies(systems[0], partitions, seed, held=held)
    total = len(studies) * len(rows) + len(nulls) * len(rows[:_FEW])
    with progress_bar("depth as time", total, unit="image") as bar:
        for part, run, among in (
            (rows[:_FEW], True, [*studies, *nulls]),
            (rows[_FEW:], False, studies),
        ):
            for batch in batches(images, batch_size, None, rows=part, num_workers=num_workers):
                for study in among:
                    study.add(batch, run=run)
                    bar.update(len(batch["label"]))
    return [study.result() for study in studies], [study.result() for study in nulls]
