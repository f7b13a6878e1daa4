"""Dynamic mode decomposition along depth: one linear map K for a phase, x̂_{ℓ+1} ≈ K x̂_ℓ.

K is fitted to all layers of a phase together, in the basis of the few directions that hold the
energy of its states, from D × D sums that do not grow with the number of images. The first half of
the images fits, the second half judges: K^p against the identity, which says that nothing moves.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from raptor_hf.dynamics.measures import directions

_ENERGY = 0.999  # share of the squared states that the chosen rank keeps
_RIDGE = 1e-4  # share of the mean energy of a kept direction


class _LinearMap(NamedTuple):
    """K = basis · reduced · basisᵀ."""

    basis: torch.Tensor  # (D, r), orthonormal
    reduced: torch.Tensor  # (r, r)

    @property
    def eigenvalues(self) -> np.ndarray:
        """(r,), complex, the largest first."""
        values = torch.linalg.eigvals(self.reduced).cpu().numpy()
        return values[np.argsort(-abs(values), kind="stable")]

    def power(self, states: torch.Tensor, p: int) -> torch.Tensor:
        """Apply K^p to states (…, D)."""
        matrix = torch.linalg.matrix_power(self.reduced, p).T.to(states)
        basis = self.basis.to(states)
        return states @ basis @ matrix @ basis.T


def fit_linear_map(
    second: torch.Tensor, cross: torch.Tensor, *, energy: float = _ENERGY, ridge: float = _RIDGE
) -> _LinearMap:
    """Fit the linear map that takes states to their successors, by ridge regression.

    Args:
        second: (D, D), Σ x xᵀ over the states.
        cross: (D, D), Σ x⁺ xᵀ over states and their successors.
        energy: the rank is the smallest whose directions hold this share of Σ ‖x‖².
        ridge: λ as a share of the mean energy of the kept directions.

    Raises:
        ValueError: sums that are not square and of one size, or all zero; energy or ridge out of
            range.
    """
    if second.shape != cross.shape or second.ndim != 2 or second.shape[0] != second.shape[1]:
        raise ValueError(
            f"Both sums must be (D, D); got {tuple(second.shape)} and {tuple(cross.shape)}."
        )
    if not 0 < energy <= 1 or ridge < 0:
        raise ValueError(f"energy lies in (0, 1] and ridge is ≥ 0; got {energy} and {ridge}.")
    values, vectors = torch.linalg.eigh(second.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # a direction that holds no more than rounding is no direction of the states
    possible = int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum())
    shares = values.cumsum(0) / values.sum()
    rank = min(possible, int((shares < energy).sum()) + 1)
    if rank == 0:
        raise ValueError("A linear map needs states that are not all zero.")
    basis, kept = vectors[:, :rank], values[:rank]
    reduced = basis.T @ cross.double() @ basis / (kept + ridge * kept.mean())
    return _LinearMap(basis, reduced)


class LinearModes:
    """Linear maps inside the phases of one token group, as the images stream by.

    Args:
        spans: (start, stop) of the phases; each map takes layers start … stop − 1 one further.
        images: how many will come by; those of the first half fit.
    """

    def __init__(self, spans: list[tuple[int, int]], images: int):
        self.spans, self.fitting = spans, images // 2
        self.seconds: dict[int, torch.Tensor] = {}  # layer -> Σ x̂_ℓ x̂_ℓᵀ
        self.crosses: dict[int, torch.Tensor] = {}  # layer -> Σ x̂_{ℓ+1} x̂_ℓᵀ
        self.maps: dict[tuple[int, int], _LinearMap] = {}
        self.sums: dict[
            tuple[int, int], np.ndarray
        ] = {}  # (2, steps): of the map, of standing still
        self.num_evaluated = 0

    def add(self, states: torch.Tensor) -> None:
        """Add the group's tokens of some images, (B, L + 1, n, D)."""
        units = directions(states)
        first = max(0, min(self.fitting, len(units)))
        self.fitting -= first
        if first:
            self.accumulate(units[:first])
        if first < len(units):
            self.evaluate(units[first:])

    def accumulate(self, units: torch.Tensor) -> None:
        """Add to the sums that maps are fitted to."""
        flat = units.transpose(0, 1).flatten(1, 2)
        for layer in range(len(flat)):
            second = (flat[layer].T @ flat[layer]).double().cpu()
            self.seconds[layer] = self.seconds.get(layer, 0) + second
            if layer + 1 < len(flat):
                cross = (flat[layer + 1].T @ flat[layer]).double().cpu()
                self.crosses[layer] = self.crosses.get(layer, 0) + cross

    def evaluate(self, units: torch.Tensor) -> None:
        """Compare K^p x̂_ℓ, and x̂_ℓ itself, with x̂_{ℓ+p} by their cosines, inside a phase."""
        for start, stop in self.spans:
            layers = range(start, stop)
            if (start, stop) not in self.maps:
                second = sum(self.seconds[layer] for layer in layers)
                cross = sum(self.crosses[layer] for layer in layers)
                self.maps[start, stop] = fit_linear_map(second, cross)
            fitted, sums = self.maps[start, stop], np.zeros((2, stop - start))
            for p in range(1, stop - start + 1):
                now, then = units[:, start : stop + 1 - p], units[:, start + p : stop + 1]
                for row, guess in enumerate((fitted.power(now, p), now)):
                    sums[row, p - 1] += (
                        cosine_similarity(guess, then, dim=-1).mean(dim=(1, 2)).sum().item()
                    )
            self.sums[start, stop] = self.sums.get((start, stop), 0) + sums
        self.num_evaluated += len(units)

    def result(self) -> dict:
        """Return the figures of every phase, by its layers (`"4-6"`).

        Returns:
            `rank`, `eigenvalues` as [real, imaginary], and the mean cosines that `map` and
            `identity` reach p = 1, 2, … steps ahead.
        """
        result = {}
        for (start, stop), fitted in self.maps.items():
            values = fitted.eigenvalues
            cosines = self.sums[start, stop] / self.num_evaluated
            result[f"{start + 1}-{stop}"] = {
                "rank": len(values),
                "eigenvalues": np.stack([values.real, values.imag], axis=1).tolist(),
                "map": cosines[0].tolist(),
                "identity": cosines[1].tolist(),
            }
        return result
