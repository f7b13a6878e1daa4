"""Phases: how far apart the layers of a teacher are, and where to cut them into runs.

Layer distances and recursive max-cut follow the reference notebook (arXiv 2512.19941, Fig. 2).
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch.nn import functional

from .configuration_raptor import TokenLayout

MIN_SPLIT = 4  # groups of fewer layers are not split
MAX_EXACT = 26  # 2^25 bipartitions: seconds


def layer_distance(trajectories: Iterable[torch.Tensor], layout: TokenLayout) -> np.ndarray:
    """Mean cosine distance between layers 1 … L, over images and over {cls, mean patch}.

    Args:
        trajectories: batches (B, L + 1, N, D); they are streamed, memory does not grow.
        layout: token layout of the states.

    Returns:
        (L, L) symmetric, float64, zero diagonal.

    Raises:
        ValueError: no trajectory at all.
    """
    total, count = 0.0, 0
    groups = layout.groups()
    for states in trajectories:
        states = states[:, 1:].double()
        vectors = [states[..., groups["patches"], :].mean(dim=2)]
        if "cls" in groups:
            vectors.append(states[..., groups["cls"], :].mean(dim=2))
        directions = functional.normalize(torch.cat(vectors), dim=-1)
        total = total + (1 - directions @ directions.transpose(1, 2)).sum(dim=0)
        count += len(directions)
    if count == 0:
        raise ValueError("layer_distance needs at least one trajectory; got none.")
    distance = (total / count).numpy()
    np.fill_diagonal(distance, 0.0)
    return (distance + distance.T) / 2


def find_phases(distance: np.ndarray, k: int, method: str = "recursive") -> list[int]:
    """Cut the layers into k phases.

    Args:
        distance: (L, L) layer distances.
        k: number of phases.
        method: `"recursive"`: repeated exact max-cut, always of the group that gains most.

    Returns:
        The lengths of the phases, which sum to L.

    Raises:
        ValueError: a matrix that is not square or not finite, k out of range, an unknown method, or
            a group that is not a run of consecutive layers.
    """
    if method != "recursive":
        raise ValueError(f"method must be 'recursive'; got {method!r}.")
    distance = check_distance(distance)
    if not 1 <= k <= len(distance):
        raise ValueError(f"k must be between 1 and the number of layers, {len(distance)}; got {k}.")
    groups = [np.arange(len(distance))]
    while len(groups) < k:
        gain, split = best_split(distance, groups)
        if split is None:
            raise ValueError(
                f"k={k} is too large: no group of {phase_lengths(groups)} has the {MIN_SPLIT} "
                "layers that a split needs."
            )
        groups = split
    return phase_lengths(groups)


def recursive_max_cut(distance: np.ndarray, threshold: float) -> list[int]:
    """Split by max-cut as long as a cut weighs more than `threshold` × the total weight.

    The total weight is half the sum of the matrix. Returns and errors as `find_phases`.
    """
    distance = check_distance(distance)
    groups = [np.arange(len(distance))]
    while True:
        gain, split = best_split(distance, groups)
        if split is None or gain <= threshold * distance.sum() / 2:
            return phase_lengths(groups)
        groups = split


def check_distance(distance: np.ndarray) -> np.ndarray:
    """A layer distance matrix as float64, or a ValueError that says what is wrong with it."""
    distance = np.asarray(distance, dtype=np.float64)
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1]:
        raise ValueError(f"A layer distance matrix is square; got the shape {distance.shape}.")
    if not np.isfinite(distance).all():
        raise ValueError("The layer distance matrix holds NaN or infinite values.")
    return distance


def best_split(distance: np.ndarray, groups: list[np.ndarray]):
    """The split of one group that cuts most weight: (weight, groups after it), or (0, None)."""
    best, after = 0.0, None
    for index, group in enumerate(groups):
        if len(group) < MIN_SPLIT:
            continue
        weight, side = max_cut(distance[np.ix_(group, group)])
        if weight > best:
            best, after = weight, groups[:index] + [group[~side], group[side]] + groups[index + 1 :]
    return best, after


def max_cut(weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Exact maximum cut of a small graph, over all bipartitions, with the first vertex on side 0.

    Returns:
        The weight of the cut and its sides, (n,) bool.
    """
    n = len(weights)
    if n > MAX_EXACT:
        raise ValueError(
            f"Exact max-cut looks at all bipartitions: at most {MAX_EXACT} layers at once, got {n}."
        )
    best, best_code = -1.0, 0
    for first in range(0, 2 ** (n - 1), 2**16):
        codes = np.arange(first, min(first + 2**16, 2 ** (n - 1)))
        sides = (codes[:, None] >> np.arange(n - 1, -1, -1)) & 1 == 1
        cuts = np.einsum("ci,ci->c", sides @ weights, ~sides)
        if cuts.max() > best:
            best, best_code = float(cuts.max()), int(codes[cuts.argmax()])
    return best, (best_code >> np.arange(n - 1, -1, -1)) & 1 == 1


def phase_lengths(groups: list[np.ndarray]) -> list[int]:
    """Lengths of groups of layers in depth order; a ValueError if one is not a run of layers."""
    ordered = sorted(groups, key=lambda group: group[0])
    for group in ordered:
        if group[-1] - group[0] + 1 != len(group):
            raise ValueError(
                f"Max-cut put the layers {(group + 1).tolist()} into one group, which is not a run "
                "of consecutive layers: this teacher's distances show no phases to cut at."
            )
    return [len(group) for group in ordered]
