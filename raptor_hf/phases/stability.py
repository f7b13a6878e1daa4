"""Bootstrap stability of phase boundaries.

A bootstrap of n images takes n of them with replacement. Its mean distances are a weighted mean of
the images' own, so all resamples together are one product of matrices.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from .cuts import check_partition, find_phases
from .distance import tidy_distances


def default_methods(layers: int) -> list[str]:
    """Return the methods for so many layers: hundreds of exact max-cuts of more take too long."""
    return ["recursive", "maxcut"] if layers <= 14 else ["maxcut"]


def boundaries(phases: Sequence[int]) -> list[int]:
    """Return the layers after which a phase ends, without the last: [7, 3, 2] gives [7, 10]."""
    return list(accumulate(phases))[:-1]


def partition_agreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the share of boundaries that two partitions have in common, in [0, 1].

    The Jaccard index of the two sets of boundaries; two partitions without one agree by 1. A
    ValueError refuses unequal numbers of layers.
    """
    for phases in (first, second):
        check_partition(list(phases), sum(first))
    one, other = set(boundaries(first)), set(boundaries(second))
    return len(one & other) / len(one | other) if one | other else 1.0


def resampled_distances(
    distances: np.ndarray, resamples: int = 200, *, seed: int = 0
) -> np.ndarray:
    """Return the mean distances of bootstrap resamples of the images, (resamples, L, L).

    Args:
        distances: (n, L, L), of single images; see `image_distances`. They must be finite.
        seed: of the draws.
    """
    images, layers, _ = distances.shape
    counts = np.random.default_rng(seed).multinomial(
        images, np.full(images, 1 / images), size=resamples
    )
    sums = counts.astype(np.float64) @ distances.reshape(images, -1)
    return tidy_distances(sums.reshape(resamples, layers, layers) / images)


def cut_stability(distance: np.ndarray, resampled: np.ndarray, k: int, method: str) -> dict:
    """Cut the distances of all images into k phases, and those of every resample.

    Args:
        distance: (L, L), mean over all images.
        resampled: (B, L, L), of `resampled_distances`, or of other repetitions (seeds, sizes).
        k, method: of `find_phases`.

    Returns:
        `method`; `phases` of all images; `same`: share of resamples with exactly these;
        `agreement`: mean of `partition_agreement` with these; `boundaries`: share with a cut after
        layer 1 … L − 1; `no_partition`: share that the method can't cut. Where it can't cut the
        distances of all images, `phases`, `same` and `agreement` are None, and `reason` says why.
    """
    # not every matrix has k phases: the recursive method and ncut may find none
    phases, reason = _try_to_cut(distance, k, method)
    attempts = [_try_to_cut(matrix, k, method)[0] for matrix in resampled]
    cuts = [cut for cut in attempts if cut]

    # how often a boundary occurs
    counts, total = np.zeros(len(distance) - 1), len(attempts)
    for cut in cuts:
        counts[np.array(boundaries(cut), dtype=int) - 1] += 1
    stability = {"method": method, "phases": phases, "same": None, "agreement": None}
    stability["boundaries"] = (counts / total).tolist()
    stability["no_partition"] = 1 - len(cuts) / total

    # compare with the phases of all images
    if phases is None:
        stability["reason"] = reason
        return stability
    stability["same"] = cuts.count(phases) / total
    if cuts:
        agreements = [partition_agreement(phases, cut) for cut in cuts]
        stability["agreement"] = float(np.mean(agreements))
    return stability


def _try_to_cut(distance: np.ndarray, k: int, method: str) -> tuple[list[int] | None, str]:
    """Return phases, or None and the reason."""
    try:
        return find_phases(distance, k, method), ""
    except ValueError as error:
        return None, str(error)
