"""Interventions on a trajectory: swap layers."""

from collections.abc import Mapping, Sequence

import torch

from .measures import directions
from .systems import DepthSystem


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
