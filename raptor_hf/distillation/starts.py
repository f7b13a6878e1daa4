"""What new blocks start from: the mean of their phase's layers, put in one order first.

The heads of a layer, and the hidden units of its FFN, have no order: in another one they are the
same function. Each layer is put in the order in which its weights are most like those of the middle
layer of its phase, so that the mean is one of alike things.

The mean is a start to learn from, and no model: of a real DINOv2-S its R² is about −8 before the
first step. Two ways to a better R² without training led to a worse one after 200 steps: depth
scales fitted in closed form, and output projections refitted (docs/recipes.md).
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_raptor import RaptorConfig, teacher_family
from ..modeling_raptor import RaptorBlock, RaptorModel
from ..teachers.layers import layer_parts, start_from, teacher_layer_weights
from ..teachers.making import make_raptor


def new_raptor(
    teacher: PreTrainedModel, phases: list[int], *, init: str = "random", **options
) -> RaptorModel:
    """Make an untrained Raptor.

    Args:
        init: `"random"` or `"teacher"`, see `make_raptor`; or `"aligned"`, the mean
            of a phase's aligned layers.
        options: the architecture, as for `make_raptor`, whose errors are raised.
    """
    aligned = init == "aligned"
    model = make_raptor(teacher, phases, init="teacher" if aligned else init, **options)
    if aligned:
        layers = teacher.get_submodule(teacher_family(teacher.config).layers)
        for block, (start, stop) in zip(model.blocks, model.config.spans(), strict=True):
            start_from_layers(block, layers[start:stop], model.config)
    return model


def start_from_layers(
    block: RaptorBlock, layers: Sequence[nn.Module], config: RaptorConfig
) -> None:
    """Let a block start as the mean of some layers of its teacher, aligned to the middle one.

    Args:
        config: of the block, which must be of the layers' kind.
    """
    parts = layer_parts(config.teacher_config)
    copies = [teacher_layer_weights(layer, parts) for layer in layers]
    like, num_heads = copies[len(copies) // 2], config.num_attention_heads
    copies = [
        copy if copy is like else _align(copy, like, num_heads, gated=block.ffn.gated)
        for copy in copies
    ]
    start_from(block, copies)


def _align(
    weights: dict[str, torch.Tensor], like: dict[str, torch.Tensor], num_heads: int, *, gated: bool
) -> dict[str, torch.Tensor]:
    """Return the weights of a layer with its heads and hidden units in the order of another's.

    Alike is what has a large inner product with the weights of the other.

    Args:
        weights, like: of `teacher_layer_weights`.
    """
    size = len(like["attention.proj.weight"])
    # by head: what makes its query, key and value (D inputs and a bias), and what reads its output
    heads = {
        "attention.qkv.weight": (3, num_heads, -1, size),
        "attention.qkv.bias": (3, num_heads, -1, 1),
        "attention.some_bias": (-1, num_heads, size // num_heads, 1),
        "attention.q_norm.weight": (1, num_heads, -1, 1),
        "attention.k_norm.weight": (1, num_heads, -1, 1),
        "attention.proj.weight": (size, num_heads, -1, 1),
        "position_bias.relative_position_bias_table": (-1, num_heads, 1, 1),
    }
    # by hidden unit: what makes it (twice, where a gate does), and what reads it
    units = {
        "ffn.fc1.weight": (2 if gated else 1, like["ffn.fc2.weight"].shape[1], 1, size),
        "ffn.fc1.bias": (2 if gated else 1, like["ffn.fc2.weight"].shape[1], 1, 1),
        "ffn.fc2.weight": (size, like["ffn.fc2.weight"].shape[1], 1, 1),
    }
    aligned = dict(weights)
    for shapes in (heads, units):
        shapes = {name: shape for name, shape in shapes.items() if name in weights}
        parts = {name: weights[name].reshape(shape) for name, shape in shapes.items()}
        likeness = sum(
            part.transpose(0, 1).flatten(1) @ other.transpose(0, 1).flatten(1).T
            for part, other in (
                (like[name].reshape(shape), parts[name]) for name, shape in shapes.items()
            )
        )
        order = _best_pairs(likeness)
        for name, part in parts.items():
            aligned[name] = part[:, order].reshape(weights[name].shape)
    return aligned


def _best_pairs(likeness: torch.Tensor) -> torch.Tensor:
    """Return which column each row is paired with, (n,), for the likeness (n, n) of both.

    Again and again a row and a column that are most like each other of all that are left are made a
    pair. For the hidden units of two layers of a DINOv2-S that takes half of the time of the best
    pairing of all, and comes to 98.5 % of its sum.
    """
    # around the means of rows and columns, which make no pairing better than another: else what all
    # units have in common, such as a large bias, would be found first
    left = likeness - likeness.mean(dim=0) - likeness.mean(dim=1, keepdim=True)
    pairs = torch.empty(len(likeness), dtype=torch.long, device=likeness.device)
    rows = columns = torch.arange(len(likeness), device=likeness.device)
    while len(rows):
        best = left.max(dim=1).indices
        mutual = left.max(dim=0).indices[best] == torch.arange(len(rows), device=rows.device)
        pairs[rows[mutual]] = columns[best[mutual]]
        unpaired = torch.ones_like(mutual)
        unpaired[best[mutual]] = False
        left = left[~mutual][:, unpaired]
        rows, columns = rows[~mutual], columns[unpaired]
    return pairs
