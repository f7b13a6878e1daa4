"""Where a Raptor goes when its last block is held: Jacobian, plain iteration.

The block of a Raptor that has made its last layer can be applied again and again at depth L.
"""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .systems import DepthSystem

Step = Callable[[torch.Tensor], torch.Tensor]


def held_block(system: DepthSystem, states: torch.Tensor) -> Step:
    """Return a Raptor's last block at depth L as a map of states (B, N, D)."""
    rotary = system.model.position_embeddings(states, system.image_size)
    depth = torch.full((1,), system.depth, device=states.device)
    return lambda state: system.model.blocks[-1](state, depth, position_embeddings=rotary)


@torch.no_grad()
def apply_again(step: Step, states: torch.Tensor, times: int) -> torch.Tensor:
    """Return states (B, N, D) and those after 1 … so many applications, (B, times + 1, N, D)."""
    run = [states]
    for _ in range(times):
        run.append(step(run[-1]))
    return torch.stack(run, dim=1)


@torch.no_grad()
def spectral_radius(
    step: Step, states: torch.Tensor, *, iterations: int = 40, seed: int = 0
) -> torch.Tensor:
    """Estimate the largest modulus of the eigenvalues of a map's Jacobian at states.

    A random tangent is carried on; its mean growth over the second half of the iterations is that
    of a complex pair, too. Where eigenvalues are close, it lies slightly below the largest.

    Args:
        step: map of states (B, N, D) that takes every image alone.
        states: (B, N, D).
        iterations: of the tangent.
        seed: of the tangent, the same for all images.

    Returns:
        (B,).
    """
    generator = torch.Generator().manual_seed(seed)
    tangent = torch.randn(states[:1].shape, generator=generator).to(states).expand_as(states)
    growth = []
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels of attention have no forward derivative
        for _ in range(iterations):
            _, tangent = torch.func.jvp(step, (states,), (tangent,))
            length = tangent.flatten(1).norm(dim=1)
            tangent = tangent / length[:, None, None]
            growth.append(length.log())
    return torch.stack(growth[iterations // 2 :]).mean(dim=0).exp()
