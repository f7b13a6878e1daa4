"""How firmly the cuts between phases stand: the images are drawn anew, and cut again.

A bootstrap of n images takes n of them with replacement. Its mean distances are a weighted mean of
the images' own, so all resamples together are one product of matrices.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from .distance import check_distance
from .partitions import find_phases

STABLE_METHODS = ("recursive", "maxcut", "ncut")  # the others do not look at distances
_RECURSIVE_LAYERS = 14  # exact max-cut of more takes too long for hundreds of resamples
_LISTED = 5  # different partitions that a result names, at most


def default_methods(layers: int) -> list[str]:
    """Return the methods whose stability is looked at for so many layers.

    `maxcut` for all; before it `recursive`, the published one, of up to 14 layers: with 24 each of
    its cuts takes seconds.
    """
    return ["recursive", "maxcut"] if layers <= _RECURSIVE_LAYERS else ["maxcut"]


def boundaries(phases: Sequence[int]) -> list[int]:
    """Return the layers after which a phase ends, without the last: [7, 3, 2] gives [7, 10]."""
    return list(accumulate(phases))[:-1]


def partition_agreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the share of boundaries that two partitions have in common, in [0, 1].

    The Jaccard index of the two sets of boundaries; two partitions without one agree by 1.

    Args:
        first: lengths of phases.
        second: lengths of phases of as many layers.

    Raises:
        ValueError: lengths below 1, or partitions of unequal numbers of layers.
    """
    if min([*first, *second], default=0) < 1 or sum(first) != sum(second):
        raise ValueError(
            "Partitions can be compared that have phases of 1 layer or more, and as many layers; "
            f"got {list(first)} ({sum(first)}) and {list(second)} ({sum(second)})."
        )
    one, other = set(boundaries(first)), set(boundaries(second))
    return len(one & other) / len(one | other) if one | other else 1.0


def bootstrap_counts(number: int, resamples: int = 200, *, seed: int = 0) -> np.ndarray:
    """Return how often each resample takes each image: (resamples, number), rows sum to number.

    Of images that stream by, `bootstrap_counts(n)[:, rows] @ distances[rows]` can be added up.
    """
    if number < 1 or resamples < 1:
        raise ValueError(
            f"A bootstrap needs images and resamples; got {number} and {resamples} of them."
        )
    shares = np.full(number, 1 / number)
    return np.random.default_rng(seed).multinomial(number, shares, size=resamples)


def resampled_distances(
    distances: np.ndarray, resamples: int = 200, *, seed: int = 0
) -> np.ndarray:
    """Return the mean distances of bootstrap resamples of the images.

    Args:
        distances: (n, L, L), of every image; see `image_distances`.
        resamples: how many.
        seed: of the draws.

    Returns:
        (resamples, L, L), symmetric with a zero diagonal, float64. Besides the input it takes
        resamples · (n + L²) numbers.

    Raises:
        ValueError: no image, another shape, or values that are not finite.
    """
    distances = np.asarray(distances, dtype=np.float64)
    if distances.ndim != 3 or distances.shape[1] != distances.shape[2]:
        raise ValueError(f"Distances of images are (n, L, L); got the shape {distances.shape}.")
    counts = bootstrap_counts(len(distances), resamples, seed=seed)
    layers = distances.shape[1]
    sums = counts.astype(np.float64) @ distances.reshape(len(distances), -1)
    return tidy_distances(sums.reshape(resamples, layers, layers) / len(distances))


def tidy_distances(matrices: np.ndarray) -> np.ndarray:
    """Return matrices (…, L, L) symmetric to the last bit and with a zero diagonal; a ValueError
    refuses values that are not finite.
    """
    if not np.isfinite(matrices).all():
        raise ValueError("Distances between layers must be finite; these hold NaN or infinity.")
    matrices = (matrices + np.swapaxes(matrices, -1, -2)) / 2
    matrices[..., range(matrices.shape[-1]), range(matrices.shape[-1])] = 0.0
    return matrices


def cut_stability(
    distance: np.ndarray, resampled: np.ndarray, k: int, method: str | None = None
) -> dict:
    """Cut the distances of all images into k phases, and those of every resample.

    Args:
        distance: (L, L), mean over all images.
        resampled: (B, L, L), of `resampled_distances`, or of other repetitions (seeds, sizes).
        k: number of phases.
        method: of `find_phases`, one of `STABLE_METHODS`; default: the first of
            `default_methods`.

    Returns:
        `method`; `phases` of all images, None where the method finds none, and then `reason`;
        `same`: share of resamples with exactly these; `boundaries`: share with a cut after layer
        1 … L − 1; `shared`: mean number of the k − 1 boundaries that a resample has in common with
        these, and `agreement`: mean of `partition_agreement`, both over those that could be cut;
        `no_partition`: share that could not; `resamples`: B; `partitions`: the most frequent
        ones, each with its `share`. What needs `phases` is None without them.

    Raises:
        ValueError: bad matrices, k out of range, or a method that does not look at distances.
    """
    distance = check_distance(distance)
    layers = len(distance)
    method = method or default_methods(layers)[0]
    if method not in STABLE_METHODS:
        raise ValueError(f"The method must be one of {', '.join(STABLE_METHODS)}; got {method!r}.")
    if not 1 <= k <= layers:
        raise ValueError(f"k must be between 1 and the number of layers, {layers}; got {k}.")
    if np.shape(resampled)[1:] != (layers, layers) or not len(resampled):
        raise ValueError(
            f"Resamples of {layers} layers are (B, {layers}, {layers}) with one or more of them; "
            f"got the shape {np.shape(resampled)}."
        )
    phases, reason = _try_to_cut(distance, k, method)
    # what can be cut at all is a matter of the values: the shape was looked at above
    cuts = [_try_to_cut(check_distance(matrix), k, method)[0] for matrix in resampled]
    stability = {"method": method, "phases": phases, **_tally(phases, cuts, layers)}
    return stability if phases else {**stability, "reason": reason}


def _try_to_cut(distance: np.ndarray, k: int, method: str) -> tuple[list[int] | None, str]:
    """Return phases, or None and why there are none."""
    try:
        return find_phases(distance, k, method), ""
    except ValueError as error:
        return None, str(error)


def _tally(phases: list[int] | None, cuts: list[list[int] | None], layers: int) -> dict:
    """Return the counts of `cut_stability`: of phases, and of those of the resamples."""
    found = [cut for cut in cuts if cut]
    at, total = np.zeros(layers - 1), len(cuts)
    for cut in found:
        at[np.array(boundaries(cut), dtype=int) - 1] += 1
    common = Counter(map(tuple, found)).most_common()
    common.sort(key=lambda entry: (-entry[1], entry[0]))
    known = phases and found
    own = set(boundaries(phases or []))
    return {
        "same": sum(cut == phases for cut in found) / total if phases else None,
        "shared": float(np.mean([len(own & {*boundaries(c)}) for c in found])) if known else None,
        "agreement": (
            float(np.mean([partition_agreement(phases, cut) for cut in found])) if known else None
        ),
        "no_partition": 1 - len(found) / total,
        "resamples": total,
        "boundaries": (at / total).tolist(),
        "partitions": [
            {"phases": list(cut), "share": count / total} for cut, count in common[:_LISTED]
        ],
    }
