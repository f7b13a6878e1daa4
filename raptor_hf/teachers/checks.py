"""Checks of a teacher before a Raptor is made of it, and of the Raptor against the teacher."""

import copy
import math

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_raptor import RaptorConfig, teacher_family, token_layout
from ..modeling_raptor import (
    RaptorBlock,
    RaptorModel,
    image_arguments,
    pair,
    patch_grid,
    rotary_angles,
)
from .layers import find_part, layer_parts, teacher_layer_weights
from .states import trajectory


def check_teacher(teacher: PreTrainedModel) -> None:
    """Refuse models that no Raptor can be made of, with a ValueError."""
    config, name = teacher.config, type(teacher).__name__
    # its own layers, all of them, with weights
    layers = find_part(teacher, teacher_family(config).layers)
    if layers is None:
        raise ValueError(
            f"A Raptor is made of a bare {config.model_type!r}; this {name} is a model around one. "
            "Give the backbone within it, or use raptor_hf.raptorize."
        )
    if not isinstance(layers, nn.ModuleList) or len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"A Raptor is made of a teacher with its own {config.num_hidden_layers} layers; this "
            f"{name} has a {type(layers).__name__} of {len(layers)}."
        )
    check_weights(teacher)


def check_weights(teacher: PreTrainedModel) -> None:
    """Refuse weights that can't be copied, offloaded or quantised ones, with a ValueError."""
    for path, weight in teacher.named_parameters():
        plain = type(weight.data) is torch.Tensor and not weight.is_meta
        if not plain or not weight.is_floating_point() or weight.element_size() == 1:
            raise ValueError(
                f"{path} of this {type(teacher).__name__} is offloaded or quantised "
                f"({weight.device}, {weight.dtype}), and can't be copied. Load the teacher onto "
                "one device, without quantization_config; the Raptor may be quantised instead."
            )


@torch.no_grad()
def check_against(model: RaptorModel, teacher: PreTrainedModel, *, blocks: bool) -> None:
    """Compare state 0, tokens, final norm, and a copied layer if there are blocks, on one image.

    Raises:
        ValueError: they differ: the row of the family in `TEACHER_FAMILIES` is wrong.
    """
    # an image, and the teacher's states
    config, like, name = model.config, next(teacher.parameters()), type(teacher).__name__
    size = (1, config.num_channels, *pair(config.image_size))
    image = torch.linspace(-1, 1, math.prod(size)).view(size).to(like)
    states = trajectory(teacher, image).unbind(dim=1)

    # number of tokens
    rows, columns = patch_grid(size[-2:], config)
    number = token_layout(config).num_prefix_tokens + rows * columns
    if states[0].shape[1] != number:
        raise ValueError(
            f"A state of this {name} should have {number} tokens (cls, registers and {rows}×"
            f"{columns} patches), and has {states[0].shape[1]}. Its row in TEACHER_FAMILIES "
            "miscounts them."
        )

    # states of both
    pairs = {"the embeddings": (model.embed(image.to(model.device)), states[0])}
    if blocks:
        pairs["a copy of the first layer"] = (_copied_layer(config, teacher, states[0]), states[1])
    output = teacher(image, **image_arguments(teacher.config, image))
    normed = getattr(output, "last_hidden_state", None)  # a backbone gives maps, MAE masks
    output_normed = teacher_family(teacher.config).output_normed
    if output_normed and normed is not None and normed.shape == states[-1].shape:
        pairs["the final norm"] = (model.norm(states[-1].to(model.device)), normed)

    # a GPU may leave out bits of products (TF32), and devices round differently
    exact = like.dtype == torch.float32 and like.device.type == "cpu"
    tolerance = 1e-4 if exact else 5e-2
    for part, (ours, theirs) in pairs.items():
        error = (ours.to(theirs) - theirs).abs().max() / theirs.abs().max()
        # states of a broken teacher, NaN or infinite, are left to the training
        if theirs.isfinite().all() and not error < tolerance:
            raise ValueError(
                f"{part} of this {name} should give its own states, and differ by {error:.1e} of "
                "their largest value: it is in training mode, or computes something that raptor_hf "
                f"does not know of a {config.teacher_config.model_type!r}."
            )


def _copied_layer(
    config: RaptorConfig, teacher: PreTrainedModel, states: torch.Tensor
) -> torch.Tensor:
    """Return the output of a block that is a copy of a teacher's first layer, for states 0."""
    layer = teacher.get_submodule(teacher_family(teacher.config).layers)[0]
    config = copy.deepcopy(config)
    config.depth_scaling = False
    with torch.device("meta"):
        block = RaptorBlock(config).eval()
    block.load_state_dict(teacher_layer_weights(layer, layer_parts(teacher.config)), assign=True)
    angles = rotary_angles(teacher, pair(config.image_size), states)
    return block(states, torch.ones(1, device=states.device), None, angles)
