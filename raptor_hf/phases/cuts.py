"""Cut the layers of a model into phases.

Recursive max-cut follows the reference notebook of arXiv 2512.19941 (Fig. 2). Its text describes
another search, max-cut over contiguous segments by dynamic programming. The two do not always
agree, so both are here, beside two controls.
"""

import numpy as np

from .distance import check_distance

METHODS = ("recursive", "maxcut", "random", "uniform")
_MIN_SPLIT = 4  # recursive max-cut does not split groups of fewer layers
_MAX_EXACT = 26  # layers of an exact max-cut: 2^25 bipartitions take seconds


def find_phases(
    distance: np.ndarray, k: int, method: str = "recursive", *, seed: int = 0
) -> list[int]:
    """Cut the layers into k phases.

    Args:
        distance: (L, L) layer distances W.
        method: `"recursive"`: repeated exact max-cut of the group that gains most (the reference's
            code). `"maxcut"`: the partition into runs with the largest total distance between
            phases, of two layers or more where L allows it: alone, an outlying layer would be cut
            off first. Controls: `"random"`: uniform over all partitions into runs; `"uniform"`: of
            equal length, longer phases first.
        seed: of the method `"random"`.

    Returns:
        The lengths of the phases, which sum to L.

    Raises:
        ValueError: a bad matrix; an impossible cut (`check_cut`); groups that are not runs of
            layers, or too small to split (recursive).
    """
    distance = check_distance(distance)
    layers = len(distance)
    check_cut(layers, k, method)
    # the reference's search
    if method == "recursive":
        lengths = _phase_lengths(_split(distance, k))
        if len(lengths) < k:
            raise ValueError(
                f"k={k} is too large: no group of {lengths} has {_MIN_SPLIT} layers at a distance, "
                "which a split needs. Take the method maxcut."
            )
        return lengths
    # the controls, and the exact partitions
    if method == "uniform":
        return [layers // k + (phase < layers % k) for phase in range(k)]
    if method == "random":
        places = np.arange(1, layers)
        cuts = np.random.default_rng(seed).choice(places, size=k - 1, replace=False)
        return np.diff([0, *sorted(cuts), layers]).tolist()
    return _best_partition(_segment_scores(distance), k, min_length=min(2, layers // k))


def default_methods(layers: int) -> list[str]:
    """Return the methods for so many layers: hundreds of exact max-cuts of more take too long."""
    return ["recursive", "maxcut"] if layers <= 14 else ["maxcut"]


def check_cut(layers: int, k: int, method: str) -> None:
    """Refuse a cut that is impossible whatever the distances are, with a ValueError."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    most, advice = layers, ""
    if method == "recursive":
        # at best every split takes one layer off a group of at least _MIN_SPLIT
        most, advice = max(1, layers - _MIN_SPLIT + 2), " Take the method maxcut."
        if layers > _MAX_EXACT:
            raise ValueError(
                f"Exact max-cut takes at most {_MAX_EXACT} layers; got {layers}.{advice}"
            )
    if not 1 <= k <= most:
        raise ValueError(
            f"The method {method} cuts {layers} layers into 1 … {most} phases; got k={k}.{advice}"
        )


def recursive_max_cut(distance: np.ndarray, threshold: float) -> list[int]:
    """Split by max-cut as long as a cut weighs more than `threshold` × the total weight.

    The total weight is half the sum of the matrix. Returns and errors as `find_phases`.
    """
    distance = check_distance(distance)
    check_cut(len(distance), 1, "recursive")
    return _phase_lengths(_split(distance, len(distance), threshold * distance.sum() / 2))


def _split(distance: np.ndarray, k: int, least: float = 0.0) -> list[np.ndarray]:
    """Split the layers into at most k groups, as long as a cut weighs more than `least`."""
    groups = [np.arange(len(distance))]
    while len(groups) < k:
        weight, split = _best_split(distance, groups)
        if weight <= least:
            break
        groups = split
    return groups


def _best_split(distance: np.ndarray, groups: list[np.ndarray]):
    """Return the split of one group that cuts most weight, (weight, groups); none weighs 0."""
    best, after = 0.0, groups
    for index, group in enumerate(groups):
        if len(group) < _MIN_SPLIT:
            continue
        weight, side = max_cut(distance[np.ix_(group, group)])
        if weight > best:
            best, after = weight, groups[:index] + [group[~side], group[side]] + groups[index + 1 :]
    return best, after


def max_cut(weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the exact maximum cut of a graph (n, n), by trying all bipartitions.

    Returns the weight of the cut and its sides, (n,) bool; the first vertex is on side 0.
    """
    n = len(weights)
    places = np.arange(n - 1, -1, -1)
    best, best_code = -1.0, 0
    # the binary digits of a code are the sides; a chunk of codes at a time
    for first in range(0, 2 ** (n - 1), 2**16):
        codes = np.arange(first, min(first + 2**16, 2 ** (n - 1)))
        sides = (codes[:, None] >> places) & 1 == 1
        cuts = np.einsum("ci,ci->c", sides @ weights, ~sides)
        if cuts.max() > best:
            best, best_code = float(cuts.max()), int(codes[cuts.argmax()])
    return best, (best_code >> places) & 1 == 1


def _phase_lengths(groups: list[np.ndarray]) -> list[int]:
    """Return the lengths of groups in depth order; a ValueError if one is not a run of layers."""
    ordered = sorted(groups, key=lambda group: group[0])
    for group in ordered:
        if group[-1] - group[0] + 1 != len(group):
            raise ValueError(
                f"Max-cut put the layers {(group + 1).tolist()} into one group, which is not a run "
                "of layers: these distances show no phases. Take the method maxcut."
            )
    return [len(group) for group in ordered]


def _segment_scores(distance: np.ndarray) -> np.ndarray:
    """Return the share of every run of layers in the objective of `"maxcut"`.

    Entry (i, j) of (L + 1, L + 1), i < j, is the score of layers i + 1 … j; the best partition has
    the largest sum over its phases.
    """
    # entry (i, j) is the sum of the first i rows and j columns, which gives the sum of any square
    total = np.pad(distance.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    corner = total.diagonal()
    # the weight that is not within a phase is cut
    return total + total.T - corner[None, :] - corner[:, None]


def _best_partition(scores: np.ndarray, k: int, *, min_length: int) -> list[int]:
    """Return the lengths of the k runs with the largest sum of `_segment_scores`, in O(k L²)."""
    layers = len(scores) - 1
    starts, stops = np.indices(scores.shape)
    scores = np.where(stops - starts >= min_length, scores, -np.inf)

    # best[j]: largest sum with which the runs so far cover the first j layers
    best = np.where(np.arange(layers + 1) == 0, 0.0, -np.inf)
    choices = []
    for _ in range(k):
        sums = best[:, None] + scores
        choices.append(sums.argmax(axis=0))
        best = sums.max(axis=0)

    # walk back from the last layer
    stop, lengths = layers, []
    for choice in reversed(choices):
        lengths.append(int(stop - choice[stop]))
        stop = choice[stop]
    return lengths[::-1]


def cut_share(distance: np.ndarray, phase: np.ndarray) -> float:
    """Return the share of the distances (L, L) that lies between layers of different phases.

    Args:
        phase: (L,), the number of each layer's phase.
    """
    first, second = np.triu_indices(len(distance), 1)
    pairs = distance[first, second]
    return float(pairs[phase[first] != phase[second]].sum() / pairs.sum())


def check_partition(phases: list[int], depth: int) -> None:
    """Refuse phases that do not cover the layers 1 … L, with a ValueError."""
    if min(phases, default=0) < 1 or sum(phases) != depth:
        raise ValueError(f"phases must be positive and sum to {depth}; got {list(phases)}.")
