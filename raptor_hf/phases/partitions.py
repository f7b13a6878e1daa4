"""Phases: how far apart the layers of a teacher are, and where to cut them into runs.

Layer distances and recursive max-cut follow the reference notebook of arXiv 2512.19941 (Fig. 2);
its text describes another search, max-cut over contiguous segments by dynamic programming. The two
do not always agree, so both are here, beside normalised cut (Shi & Malik 2000) and two controls.
"""
# `find_phases` is over 40 lines: more than half of it is signature and docstring.

import numpy as np

from .distance import check_distance
from .max_cut import recursive_phases

METHODS = ("recursive", "maxcut", "ncut", "random", "uniform")


def find_phases(
    distance: np.ndarray,
    k: int,
    method: str = "recursive",
    *,
    seed: int = 0,
    min_length: int | None = None,
) -> list[int]:
    """Cut the layers into k phases.

    Args:
        distance: (L, L) layer distances W.
        k: number of phases.
        method: `"recursive"`: repeated exact max-cut, always of the group that gains most (the
            reference's code). `"maxcut"`: of all partitions into runs the one with the largest
            total distance between different phases. `"ncut"`: the one with the smallest normalised
            cut of the similarity 1 − W, Σ 1 − assoc(phase, phase) / assoc(phase, all layers).
            Controls: `"random"`: uniform over all partitions into runs. `"uniform"`: as equal as
            possible, longer phases first.
        seed: of the method `"random"`; the others draw nothing.
        min_length: shortest phase that maxcut, ncut and random may make. None takes 1 for random
            and 2, where L allows it, for the two others: a single outlying layer (often the last)
            is otherwise what they cut off first. On the published matrix ncut gives the published
            phases for k = 2, 3, 4 with 2 and for none with 1; maxcut is the same with both.

    Returns:
        The lengths of the phases, which sum to L.

    Raises:
        ValueError: a matrix that is not square, symmetric and finite, k or `min_length` out of
            range, an unknown method, or what only one method can't do: more than 26 layers or
            groups that are not runs (recursive), a layer unlike all others together (ncut).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    distance = check_distance(distance)
    layers = len(distance)
    if not 1 <= k <= layers:
        raise ValueError(f"k must be between 1 and the number of layers, {layers}; got {k}.")
    if method in ("recursive", "uniform"):
        if min_length is not None:
            raise ValueError(
                f"min_length is for maxcut, ncut and random; {method} takes none, got {min_length}."
            )
        if method == "recursive":
            return recursive_phases(distance, k)
        return [layers // k + (phase < layers % k) for phase in range(k)]
    if min_length is None:
        min_length = 1 if method == "random" else min(2, layers // k)
    if min_length < 1 or k * min_length > layers:
        raise ValueError(
            f"min_length must be between 1 and {layers // k}, or {k} phases do not fit into "
            f"{layers} layers; got {min_length}."
        )
    if method == "random":
        return random_phases(layers, k, seed=seed, min_length=min_length)
    return _best_partition(_segment_scores(distance, method), k, min_length=min_length)


def _segment_scores(distance: np.ndarray, method: str) -> np.ndarray:
    """Return what every run of layers adds to the objective of `"maxcut"` or `"ncut"`.

    Returns:
        (L + 1, L + 1): entry (i, j), i < j, is the score of layers i + 1 … j; a partition is the
        better, the larger the sum over its phases.
    """
    weights = 1 - distance if method == "ncut" else distance
    # (i, j): sum of the first i rows and j columns
    total = np.pad(weights.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    corner, rows = total.diagonal(), total[:, -1]
    within = corner[None, :] - total - total.T + corner[:, None]
    if method == "maxcut":  # what is not within a phase is cut
        return -within
    degrees = np.diff(rows)
    if (degrees <= 0).any():
        raise ValueError(
            f"ncut needs layers that are alike: layer {degrees.argmin() + 1} has the mean distance "
            f"{distance[degrees.argmin()].mean():.2f} to all layers, which must be below 1. "
            "Take the method maxcut."
        )
    volume = rows[None, :] - rows[:, None]
    # Σ 1 − within / volume is smallest where Σ within / volume is largest: k is given
    return np.divide(within, volume, out=np.zeros_like(within), where=volume > 0)


def _best_partition(scores: np.ndarray, k: int, *, min_length: int = 1) -> list[int]:
    """Return lengths of the k runs with the largest sum of scores, exact, in O(k L²).

    Args:
        scores: (L + 1, L + 1) of `_segment_scores`.
        k: number of runs.
        min_length: no run is shorter; k · min_length ≤ L.
    """
    layers = len(scores) - 1
    starts, stops = np.indices(scores.shape)
    scores = np.where(stops - starts >= min_length, scores, -np.inf)
    best, choices = np.where(np.arange(layers + 1) == 0, 0.0, -np.inf), []
    for _ in range(k):  # best[j]: largest sum with which that many runs cover the first j layers
        sums = best[:, None] + scores
        choices.append(sums.argmax(axis=0))
        best = sums.max(axis=0)
    stop, lengths = layers, []
    for choice in reversed(choices):
        lengths.append(int(stop - choice[stop]))
        stop = choice[stop]
    return lengths[::-1]


def random_phases(layers: int, k: int, *, seed: int, min_length: int = 1) -> list[int]:
    """Draw one of all partitions of L layers into k runs of at least `min_length`."""
    spare = layers - k * (min_length - 1)  # shorten every run by min_length − 1, cut, lengthen
    cuts = np.random.default_rng(seed).choice(np.arange(1, spare), size=k - 1, replace=False)
    lengths = np.diff([0, *sorted(cuts), spare]) + min_length - 1
    return lengths.tolist()


def partition_quality(distance: np.ndarray, phases: list[int]) -> dict[str, float | None]:
    """Return how well phases separate the layers, over all pairs of two different layers.

    Args:
        distance: (L, L) layer distances.
        phases: lengths that sum to L.

    Returns:
        `cut_share`: share of the total distance that lies between phases; `within` and `between`:
        mean distance of two layers of one phase and of two phases; `contrast`: between − within.
        None where there is no such pair (or no distance at all).

    Raises:
        ValueError: phases that do not cover the layers, or a bad matrix as in `find_phases`.
    """
    distance = check_distance(distance)
    check_partition(phases, len(distance))
    phase = np.repeat(np.arange(len(phases)), phases)
    first, second = np.triu_indices(len(distance), 1)
    pairs, cut = distance[first, second], phase[first] != phase[second]
    within = float(pairs[~cut].mean()) if not cut.all() else None
    between = float(pairs[cut].mean()) if cut.any() else None
    return {
        "cut_share": float(pairs[cut].sum() / pairs.sum()) if pairs.sum() > 0 else None,
        "within": within,
        "between": between,
        "contrast": None if within is None or between is None else between - within,
    }


def check_partition(phases: list[int], depth: int) -> None:
    """Refuse phases that do not cover the layers 1 … L."""
    if min(phases, default=0) < 1 or sum(phases) != depth:
        raise ValueError(f"phases must be positive and sum to {depth}; got {list(phases)}.")


def phase_contrast(
    distance: np.ndarray, phases: list[int], *, draws: int, seed: int = 0
) -> dict[str, object]:
    """Return how well phases separate the layers, beside random partitions.

    Args:
        distance: (L, L) layer distances.
        phases: lengths that sum to L.
        draws: random partitions of each kind.

    Returns:
        `partition_quality`, and the contrasts of other, `random` partitions into as many runs, and
        of `shuffled` ones of the same lengths whose layers are drawn at random.
    """
    contrasts: dict[str, list] = {"random": [], "shuffled": []}
    for draw in range(draws):
        runs = find_phases(distance, len(phases), "random", seed=seed + draw)
        if runs != list(phases):
            contrasts["random"].append(partition_quality(distance, runs)["contrast"])
        order = np.random.default_rng((seed, draw)).permutation(len(distance))
        shuffled = partition_quality(distance[np.ix_(order, order)], phases)
        contrasts["shuffled"].append(shuffled["contrast"])
    return {**partition_quality(distance, phases), **contrasts}
