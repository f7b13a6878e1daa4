"""Growth of tangents: small pushes of a state, carried through the layers by their Jacobians."""

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .measures import directions
from .systems import DepthSystem


def random_directions(
    batch: Mapping[str, torch.Tensor], shape: tuple[int, int], seed: int
) -> torch.Tensor:
    """Draw directions uniform on the unit sphere, (B, *shape), from seed, image and view alone."""
    draws = []
    for key in zip(batch["image_id"].tolist(), batch["view"].tolist(), strict=True):
        generator = np.random.default_rng((seed, *key))
        draws.append(generator.standard_normal(shape, dtype=np.float32))
    return directions(torch.from_numpy(np.stack(draws)))


def tangent_growth(
    system: DepthSystem,
    states: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    *,
    group: str,
    start: int = 0,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Carry random tangents through the layers after `start`, by forward differentiation.

    The tangent is zero but on the tokens of one group, where it is a random direction u times ‖x‖:
    the limit of a push from x to x + ε‖x‖u.

    Args:
        system: a model that can run on.
        states: the trajectory, (B, L + 1, N, D).
        batch: the images of the trajectory (`image_id`, `view`).
        group: the tokens: cls, registers or patches.
        start: a layer, 0 … L − 1.
        seed: of the tangents.

    Returns:
        (B, L − start + 1) each, for the layers `start` … L. `growth`: the log of the tangent's
        length over all tokens, 0 at the start; its steps are the finite-time Lyapunov exponents of
        the layers. For the pushed tokens: `angle`, the share of the angle that is left, and
        `norms_alone`, the share that growing norms leave of a push that keeps its length.
    """
    tokens = system.layout.groups()[group]
    tangent = torch.zeros_like(states[:, start])
    pushes = random_directions(batch, tuple(tangent[0, tokens].shape), seed).to(states)
    tangent[:, tokens] = pushes * states[:, start, tokens].norm(dim=-1, keepdim=True)

    # fused kernels of attention have no forward derivative
    with sdpa_kernel(SDPBackend.MATH):
        _, carried = torch.func.jvp(
            lambda pushed: system.run(pushed, start=start), (states[:, start],), (tangent,)
        )
    growth = carried.flatten(2).norm(dim=-1).log()

    # the part of a tangent along the state does not turn it
    after, norms = states[:, start:, tokens], states[:, start:, tokens].norm(dim=-1)
    along = (carried[:, :, tokens] * after).sum(dim=-1) / norms
    across = (carried[:, :, tokens].square().sum(dim=-1) - along.square()).clamp(min=0).sqrt()
    angle = (across / norms).mean(dim=-1)
    return {
        "growth": growth - growth[:, :1],
        "angle": angle / angle[:, :1],
        "norms_alone": (norms[:, :1] / norms).mean(dim=-1),
    }
