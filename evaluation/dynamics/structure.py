"""Structure of states over depth: classes that gather, and linear maps inside a phase."""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from raptor_hf.dynamics.measures import angles, directions

_ROUNDING = 1e-3  # degrees; a smaller angle counts as 0: all cls tokens start as the same one
_ENERGY = 0.999  # share of the squared states that the rank of a map keeps
_RIDGE = 1e-4  # share of the mean energy of a kept direction


class ClassBasins:
    """Angles of cls tokens to the mean directions of their classes, layer by layer.

    It keeps the directions of all cls tokens: (L + 1) · D numbers an image.
    """

    def __init__(self):
        self.directions: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []

    def add(self, cls: torch.Tensor, labels: torch.Tensor) -> None:
        """Add the cls tokens (B, L + 1, D) and classes (B,) of some images."""
        self.directions.append(directions(cls).cpu())
        self.labels.append(labels.cpu())

    def result(self) -> dict:
        """Return, per layer 0 … L, `mean` and `std` over the images.

        Returns:
            `own_angle`: degrees to the mean direction of the other images of the same class;
            `other_angle`: degrees to the nearest mean direction of another class; `silhouette`:
            (other − own) / max(other, own); `nearest_mean`: share of the images that are nearer to
            their own class. Images that are alone in their class are left out: `num_images` counts
            the others, `num_classes` all classes.
        """
        units, labels = torch.cat(self.directions), torch.cat(self.labels)
        classes, member = labels.unique(return_inverse=True)
        judged = (member.bincount()[member] > 1).nonzero()[:, 0]
        columns: dict[str, list[torch.Tensor]] = {}
        for layer in range(units.shape[1]):
            own, other = _class_angles(units[:, layer].double(), member, len(classes))
            own, other = own[judged], other[judged]
            larger = torch.maximum(own, other).clamp(min=torch.finfo(own.dtype).tiny)
            values = {"own_angle": own, "other_angle": other}
            values["silhouette"] = (other - own) / larger
            values["nearest_mean"] = (own < other).double()
            for name, column in values.items():
                columns.setdefault(name, []).append(column)
        summary = {}
        for name, column in columns.items():
            values = torch.stack(column, dim=1)
            std = values.std(dim=0, correction=0)
            summary[name] = {"mean": values.mean(dim=0).tolist(), "std": std.tolist()}
        counts = {"num_images": len(judged), "num_classes": len(classes)}
        return {**counts, **summary}


def _class_angles(
    units: torch.Tensor, member: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the angles to the own class without the image itself, and to the nearest other.

    Args:
        units: (n, D) directions.
        member: (n,), the index of the class of each.
    """
    sums = torch.zeros(num_classes, units.shape[1], dtype=units.dtype).index_add(0, member, units)
    own = angles(units, sums[member] - units)
    cosines = units @ directions(sums).T
    cosines[range(len(units)), member] = -2  # below every cosine
    other = angles(units, sums[cosines.argmax(dim=1)])
    return tuple(torch.where(angle < _ROUNDING, 0, angle) for angle in (own, other))


class LinearMap(NamedTuple):
    """K = basis · reduced · basisᵀ, from the states of a layer to those of the next."""

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
) -> LinearMap:
    """Fit the linear map from states to their successors by ridge regression.

    Args:
        second: (D, D), Σ x xᵀ over the states.
        cross: (D, D), Σ x⁺ xᵀ over states and their successors.
        energy: in (0, 1]; the rank is the smallest whose directions hold this share of Σ ‖x‖².
        ridge: λ as a share of the mean energy of the kept directions.

    Raises:
        ValueError: states that are all zero.
    """
    values, vectors = torch.linalg.eigh(second.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # a direction that holds no more than rounding is none
    rounding = values[0] * len(values) * torch.finfo(values.dtype).eps
    shares = values.cumsum(0) / values.sum()
    rank = min(int((values > rounding).sum()), int((shares < energy).sum()) + 1)
    if rank == 0:
        raise ValueError("A linear map needs states that are not all zero.")
    basis, kept = vectors[:, :rank], values[:rank]
    reduced = basis.T @ cross.double() @ basis / (kept + ridge * kept.mean())
    return LinearMap(basis, reduced)


class LinearModes:
    """Dynamic mode decomposition along depth: one linear map a phase, x̂_{ℓ+1} ≈ K x̂_ℓ.

    Maps are fitted from D × D sums, which do not grow with the number of images. The first half of
    the images fits; the second half compares K^p with the identity.

    Args:
        spans: (start, stop) of the phases; each map takes layers start … stop − 1 one further.
        num_images: how many will come.
    """

    def __init__(self, spans: list[tuple[int, int]], num_images: int):
        self.spans, self.left_to_fit, self.num_evaluated = spans, num_images // 2, 0
        self.sums: dict[tuple[int, int], list[torch.Tensor]] = {}  # span → Σ x̂ x̂ᵀ, Σ x̂⁺ x̂ᵀ
        self.maps: dict[tuple[int, int], LinearMap] = {}
        self.cosines: dict[tuple[int, int], np.ndarray] = {}  # span → (2, steps): K^p, identity

    def add(self, states: torch.Tensor) -> None:
        """Add a group's tokens of some images, (B, L + 1, n, D)."""
        units = directions(states)
        fitting = units[: self.left_to_fit]
        self.left_to_fit -= len(fitting)
        for start, stop in self.spans if len(fitting) else ():
            before = fitting[:, start:stop].flatten(0, 2)
            after = fitting[:, start + 1 : stop + 1].flatten(0, 2)
            products = [(before.T @ before).double(), (after.T @ before).double()]
            sums = self.sums.get((start, stop), [0, 0])
            self.sums[start, stop] = [s + p.cpu() for s, p in zip(sums, products, strict=True)]
        if len(fitting) < len(units):
            self._compare(units[len(fitting) :])

    def _compare(self, units: torch.Tensor) -> None:
        """Compare K^p x̂_ℓ, and x̂_ℓ itself, with x̂_{ℓ+p} by their cosines, inside a phase."""
        for start, stop in self.spans:
            if (start, stop) not in self.maps:
                self.maps[start, stop] = fit_linear_map(*self.sums[start, stop])
            fitted = self.maps[start, stop]
            sums = np.zeros((2, stop - start))
            for p in range(1, stop - start + 1):
                now, then = units[:, start : stop + 1 - p], units[:, start + p : stop + 1]
                for row, guess in enumerate((fitted.power(now, p), now)):
                    cosines = cosine_similarity(guess, then, dim=-1)
                    sums[row, p - 1] = cosines.mean(dim=(1, 2)).sum().item()
            self.cosines[start, stop] = self.cosines.get((start, stop), 0) + sums
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
            reached = self.cosines[start, stop] / self.num_evaluated
            result[f"{start + 1}-{stop}"] = {
                "rank": len(values),
                "eigenvalues": np.stack([values.real, values.imag], axis=1).tolist(),
                "map": reached[0].tolist(),
                "identity": reached[1].tolist(),
            }
        return result
