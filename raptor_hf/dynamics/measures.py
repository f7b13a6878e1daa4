"""Measures of a trajectory x_0 … x_L on the unit sphere, x̂ = x / ‖x‖.

Norms grow with depth, so states do not converge, but their directions may (arXiv 2512.19941, §5).
All measures take states (B, L + 1, N, D) and give numbers per image.
"""

from collections import defaultdict

import torch
from torch.nn import functional

from ..configuration_raptor import TokenLayout


def directions(states: torch.Tensor) -> torch.Tensor:
    """Scale states (…, D) to length 1; a state of length 0 stays 0."""
    return functional.normalize(states, dim=-1)


def angles(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the angles in degrees between vectors (…, D), from 0 to 180.

    Computed as 2·atan2(|â − b̂|, |â + b̂|), which is exact near 0° too, unlike the arc cosine.
    """
    first, second = directions(first), directions(second)
    halves = (first - second).norm(dim=-1), (first + second).norm(dim=-1)
    return torch.rad2deg(2 * torch.atan2(*halves))


def measure(states: torch.Tensor, layout: TokenLayout) -> dict[tuple[str, ...], torch.Tensor]:
    """Compute all measures that need states (B, L + 1, N, D) alone.

    Returns:
        For every token group, as means over its tokens:

        - `convergence`: γ_ℓ = ⟨x̂_ℓ, x̂_L⟩, and `norm`: ‖x_ℓ‖, (B, L + 1) each;
        - `speed`: the angle in degrees between x̂_ℓ and x̂_{ℓ+1}, (B, L).

        Of the updates x̂_{ℓ+1} − x̂_ℓ, (B, L): `coherence` of patches, and `effective rank` of all
        tokens.
    """
    groups, last = layout.groups(), directions(states[:, -1])
    columns: dict[tuple[str, ...], list[torch.Tensor]] = defaultdict(list)
    before = None
    for layer in range(states.shape[1]):
        # of the state itself
        now = directions(states[:, layer])
        for name, group in groups.items():
            cosines = (now * last)[:, group].sum(dim=-1)
            columns["convergence", name].append(cosines.mean(dim=1))
            columns["norm", name].append(states[:, layer, group].norm(dim=-1).mean(dim=1))

        # of the step from the state before
        if before is not None:
            update = now - before
            for name, group in groups.items():
                turn = angles(before[:, group], now[:, group])
                columns["speed", name].append(turn.mean(dim=1))
            columns["updates", "coherence"].append(coherence(update[:, groups["patches"]]))
            columns["updates", "effective rank"].append(effective_rank(update))
        before = now
    return {key: torch.stack(values, dim=1) for key, values in columns.items()}


def coherence(vectors: torch.Tensor) -> torch.Tensor:
    """Return κ = ‖mean over n of the directions‖ of vectors (B, n, D), as (B,).

    It is 1 where all point the same way, 1/√n where they are orthogonal.
    """
    return directions(vectors).mean(dim=1).norm(dim=-1)


def effective_rank(updates: torch.Tensor) -> torch.Tensor:
    """Return the effective rank of updates (B, N, D) of N tokens, (B,); NaN where nothing moves.

    It is exp of the entropy of the singular values' shares σ / Σσ (Roy & Vetterli 2007).
    """
    updates = updates.double()
    if updates.shape[1] > updates.shape[2]:
        updates = updates.transpose(1, 2)
    # the Gram matrix of the smaller side is many times faster than singular values
    sizes = torch.linalg.eigvalsh(updates @ updates.transpose(1, 2)).clamp(min=0).sqrt()
    return torch.special.entr(sizes / sizes.sum(dim=-1, keepdim=True)).sum(dim=-1).exp()
