"""Growth of tangents: small pushes of a state, carried through the layers by their Jacobians."""

from collections.abc import Mapping

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .interventions import random_directions
from .systems import DepthSystem


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

    The tangent is zero but on the tokens of one group, where it is a random direction times ‖x‖, as
    the push of `self_correction` with ε towards 0.

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
    directions = random_directions(batch, tuple(tangent[0, tokens].shape), seed).to(states)
    tangent[:, tokens] = directions * states[:, start, tokens].norm(dim=-1, keepdim=True)

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
