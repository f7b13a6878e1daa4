"""Similarities of layers without phases, to compare a measured one with.

They know how far each layer turns a state, the similarities of neighbours, and nothing else.
"""

from collections.abc import Mapping

import numpy as np

from .cuts import cut_share, default_methods, find_phases
from .similarity import MEASURES, half_samples


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
    """Return the largest share of the distance that k runs cut; errors as of `find_phases`."""
    phases = find_phases(distance, k, "maxcut")
    return cut_share(distance, np.repeat(np.arange(k), phases))


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


def compare_with_turns(
    pooled: Mapping[str, np.ndarray],
    measure: str,
    *,
    draws: int = 100,
    seed: int = 0,
) -> dict[str, dict]:
    """Cut the layers of a model by a measure of similarity, and compare the cuts with turns.

    Args:
        pooled: by token group, one vector an image and layer, (n, L, D).
        measure: of `MEASURES`.
        draws: halves of the images, for standard errors.
        seed: of the halves, and of turns in random order.

    Returns:
        For each group, and for `all`, the mean over groups as in the paper: the `similarity` and
        that of `independent_turns`, (L, L), and `cuts`, `judge_phases` for k = 2, 3 and 4.
    """
    # similarities of all images, and of halves of them
    stacks, result = {}, {}
    for tokens, vectors in pooled.items():
        parts = [vectors]
        parts += [vectors[half] for half in half_samples(len(vectors), draws, seed=seed)]
        stacks[tokens] = np.stack([beside_turns(MEASURES[measure](part)) for part in parts])
    stacks["all"] = np.mean(list(stacks.values()), axis=0)

    # cuts
    for tokens, (whole, *halves) in stacks.items():
        similarity, independent, _ = whole.tolist()
        result[tokens] = {"similarity": similarity, "independent_turns": independent}
        cuts = {str(k): judge_phases(whole, np.stack(halves), k, seed=seed) for k in (2, 3, 4)}
        result[tokens]["cuts"] = cuts
    return result


def judge_phases(three: np.ndarray, halves: np.ndarray, k: int, *, seed: int = 0) -> dict:
    """Cut a similarity into k phases, and compare it with turns that have no phases.

    Args:
        three: (3, L, L), of `beside_turns`.
        halves: (draws, 3, L, L), of halves of the images.
        k: number of phases.
        seed: of turns in random order.

    Returns:
        `phases` and `null_phases`: by method those of the similarity and of independent turns, None
        where recursive max-cut finds none. `same`: the share of halves with the same max-cut.
        `shares`, largest that a cut takes of the distance: of the similarity (`own`), of
        `independent` and `straight` turns, and the 5, 50 and 95 % quantiles over turns in
        `random_order`. Each with its standard error, that over halves: `share`, the first less the
        second, and `within` and `contrast` of `beyond_turns`.
    """
    # partitions
    similarity, independent, _ = three
    phases = {name: _try_to_cut(1 - similarity, k, name) for name in default_methods(len(three[0]))}
    exact, cuts = phases["maxcut"], [find_phases(1 - half[0], k, "maxcut") for half in halves]
    found = {
        "phases": phases,
        "null_phases": {name: _try_to_cut(1 - independent, k, name) for name in phases},
        "same": cuts.count(exact) / len(cuts),
    }

    # how much they cut
    every = np.concatenate([three, *halves])
    cut = np.array([best_cut_share(1 - one, k) for one in every]).reshape(-1, 3)
    orders = reordered_turns(np.diagonal(similarity, 1), len(halves), seed=seed)
    spread = np.quantile([best_cut_share(1 - order, k) for order in orders], [0.05, 0.5, 0.95])
    found["shares"] = dict(zip(("own", "independent", "straight"), cut[0].tolist(), strict=True))
    found["shares"]["random_order"] = spread.tolist()
    gain, *gains = (cut[:, 0] - cut[:, 1]).tolist()
    found["share"] = [gain, float(np.std(gains))]

    # how alike layers are within
    of_halves = [beyond_turns(*half[:2], exact) for half in halves]
    for name, value in beyond_turns(similarity, independent, exact).items():
        found[name] = [value, float(np.std([half[name] for half in of_halves]))]
    return found


def _try_to_cut(distance: np.ndarray, k: int, method: str) -> list[int] | None:
    """Return phases; None where the method finds none."""
    try:
        return find_phases(distance, k, method)
    except ValueError:
        return None
