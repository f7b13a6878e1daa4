"""Depth as time: what a trajectory x_0 … x_L does, measured on the unit sphere, x̂ = x / ‖x‖.

Norms grow with depth, so states do not converge, but their directions may (arXiv 2512.19941, §5).
All measures take states (B, L + 1, N, D) and give numbers per image; `Spread` keeps their mean and
standard deviation over the images that stream by, in memory that does not depend on how many.
What is done *to* trajectories is in `interventions`, linear maps between states in `linear_modes`,
classes in `class_basins`; `dynamics_study` runs all of them in one pass.
"""

from collections.abc import Mapping

import numpy as np
import torch

from ..configuration_raptor import TokenLayout
from ..phases.partitions import check_partition, random_phases

_RANDOM_PARTITIONS = 1000  # that a partition's boundaries are compared with


def directions(states: torch.Tensor) -> torch.Tensor:
    """Return states (…, D) at length 1; one of length 0 stays 0."""
    lengths = states.norm(dim=-1, keepdim=True)
    return states / torch.where(lengths > 0, lengths, 1)


def angles(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the angles in degrees between vectors (…, D), from 0 to 180.

    Worked out as 2·atan2(|â − b̂|, |â + b̂|), exact also where the arc cosine is not: near 0°.
    """
    first, second = directions(first), directions(second)
    halves = (first - second).norm(dim=-1), (first + second).norm(dim=-1)
    return torch.rad2deg(2 * torch.atan2(*halves))


def measure(states: torch.Tensor, layout: TokenLayout) -> dict[tuple[str, ...], torch.Tensor]:
    """Measure everything that needs nothing but trajectories, per image.

    Returns:
        For every token group, as means over its tokens:

        - `convergence`: γ_ℓ = ⟨x̂_ℓ, x̂_L⟩, and `norm`: ‖x_ℓ‖, (B, L + 1) each;
        - `speed`: the angle in degrees between x̂_ℓ and x̂_{ℓ+1}, (B, L).

        For patches `coherence` of `states`, κ_ℓ = ‖mean over patches of x̂_ℓ‖, (B, L + 1), and of
        `updates`, the same of the directions of x̂_{ℓ+1} − x̂_ℓ, (B, L). For all tokens
        `update_rank`, `stable` and `effective` (`update_ranks`), (B, L).
    """
    groups, last = layout.groups(), directions(states[:, -1])
    columns: dict[tuple[str, ...], list[torch.Tensor]] = {}

    def note(key: tuple[str, ...], values: torch.Tensor) -> None:
        columns.setdefault(key, []).append(values)

    before = None
    for layer in range(states.shape[1]):
        now = directions(states[:, layer])
        for name, group in groups.items():
            note(("convergence", name), (now * last)[:, group].sum(dim=-1).mean(dim=1))
            note(("norm", name), states[:, layer, group].norm(dim=-1).mean(dim=1))
            if before is not None:
                note(("speed", name), angles(before[:, group], now[:, group]).mean(dim=1))
        patches = groups["patches"]
        note(("coherence", "states"), coherence(now[:, patches]))
        if before is not None:
            update = now - before
            note(("coherence", "updates"), coherence(update[:, patches]))
            for kind, rank in update_ranks(update).items():
                note(("update_rank", kind), rank)
        before = now
    return {key: torch.stack(values, dim=1) for key, values in columns.items()}


def coherence(vectors: torch.Tensor) -> torch.Tensor:
    """Return κ = ‖mean over n of the directions‖ of vectors (B, n, D): (B,).

    1 where all point the same way, 1/√n where they are orthogonal.
    """
    return directions(vectors).mean(dim=1).norm(dim=-1)


def update_ranks(updates: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return how many directions updates (B, N, D) of N tokens take.

    Returns:
        `stable`: ‖U‖_F² / ‖U‖₂², and `effective`: exp of the entropy of the singular values' shares
        σ / Σσ (Roy & Vetterli 2007), (B,) each; NaN where nothing moves.
    """
    updates = updates.double()
    if updates.shape[1] > updates.shape[2]:
        updates = updates.transpose(1, 2)
    # by the Gram matrix of the smaller side: many times faster than singular values
    squares = torch.linalg.eigvalsh(updates @ updates.transpose(1, 2)).clamp(min=0)
    stable = squares.sum(dim=-1) / squares.amax(dim=-1)
    shares = squares.sqrt() / squares.sqrt().sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=-1)
    return {"stable": stable, "effective": entropy.exp()}


class Spread:
    """Mean and standard deviation over images of named figures, as the images stream by."""

    def __init__(self):
        self.sums: dict[tuple[str, ...], np.ndarray] = {}  # (2, …): of values, of their squares
        self.counts: dict[tuple[str, ...], int] = {}

    def add(self, figures: Mapping[tuple[str, ...], torch.Tensor]) -> None:
        """Add figures (B, …) of some images."""
        for key, values in figures.items():
            values = values.double()
            sums = torch.stack([values.sum(dim=0), values.square().sum(dim=0)]).cpu().numpy()
            self.sums[key] = self.sums.get(key, 0) + sums
            self.counts[key] = self.counts.get(key, 0) + len(values)

    def mean(self, *key: str) -> np.ndarray:
        """Return the mean over images of a figure: its shape without the images."""
        return self.sums[key][0] / self.counts[key]

    def std(self, *key: str) -> np.ndarray:
        """Return the standard deviation over the images themselves, not an estimate for others."""
        squares = self.sums[key][1] / self.counts[key]
        return np.sqrt(np.maximum(squares - self.mean(*key) ** 2, 0))

    def summary(self) -> dict:
        """Return all figures, nested by the parts of their names, with `mean` and `std` as
        lists.
        """
        tree: dict = {}
        for key in self.sums:
            node = tree
            for part in key:
                node = node.setdefault(part, {})
            node |= {"mean": self.mean(*key).tolist(), "std": self.std(*key).tolist()}
        return tree


def boundary_speed(speed: np.ndarray, phases: list[int], *, seed: int = 0) -> dict | None:
    """Return how much faster directions turn where one phase ends and the next begins.

    The first layer's turn, away from the embeddings, counts on neither side: phases are cut between
    layers 1 … L.

    Args:
        speed: (L,), of layer 1 … L.
        phases: lengths that sum to L.
        seed: of the random partitions.

    Returns:
        `ratio`: mean speed at the boundaries to that inside the phases; `above_random`: the share
        of random other partitions into as many runs whose ratio is smaller. None where there is no
        boundary or no inside.

    Raises:
        ValueError: phases that do not cover the layers.
    """
    check_partition(phases, len(speed))

    def ratio(lengths: list[int]) -> float:
        cuts = np.cumsum(lengths)[:-1]  # speed[c] is the turn from layer c to c + 1
        inside = np.setdiff1d(np.arange(1, len(speed)), cuts)
        return speed[cuts].mean() / speed[inside].mean()

    if not 1 < len(phases) < len(speed):
        return None
    own_ratio, seeds = ratio(phases), range(seed, seed + _RANDOM_PARTITIONS)
    draws = [random_phases(len(speed), len(phases), seed=draw) for draw in seeds]
    below = np.mean([own_ratio > ratio(lengths) for lengths in draws if lengths != list(phases)])
    return {"ratio": float(own_ratio), "above_random": float(below)}
