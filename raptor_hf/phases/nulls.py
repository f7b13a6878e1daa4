"""Similarities of layers without phases, to compare a measured one with.

They know how far each layer turns a state, the similarities of neighbours, and nothing else.
"""

import numpy as np

from .cuts import check_partition, find_phases, partition_quality


def independent_turns(neighbours: np.ndarray) -> np.ndarray:
    """Return similarities where every layer turns in a direction of its own.

    S_ij is the product of the neighbours' similarities from i to j: that of a Markov chain such as
    a random walk or an Ornstein-Uhlenbeck process.

    Args:
        neighbours: (…, L − 1), S of the layers 1 and 2, 2 and 3, …

    Returns:
        (…, L, L), symmetric, diagonal 1.
    """
    layers = neighbours.shape[-1] + 1
    similarity = np.ones((*neighbours.shape[:-1], layers, layers))
    for first in range(layers - 1):
        products = np.cumprod(neighbours[..., first:], axis=-1)
        similarity[..., first, first + 1 :] = similarity[..., first + 1 :, first] = products
    return similarity


def straight_turns(neighbours: np.ndarray) -> np.ndarray:
    """Return similarities where all layers turn the same way, along one great circle.

    S_ij is the cosine of the sum of angles from i to j, at most 180°. Arguments as
    `independent_turns`.
    """
    angles = np.arccos(np.clip(neighbours, -1, 1))
    places = np.concatenate([np.zeros_like(angles[..., :1]), np.cumsum(angles, axis=-1)], axis=-1)
    return np.cos(np.minimum(abs(places[..., :, None] - places[..., None, :]), np.pi))


def beside_turns(similarity: np.ndarray) -> np.ndarray:
    """Return a similarity, and those of independent and of straight turns of the same sizes.

    Args:
        similarity: (L, L), or (n, L, L) of single images: turns differ between images, and the mean
            of their products is not the product of their means.

    Returns:
        (3, L, L), means over the images.
    """
    neighbours = np.diagonal(similarity, 1, -2, -1)
    three = np.stack([similarity, independent_turns(neighbours), straight_turns(neighbours)])
    return three.reshape(3, -1, *similarity.shape[-2:]).mean(axis=1)


def reordered_turns(neighbours: np.ndarray, draws: int, *, seed: int = 0) -> np.ndarray:
    """Return independent turns of the same sizes in random order, (draws, L, L)."""
    generator = np.random.default_rng(seed)
    return np.stack([independent_turns(generator.permutation(neighbours)) for _ in range(draws)])


def straight_line(layers: int) -> np.ndarray:
    """Return the distances |i − j| of layers at equal steps, (L, L)."""
    depth = np.arange(layers)
    return abs(depth[:, None] - depth).astype(float)


def best_cut_share(distance: np.ndarray, k: int) -> float:
    """Return the largest share of the distance that a partition into k runs cuts (max-cut).

    Raises:
        ValueError: as `find_phases`.
    """
    return partition_quality(distance, find_phases(distance, k, "maxcut"))["cut_share"]


def matched_means(
    values: np.ndarray, phases: list[int], *, nearest: int = 1
) -> tuple[float, float]:
    """Return the mean within phases, and the mean across them at equal |i − j|.

    Layers of one phase are near each other, and near layers are alike. So each pair within a phase
    is compared with the pairs of two phases that are as far apart.

    Args:
        values: (L, L), of ordered pairs of layers.
        phases: lengths that sum to L.
        nearest: the smallest |i − j| that counts.

    Returns:
        Both means over the |i − j| that occur within and across; NaN where none does.
    """
    check_partition(phases, len(values))
    phase = np.repeat(np.arange(len(phases)), phases)
    same, apart = phase[:, None] == phase, straight_line(len(values))
    inside, outside, weights = [], [], []
    for distance in range(nearest, len(values)):
        within, across = (apart == distance) & same, (apart == distance) & ~same
        if within.any() and across.any():
            inside.append(values[within].mean())
            outside.append(values[across].mean())
            weights.append(within.sum())
    if not weights:
        return float("nan"), float("nan")
    return float(np.average(inside, weights=weights)), float(np.average(outside, weights=weights))


def beyond_turns(
    similarity: np.ndarray, independent: np.ndarray, phases: list[int]
) -> dict[str, float]:
    """Measure how much more alike layers are than independent turns of their sizes make them.

    Layers that gather round a state of their phase are more alike than a chain of independent turns
    leaves them, and those of two phases are not. A random walk gives 0, turns that go on in one
    direction less, and layers with noise of their own the same within phases and across. Cut shares
    tell less: the fast layers between phases raise those of turns alone, too.

    Args:
        similarity: (L, L).
        independent: (L, L), of `independent_turns`.
        phases: lengths that sum to L.

    Returns:
        `within`: the mean of the difference, over the pairs of a phase that are no neighbours;
        `contrast`: `within` less the same across phases at equal |i − j|.
    """
    within, across = matched_means(similarity - independent, phases, nearest=2)
    return {"within": within, "contrast": within - across}
