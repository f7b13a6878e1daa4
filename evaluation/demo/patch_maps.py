"""Patch tokens as colours, and images as the models see them."""

from collections.abc import Sequence

import numpy as np
import torch

# a component with a spread below this share of the size of the states is rounding
_ROUNDING = 1e-6


def patch_pca_maps(states: Sequence[np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    """Colour the patches of one image, with one basis and one scale a layer for all models.

    Equal colours at one layer mean equal components. Every layer has a basis of its own, so colours
    of different layers can't be compared.

    Args:
        states: patch tokens of every model after every layer, (L + 1, h·w, D) each.
        grid: (h, w), patches in a column and in a row.

    Returns:
        (models, L + 1, h, w, 3), from 0 to 1.

    Raises:
        ValueError: shapes that differ, or another number of tokens than the grid has patches.
    """
    shapes = [model_states.shape for model_states in states]
    if len(set(shapes)) != 1 or len(shapes[0]) != 3 or shapes[0][1] != grid[0] * grid[1]:
        raise ValueError(
            f"Patch maps need the patches of all models as (layers + 1, {grid[0]} · {grid[1]}, "
            f"channels); got {', '.join(map(str, shapes))}."
        )

    # one basis for the patches of all models, layer by layer
    colours, scores = [], None
    for layer in zip(*states, strict=True):
        scores = principal_scores(np.concatenate(layer), scores)
        colours.append(unit_range(scores).reshape(len(states), *grid, 3))
    return np.stack(colours, axis=1)


def principal_scores(tokens: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """Project tokens (T, D) on their three principal components, (T, 3).

    The sign of a component is arbitrary: its scores follow those of the layer before, so that
    colours run on; in the first layer its largest entry is positive. Components that are no more
    than rounding, or beyond D, are 0.

    Args:
        tokens: (T, D).
        before: the scores of the layer before, (T, 3).
    """
    # through the covariance of the channels: there may be many more tokens than channels
    tokens = tokens.astype(np.float64)
    centred = tokens - tokens.mean(axis=0)
    variances, components = np.linalg.eigh(centred.T @ centred)
    variances, components = variances[::-1][:3], components[:, ::-1][:, :3]

    # fix the signs
    largest = np.abs(components).argmax(axis=0)
    components = components * np.sign(components[largest, np.arange(len(largest))])
    kept = np.sqrt(variances.clip(min=0)) > _ROUNDING * np.linalg.norm(tokens)
    scores = np.zeros((len(tokens), 3))
    scores[:, : len(kept)] = centred @ components * kept

    # colours run on from layer to layer
    if before is not None:
        scores *= np.where((scores * before).sum(axis=0) < 0, -1, 1)
    return scores


def unit_range(scores: np.ndarray) -> np.ndarray:
    """Scale every column of (T, C) to the range 0 … 1; a constant column is ½."""
    low, high = scores.min(axis=0), scores.max(axis=0)
    spread = high - low
    scaled = (scores - low) / np.where(spread > 0, spread, 1)
    return np.where(spread > 0, scaled, 0.5)


def as_seen(pixel_values: torch.Tensor, processor) -> np.ndarray:
    """Undo a processor's normalisation: pixel values (3, H, W) to an image (H, W, 3) of bytes."""
    pixels = pixel_values.cpu().numpy().transpose(1, 2, 0)
    if processor.do_normalize:
        pixels = pixels * np.array(processor.image_std) + np.array(processor.image_mean)
    return (255 * pixels.clip(0, 1)).round().astype(np.uint8)
