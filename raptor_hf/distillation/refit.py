"""A start in closed form: blocks refitted to a few hundred of the teacher's trajectories.

For the block of a span start–stop, whose states x_ℓ are rolled out from the teacher's a_start:

1. Ridge regression of its two output projections and their bias, shared by all its layers,
       a_ℓ − x_{ℓ−1} ≈ W_o·h_ℓ + W_2·u_ℓ + b        (h, u: what goes into the projections)
   pulled towards the weights that are there.
2. Layer by layer the three depth scales of every channel, least squares, pulled towards 1; then the
   last layer of the depth MLP is made to give them.

No gradient, no step. Every token group counts alike. Made for blocks that start as the mean of the
teacher's layers: random ones have no features worth refitting.

Measured on the digits teacher, k = 3: R² of all tokens and of cls without any training, after 50
and after 100 steps (batch 64, the best of three learning rates each). The mean of the layers: 0.797
and −0.01, 0.947 and 0.57, 0.961 and 0.63. Scales refitted: 0.817 and 0.04, 0.946 and 0.62, 0.961
and 0.69. Both steps: 0.888 and 0.50, 0.929 and 0.63, 0.951 and 0.69. So both for a Raptor that is
not trained, the scales alone for one that is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..activations.online import Activations
from ..data import keep_batch
from .arguments import RefitArguments
from .blocks import Span

RIDGE_PROJECTIONS = 0.1  # shares of the mean of the squared features: measured on the digits
_RIDGE_SCALES = 0.01
_IMAGES_AT_ONCE = 32


def refit_blocks(
    spans: list[Span], activations: Activations, refit: RefitArguments, *, init: str
) -> None:
    """Refit blocks as the arguments say.

    Args:
        init: what the blocks started from.

    Raises:
        ValueError: blocks that there is nothing to refit of.
    """
    if refit.refit == "none":
        return
    if init != "teacher" or any(span.block.depth_scaling is None for span in spans):
        raise ValueError(
            f"--refit {refit.refit} needs new blocks that start as the mean of the teacher's "
            "layers (--init teacher) and have a depth scaling."
        )
    refit_spans(spans, activations, refit.refit_images, projections=refit.refit == "all")


@torch.no_grad()
def refit_spans(
    spans: list[Span], activations: Activations, num_images: int, *, projections: bool = True
) -> None:
    """Refit the blocks of some spans, in place.

    Args:
        activations: a source of the teacher's states at the first to the last layer of every span.
        num_images: how many of its rows are looked at, at equal distances; they are kept in memory
            (for DINOv2-B at 224 px 5.2 MB each, in float16).
        projections: take the first step too.
    """
    rows = torch.linspace(0, len(activations) - 1, min(num_images, len(activations))).long()
    chunks = [
        activations.states(keep_batch(activations.__getitems__(chunk.tolist())))
        for chunk in rows.split(_IMAGES_AT_ONCE)
    ]
    num_tokens = chunks[0].shape[2]
    weights = torch.zeros(num_tokens)
    for group in activations.layout.groups().values():
        weights[group] = 1 / len(range(num_tokens)[group])
    for span in spans:
        columns = [activations.layers.index(layer) for layer in range(span.start, span.stop + 1)]
        device = span.block.layer_scale1.device
        states = [chunk[:, columns].to(device).float() for chunk in chunks]
        if projections:
            _refit_projections(span, states, weights.to(device))
        _refit_depth_scales(span, states, weights.to(device))


@contextmanager
def _inputs_of(*modules: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield what goes into some modules, in their order, while a block is applied."""
    received: list[torch.Tensor | None] = [None] * len(modules)

    def keep(position: int):
        def hook(_module, inputs):
            received[position] = inputs[0]

        return hook

    hooks = [m.register_forward_pre_hook(keep(position)) for position, m in enumerate(modules)]
    try:
        yield received
    finally:
        for hook in hooks:
            hook.remove()


def _refit_projections(span: Span, states: list[torch.Tensor], weights: torch.Tensor) -> None:
    """Take the first step, for states (B, stop − start + 1, N, D) and token weights (N,)."""
    block, normal, moment = span.block, 0.0, 0.0
    projections = (block.attention.proj, block.ffn.fc2)
    for chunk in states:
        current = chunk[:, 0]
        for position, depth in enumerate(range(span.start + 1, span.stop + 1), start=1):
            with _inputs_of(*projections) as inputs:
                following = block(current, depth)
            features = torch.cat([*inputs, torch.ones_like(current[..., :1])], dim=-1)
            root = weights.sqrt()[None, :, None]
            rows = (root * features).flatten(0, 1).double()
            normal += rows.T @ rows
            moment += rows.T @ (root * (chunk[:, position] - current)).flatten(0, 1).double()
            current = following
    scales = (block.layer_scale1, block.layer_scale2)
    pairs = list(zip(projections, scales, strict=True))
    weights_now = [(scale[:, None] * projection.weight).T for projection, scale in pairs]
    bias = sum(scale * projection.bias for projection, scale in pairs)
    weights_now = torch.cat([*weights_now, bias[None]]).double()
    pull = RIDGE_PROJECTIONS * normal.diagonal().mean()
    eye = torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
    fitted = torch.linalg.solve(normal + pull * eye, moment + pull * weights_now).float()
    widths = [projection.in_features for projection in projections]
    for (projection, scale), part in zip(pairs, fitted[:-1].split(widths), strict=True):
        projection.weight.copy_((part / scale).T)
        projection.bias.zero_()
    block.ffn.fc2.bias.copy_(fitted[-1] / block.layer_scale2)


def _refit_depth_scales(span: Span, states: list[torch.Tensor], weights: torch.Tensor) -> None:
    """Take the second step; arguments as for the first one."""
    block = span.block
    scaling, block.depth_scaling = block.depth_scaling, None  # the branches as they are
    current, fitted = [chunk[:, 0] for chunk in states], []
    for position in range(1, span.stop - span.start + 1):
        normal, moment = 0.0, 0.0
        for before, chunk in zip(current, states, strict=True):
            parts = torch.stack([*branches(block, before), before], dim=-1)  # (B, N, D, 3)
            weighted = parts * weights[None, :, None, None]
            normal += torch.einsum("bndi,bndj->dij", weighted, parts).double()
            moment += torch.einsum("bndi,bnd->di", weighted, chunk[:, position]).double()
        pull = _RIDGE_SCALES * normal.diagonal(dim1=1, dim2=2).mean(dim=-1)
        eye = torch.eye(3, dtype=normal.dtype, device=normal.device)
        solution = torch.linalg.solve(normal + pull[:, None, None] * eye, moment + pull[:, None])
        output = solution[:, 2].clamp(0.5, 2)
        scales = torch.stack([solution[:, 0] / output, solution[:, 1] / output, output]).float()
        fitted.append(scales)
        current = [_apply_scaled(block, before, scales) for before in current]
    block.depth_scaling = scaling
    depths = torch.arange(span.start + 1, span.stop + 1, device=output.device).float()[:, None]
    hidden = nn.functional.silu(scaling.fc1(depths))
    features = torch.cat([hidden, torch.ones_like(depths)], dim=1).double()
    target = (torch.stack(fitted).flatten(1) - 1).double()
    # of all weights that give these scales, the smallest ones
    solution = torch.linalg.pinv(features, rtol=1e-4) @ target
    scaling.fc2.weight.copy_(solution[:-1].T)
    scaling.fc2.bias.copy_(solution[-1])


def branches(block: nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what both branches of a block without depth scaling add to states (B, N, D)."""
    attention = block.layer_scale1 * block.attention(block.norm1(states))
    return attention, block.layer_scale2 * block.ffn(block.norm2(states + attention))


def _apply_scaled(block: nn.Module, states: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return an application with given scales (3, D) of the attention, the FFN and the output."""
    states = states + scales[0] * block.layer_scale1 * block.attention(block.norm1(states))
    states = states + scales[1] * block.layer_scale2 * block.ffn(block.norm2(states))
    return scales[2] * states
