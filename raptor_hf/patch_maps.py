"""Patch tokens as colours: the first three principal components of an image's patches, as RGB."""

from typing import NamedTuple

import numpy as np

# a component whose spread is that much below the states' own size is rounding, not structure
ROUNDING = 1e-6


class PatchMaps(NamedTuple):
    """The colours of an image's patches at every layer, comparable between teacher and Raptor."""

    teacher: np.ndarray  # (L + 1, h, w, 3), from 0 to 1
    raptor: np.ndarray  # the same
    explained: np.ndarray  # (L + 1,): share of the variance that the three components hold


def patch_pca_maps(
    teacher_states: np.ndarray, raptor_states: np.ndarray, grid: tuple[int, int]
) -> PatchMaps:
    """Patches of one image as colours, with one basis and one scale a layer for both models.

    Equal colours at one layer mean equal components; colours of different layers can't be compared,
    as every layer has a basis of its own.

    Args:
        teacher_states: the teacher's patch tokens after every layer, (L + 1, h·w, D).
        raptor_states: the Raptor's, in the same shape.
        grid: (h, w), patches in a column and in a row.

    Raises:
        ValueError: shapes that differ, or another number of tokens than the grid has patches.
    """
    shapes = teacher_states.shape, raptor_states.shape
    if shapes[0] != shapes[1] or len(shapes[0]) != 3 or shapes[0][1] != grid[0] * grid[1]:
        raise ValueError(
            f"Patch maps need the patches of both models as (layers + 1, {grid[0]} · {grid[1]}, "
            f"channels); got {shapes[0]} of the teacher and {shapes[1]} of the Raptor."
        )
    colours, shares, scores = [], [], None
    for states in zip(teacher_states, raptor_states, strict=True):
        scores, share = principal_scores(np.concatenate(states), scores)
        colours.append(unit_range(scores).reshape(2, *grid, 3))
        shares.append(share)
    teacher, raptor = np.stack(colours, axis=1)
    return PatchMaps(teacher, raptor, np.array(shares))


def principal_scores(
    tokens: np.ndarray, before: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Tokens (T, D) on their first three principal components (T, 3), and the share these hold.

    The sign of a component, which is arbitrary, is the one with which its scores follow those of
    the layer before, so that colours run on; in the first layer its largest entry is positive.
    What is no more than rounding, and components beyond D, are 0.

    Args:
        before: the scores of the layer before.
    """
    tokens = tokens.astype(np.float64)
    centred = tokens - tokens.mean(axis=0)
    # by the covariance of the channels: there may be many more tokens than channels
    variances, components = np.linalg.eigh(centred.T @ centred)
    variances, components = variances[::-1][:3], components[:, ::-1][:, :3]
    largest = np.abs(components).argmax(axis=0)
    components = components * np.sign(components[largest, np.arange(len(largest))])
    kept = np.sqrt(variances.clip(min=0)) > ROUNDING * np.linalg.norm(tokens)
    scores = np.zeros((len(tokens), 3))
    scores[:, : len(kept)] = centred @ components * kept
    if before is not None:
        scores *= np.where((scores * before).sum(axis=0) < 0, -1, 1)
    share = variances[kept].sum() / np.square(centred).sum() if kept.any() else 0.0
    return scores, float(share)


def unit_range(scores: np.ndarray) -> np.ndarray:
    """Every column of (T, C) from 0 (its least) to 1 (its largest); one that is constant, ½."""
    low, high = scores.min(axis=0), scores.max(axis=0)
    spread = high - low
    scaled = (scores - low) / np.where(spread > 0, spread, 1)
    return np.where(spread > 0, scaled, 0.5)
