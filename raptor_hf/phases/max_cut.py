"""Phases by repeated exact max-cut, as in the reference notebook of arXiv 2512.19941 (Fig. 2)."""

import numpy as np

from .distance import check_distance

_MIN_SPLIT = 4  # the recursion does not split groups of fewer layers
_MAX_EXACT = 26  # 2^25 bipartitions: seconds


def recursive_phases(distance: np.ndarray, k: int) -> list[int]:
    """Cut phases by repeated max-cut of the group that gains most; errors as `find_phases`."""
    groups = [np.arange(len(distance))]
    while len(groups) < k:
        _, split = _best_split(distance, groups)
        if split is None:
            raise ValueError(
                f"k={k} is too large: no group of {_phase_lengths(groups)} has the {_MIN_SPLIT} "
                "layers that a split needs. Take the method maxcut or ncut."
            )
        groups = split
    return _phase_lengths(groups)


def recursive_max_cut(distance: np.ndarray, threshold: float) -> list[int]:
    """Split by max-cut as long as a cut weighs more than `threshold` × the total weight.

    The total weight is half the sum of the matrix. Returns and errors as `find_phases`.
    """
    distance = check_distance(distance)
    groups = [np.arange(len(distance))]
    while True:
        gain, split = _best_split(distance, groups)
        if split is None or gain <= threshold * distance.sum() / 2:
            return _phase_lengths(groups)
        groups = split


def _best_split(distance: np.ndarray, groups: list[np.ndarray]):
    """Return the split of one group that cuts most weight: (weight, groups), or (0, None)."""
    best, after = 0.0, None
    for index, group in enumerate(groups):
        if len(group) < _MIN_SPLIT:
            continue
        weight, side = max_cut(distance[np.ix_(group, group)])
        if weight > best:
            best, after = weight, groups[:index] + [group[~side], group[side]] + groups[index + 1 :]
    return best, after


def max_cut(weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the exact maximum cut of a small graph; the first vertex is on side 0.

    Returns:
        The weight of the cut and its sides, (n,) bool.
    """
    n = len(weights)
    if n > _MAX_EXACT:
        raise ValueError(
            f"Exact max-cut looks at all bipartitions: at most {_MAX_EXACT} layers at once, got "
            f"{n}."
            " Take the method maxcut or ncut, which look at runs of layers alone."
        )
    best, best_code = -1.0, 0
    for first in range(0, 2 ** (n - 1), 2**16):
        codes = np.arange(first, min(first + 2**16, 2 ** (n - 1)))
        sides = (codes[:, None] >> np.arange(n - 1, -1, -1)) & 1 == 1
        cuts = np.einsum("ci,ci->c", sides @ weights, ~sides)
        if cuts.max() > best:
            best, best_code = float(cuts.max()), int(codes[cuts.argmax()])
    return best, (best_code >> np.arange(n - 1, -1, -1)) & 1 == 1


def _phase_lengths(groups: list[np.ndarray]) -> list[int]:
    """Return lengths of groups of layers in depth order; a ValueError if one is not a run of
    layers.
    """
    ordered = sorted(groups, key=lambda group: group[0])
    for group in ordered:
        if group[-1] - group[0] + 1 != len(group):
            raise ValueError(
                f"Max-cut put the layers {(group + 1).tolist()} into one group, which is not a run "
                "of consecutive layers: this teacher's distances show no phases to cut at. The "
                "methods maxcut and ncut look at runs alone."
            )
    return [len(group) for group in ordered]
