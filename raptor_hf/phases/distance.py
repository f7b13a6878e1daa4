"""Distances between the layers of a model: measured on hidden states, or read from a file."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.nn import functional

from ..configuration_raptor import TokenLayout
from ..runs.files import read_json
from ..runs.processes import process_state


def layer_distance(trajectories: Iterable[torch.Tensor], layout: TokenLayout) -> np.ndarray:
    """Return the mean cosine distance between layers 1 … L, over images and {cls, mean patch}.

    Args:
        trajectories: batches (B, L + 1, N, D), streamed; with several processes each gives its
            share of the images.

    Returns:
        (L, L) symmetric, float64, zero diagonal; the same in all processes.

    Raises:
        ValueError: no trajectory, or states that are not finite.
    """
    process_state()  # joins the other processes, as gathering needs
    total, count = 0.0, 0
    for states in trajectories:
        distances = image_distances(states, layout)
        total, count = total + distances.sum(dim=0), count + len(distances)
    shares = gather_object([(total.cpu().numpy(), count)] if count else [])
    if not shares:
        raise ValueError("layer_distance needs at least one trajectory; got none.")
    return tidy_distances(sum(total for total, _ in shares) / sum(count for _, count in shares))


def image_distances(states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Return the layer distances of single images: of the mean patch, then of the cls token.

    Of states (B, L + 1, N, D) they are (2·B, L, L) in float64, or (B, L, L) without a cls token.
    """
    groups, states = layout.groups(), states[:, 1:].double()
    names = [name for name in ("patches", "cls") if name in groups]
    vectors = torch.cat([states[..., groups[name], :].mean(dim=2) for name in names])
    directions = functional.normalize(vectors, dim=-1)
    return 1 - directions @ directions.transpose(1, 2)


def tidy_distances(matrices: np.ndarray) -> np.ndarray:
    """Return matrices (…, L, L) exactly symmetric, with a zero diagonal; they must be finite."""
    if not np.isfinite(matrices).all():
        raise ValueError("Layer distances must be finite; got NaN or infinity.")
    matrices = (matrices + np.swapaxes(matrices, -1, -2)) / 2
    diagonal = range(matrices.shape[-1])
    matrices[..., diagonal, diagonal] = 0.0
    return matrices


def load_distance(path: str | Path) -> np.ndarray:
    """Load the matrix (L, L) under the key `"distance"` of a JSON file, or a ValueError."""
    content = read_json(path)
    if not isinstance(content, dict) or "distance" not in content:
        raise ValueError(
            f"{path} must hold layer distances under the key 'distance', like the phases.json of "
            "training/find_phases.py."
        )
    return check_distance(content["distance"])


def check_distance(distance: np.ndarray) -> np.ndarray:
    """Return a layer distance matrix as float64; a ValueError if it is none."""
    distance = np.asarray(distance, dtype=np.float64)
    square = distance.ndim == 2 and distance.shape[0] == distance.shape[1]
    if not square or not np.allclose(distance, distance.T) or not np.isfinite(distance).all():
        raise ValueError(
            "A layer distance matrix must be square, symmetric and finite; got the shape "
            f"{distance.shape}, {np.isfinite(distance).sum()} finite values."
        )
    return distance
