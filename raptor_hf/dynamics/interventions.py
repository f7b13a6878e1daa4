"""Interventions on a trajectory: push a state, swap layers, apply the last block more often.

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


def swap_candidates(phases: Sequence[int], kind: str) -> dict[int, list[int]]:
    """Return the layers that may replace each layer (1 … L), where there are any.

    Args:
        phases: lengths that sum to L.
        kind: `"same_phase"`, or `"other_phase_near"`: of another phase, and no farther away than
            the longest phase is long.
    """
    phase = np.repeat(np.arange(len(phases)), phases)
    first, second = np.meshgrid(np.arange(len(phase)), np.arange(len(phase)), indexing="ij")
    allowed = (phase[first] == phase[second]) == (kind == "same_phase")
    allowed &= (first != second) & (abs(first - second) < max(phases))
    return {n + 1: (np.flatnonzero(row) + 1).tolist() for n, row in enumerate(allowed) if row.any()}


def draw_swaps(
    phases: Sequence[int], kind: str, number: int, *, draws: int, seed: int = 0
) -> list[dict[int, int]]:
    """Draw random swaps of so many layers, {layer: its replacement}.

    Returns:
        So many draws; none where fewer layers than `number` have a replacement.
    """
    candidates = swap_candidates(phases, kind)
    if len(candidates) < number:
        return []
    swaps = []
    for draw in range(draws):
        generator = np.random.default_rng((seed, draw, number))
        layers = sorted(generator.choice(list(candidates), size=number, replace=False).tolist())
        swaps.append({layer: int(generator.choice(candidates[layer])) for layer in layers})
    return swaps


def layer_swap(
    system: DepthSystem,
    states: torch.Tensor,
    swaps: Sequence[Mapping[int, int]],
    labels: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Replace some layers of a teacher by others of its own (paper, Fig. 15).

    Args:
        states: the untouched trajectory of a teacher, (B, L + 1, N, D).
        swaps: as from `draw_swaps`.
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


@torch.no_grad()
def more_time(
    system: DepthSystem, states: torch.Tensor, extra: int, labels: torch.Tensor | None = None
) -> _Figures:
    """Apply the last block of a Raptor up to m more times than the teacher has layers.

    Args:
        states: the trajectory, (B, L + 1, N, D).
        extra: the largest m.
        labels: (B,), for the accuracy of the system's head.

    Returns:
        With the block's depth `held` at L or `free` (L + 1, L + 2, …), for every token group:
        `convergence`, the cosine of the state after m = 0 … applications with the one after layer
        L, `speed`, the angle in degrees between successive states, and with labels and a head
        `accuracy`. Values are NaN from an overflow on.
    """
    groups, block, figures = system.layout.groups(), system.model.blocks[-1], {}
    rotary = system.model.position_embeddings(states[:, -1], system.image_size)
    for depth_mode in ("held", "free"):
        # apply
        run = [states[:, -1]]
        for m in range(1, extra + 1):
            depth = system.depth + (m if depth_mode == "free" else 0)
            depth = torch.full((1,), depth, device=states.device)
            run.append(block(run[-1], depth, position_embeddings=rotary))
        run = torch.stack(run, dim=1)

        # measure
        for name, group in groups.items():
            tokens = directions(run[:, :, group])
            cosines = (tokens * tokens[:, :1]).sum(dim=-1)
            figures["more_time", depth_mode, "convergence", name] = cosines.mean(dim=-1)
            turns = angles(tokens[:, 1:], tokens[:, :-1])
            figures["more_time", depth_mode, "speed", name] = turns.mean(dim=-1)
        if system.head is not None and labels is not None:
            labels = labels.to(run.device)
            right = [(system.predict(state) == labels).float() for state in run.unbind(1)]
            figures["more_time", depth_mode, "accuracy"] = torch.stack(right, dim=1)
    return figures
