"""Interventions on a trajectory: push a state, swap layers.

Every function takes the trajectory of a batch and returns figures per image, as `measure`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .measures import angles, directions
from .systems import DepthSystem

_Figures = dict[tuple[str, ...], torch.Tensor]


def random_directions(
    batch: Mapping[str, torch.Tensor], shape: tuple[int, int], seed: int
) -> torch.Tensor:
    """Draw directions uniform on the unit sphere, (B, *shape), from seed, image and view alone."""
    draws = []
    for key in zip(batch["image_id"].tolist(), batch["view"].tolist(), strict=True):
        generator = np.random.default_rng((seed, *key))
        draws.append(generator.standard_normal(shape, dtype=np.float32))
    return directions(torch.from_numpy(np.stack(draws)))


def self_correction(
    system: DepthSystem,
    states: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    *,
    group: str,
    layers: Sequence[int],
    epsilons: Sequence[float],
    seed: int = 0,
) -> _Figures:
    """Push x_ℓ to x_ℓ + ε‖x_ℓ‖u, u uniform on the sphere, and let the rest of the model run on.

    The same u serves all models, layers and ε.

    Args:
        states: the trajectory, (B, L + 1, N, D), of the images of a `batch`.
        group: the tokens to push: cls, registers, patches or all.
        layers: ℓ, from 0 to L − 1.
        seed: of u.

    Returns:
        `(self_correction, group, ε, ℓ)`: the angle in degrees between the pushed and the untouched
        tokens after the layers ℓ … L, mean over the tokens, (B, L − ℓ + 1).
    """
    tokens = {"all": slice(None), **system.layout.groups()}[group]
    shape = tuple(states[0, 0, tokens].shape)
    u = random_directions(batch, shape, seed).to(states)

    # push, run on, compare
    figures: _Figures = {}
    for layer in layers:
        untouched = states[:, layer:, tokens]
        for epsilon in epsilons:
            start = states[:, layer].clone()
            lengths = start[:, tokens].norm(dim=-1, keepdim=True)
            start[:, tokens] += epsilon * lengths * u
            pushed = system.run(start, start=layer)[:, :, tokens]
            key = ("self_correction", group, f"{epsilon:g}", str(layer))
            figures[key] = angles(pushed, untouched).mean(dim=-1)
    return figures


def layer_swap(
    system: DepthSystem,
    states: torch.Tensor,
    swaps: Sequence[Mapping[int, int]],
    labels: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Replace some layers of a teacher by others of its own (paper, Fig. 15).

    Args:
        states: the untouched trajectory of a teacher, (B, L + 1, N, D).
        swaps: {layer: its replacement} each.
        labels: (B,), for the accuracy of the system's head.

    Returns:
        `cosine`, (B, swaps): between the last states with and without the swap, mean over the
        tokens of cls or, where there is none, of the patches. With labels and a head `accuracy`:
        1 where the class is right, else 0.
    """
    groups = system.layout.groups()
    tokens = groups.get("cls", groups["patches"])
    untouched, columns = directions(states[:, -1, tokens]), {"cosine": [], "accuracy": []}
    for swap in swaps:
        # run on from the first layer that is replaced
        start = min(swap) - 1
        last = system.run(states[:, start], start=start, swapped=swap)[:, -1]
        cosines = (directions(last[:, tokens]) * untouched).sum(dim=-1)
        columns["cosine"].append(cosines.mean(dim=-1))
        if system.head is not None and labels is not None:
            columns["accuracy"].append((system.predict(last) == labels.to(last.device)).float())
    return {name: torch.stack(values, dim=1) for name, values in columns.items() if values}
