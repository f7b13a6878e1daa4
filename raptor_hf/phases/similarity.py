"""Similarity of layers, measured several ways, from one vector an image and layer.

The raw cosine of arXiv 2512.19941 is large wherever all images share a direction, so it may show
the phases of the mean alone. The centred cosine takes the mean over images out. Debiased CKA asks
whether two layers place the images alike, in whatever basis.
"""

from collections.abc import Callable, Iterator

import numpy as np


def image_cosines(states: np.ndarray) -> np.ndarray:
    """Return the cosines of the layers of every image.

    Args:
        states: (n, L, D), such as cls tokens or mean patches of n images.

    Returns:
        (n, L, L); their mean over images is the raw cosine.
    """
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    return unit @ np.swapaxes(unit, 1, 2)


def centred_cosines(states: np.ndarray) -> np.ndarray:
    """Return the same after the mean over images is taken out of every layer."""
    return image_cosines(states - states.mean(axis=0))


def debiased_cka(states: np.ndarray) -> np.ndarray:
    """Return linear CKA (Kornblith et al. 2019) with the unbiased HSIC (Song et al. 2012), (L, L).

    HSIC is the inner product of U-centred Gram matrices (Székely & Rizzo 2014), so CKA is their
    cosine. Without the correction, fewer images than channels make all layers alike.

    Raises:
        ValueError: fewer than four images.
    """
    n = len(states)
    if n < 4:
        raise ValueError(f"Debiased CKA needs four images at least; got {n}.")
    layers = np.swapaxes(states, 0, 1)
    grams = layers @ np.swapaxes(layers, 1, 2)
    grams[:, range(n), range(n)] = 0

    # U-centre
    rows = grams.sum(axis=2, keepdims=True) / (n - 2)
    total = rows.sum(axis=1, keepdims=True) / (n - 1)
    grams += total - rows - np.swapaxes(rows, 1, 2)
    grams[:, range(n), range(n)] = 0
    flat = grams.reshape(len(grams), -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return flat @ flat.T


MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "raw cosine": image_cosines,
    "centred cosine": centred_cosines,
    "debiased CKA": debiased_cka,
}


def half_samples(images: int, draws: int, *, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield random halves of the images, for the error of any figure over images.

    Halves of a mean lie as far from the whole as the whole from the truth (subsampling, Politis &
    Romano 1994). No image is drawn twice, as in a bootstrap, which would pass for likeness in CKA.
    """
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.sort(generator.choice(images, images // 2, replace=False))
