"""What new blocks start from: the teacher's layers, aligned, with depth scales fitted to it.

The mean of a phase's layers is a start to learn from, though it is no good model by itself. Two
things make it a better one, each in closed form:

1. *Alignment.* The heads of a layer, and the hidden units of its FFN, have no order: in another
   one they are the same function. Each layer is put in the order in which its weights are most
   like those of the middle layer of its phase, so that the mean is one of alike things.
2. *Depth scales.* For the block of a span start–stop, whose states are rolled out from the
   teacher's, layer by layer the three depth scales of every channel, least squares, pulled towards
   1; then the last layer of the depth MLP is made to give them. Every token group counts alike.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import PreTrainedModel

from ..activations.online import Activations
from ..configuration_raptor import teacher_family
from ..data import keep_batch
from ..modeling_raptor import RaptorModel, teacher_layer_weights
from .arguments import RefitArguments
from .rollout import Span

_RIDGE_SCALES = 0.01  # share of the mean of the squared features
_IMAGES_AT_ONCE = 32


def new_raptor(
    teacher: PreTrainedModel, phases: list[int], *, init: str = "aligned", **options
) -> RaptorModel:
    """Make an untrained Raptor.

    Args:
        init: `"aligned"`, the mean of a phase's aligned layers; or `"teacher"` and `"random"`, see
            `RaptorModel.from_teacher`.
        options: the architecture, as for `RaptorModel.from_teacher`, whose errors are raised.
    """
    aligned = init == "aligned"
    model = RaptorModel.from_teacher(
        teacher, phases, init="teacher" if aligned else init, **options
    )
    if aligned:
        layers = teacher.get_submodule(teacher_family(teacher.config).layers)
        num_heads = model.config.num_attention_heads
        for block, (start, stop) in zip(model.blocks, model.config.spans(), strict=True):
            copies = [teacher_layer_weights(layer) for layer in layers[start:stop]]
            like = copies[len(copies) // 2]
            copies = [_align(copy, like, num_heads, gated=block.ffn.gated) for copy in copies]
            means = {name: torch.stack([c[name] for c in copies]).mean(0) for name in like}
            block.load_state_dict(means, strict=False)  # the depth scaling is the block's own
    return model


def _align(
    weights: dict[str, torch.Tensor], like: dict[str, torch.Tensor], num_heads: int, *, gated: bool
) -> dict[str, torch.Tensor]:
    """Return the weights of a layer with its heads and hidden units in the order of another's.

    The order is the one with the largest inner product of both layers' weights.

    Args:
        weights, like: of `teacher_layer_weights`.
    """
    size = len(like["attention.proj.weight"])
    # by head: what makes its query, key and value (D inputs and a bias), and what reads its output
    heads = {
        "attention.qkv.weight": (3, num_heads, -1, size),
        "attention.qkv.bias": (3, num_heads, -1, 1),
        "attention.proj.weight": (size, num_heads, -1, 1),
    }
    # by hidden unit: what makes it (twice, where a gate does), and what reads it
    units = {
        "ffn.fc1.weight": (2 if gated else 1, like["ffn.fc2.weight"].shape[1], 1, size),
        "ffn.fc1.bias": (2 if gated else 1, like["ffn.fc2.weight"].shape[1], 1, 1),
        "ffn.fc2.weight": (size, like["ffn.fc2.weight"].shape[1], 1, 1),
    }
    aligned = dict(weights)
    for shapes in (heads, units):
        parts = {name: weights[name].reshape(shape) for name, shape in shapes.items()}
        likeness = sum(
            part.transpose(0, 1).flatten(1) @ other.transpose(0, 1).flatten(1).T
            for part, other in (
                (like[name].reshape(shape), parts[name]) for name, shape in shapes.items()
            )
        )
        order = linear_sum_assignment(likeness.double().cpu().numpy(), maximize=True)[1]
        for name, part in parts.items():
            aligned[name] = part[:, torch.as_tensor(order)].reshape(weights[name].shape)
    return aligned


def refit_scales(
    spans: list[Span], activations: Activations, refit: RefitArguments, *, init: str
) -> None:
    """Fit the depth scales of new blocks, in place, if the arguments ask for it.

    Args:
        activations: a source of the teacher's states at the first to the last layer of every span;
            `refit_images` of its rows, at equal distances, are looked at and kept in memory (for
            DINOv2-B at 224 px 5.2 MB each, in float16).
        init: what the blocks started from.

    Raises:
        ValueError: blocks that there is nothing to fit of.
    """
    if refit.refit == "none":
        return
    if init not in ("teacher", "aligned") or any(s.block.depth_scaling is None for s in spans):
        raise ValueError(
            f"--refit {refit.refit} needs new blocks that start as the mean of the teacher's "
            "layers (--init aligned or teacher) and have a depth scaling."
        )
    number = min(refit.refit_images, len(activations))
    rows = torch.linspace(0, len(activations) - 1, number).long()
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
        _refit_depth_scales(span, states, weights.to(device))


@torch.no_grad()
def _refit_depth_scales(span: Span, states: list[torch.Tensor], weights: torch.Tensor) -> None:
    """Fit the scales of a block to states (B, stop − start + 1, N, D), with token weights (N,)."""
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
