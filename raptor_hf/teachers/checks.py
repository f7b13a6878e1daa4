"""Checks of a teacher before a Raptor is made of it, and of the Raptor against the teacher."""

import copy
import math

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_raptor import RaptorConfig, teacher_family, token_layout
from ..modeling_raptor import RaptorBlock, RaptorModel, pair, patch_grid
from .layers import find_part, layer_parts, teacher_layer_weights
from .states import call_whole, first_layer_call, rotary_angles_of_call

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_weights(teacher: PreTrainedModel) -> None:
    """Refuse weights that can't be copied: offloaded or quantised ones.

    Raises:
        ValueError: with the name of the first such weight.
    """
    name = type(teacher).__name__
    for path, weight in teacher.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"The weights of a teacher must lie in memory; those of this {name} are offloaded "
                f"(on the meta device), {path} first. Load it onto one device."
            )
        plain = type(weight.data) is torch.Tensor
        if not plain or weight.dtype not in _FLOATS:
            kind = weight.dtype if plain else type(weight.data).__name__
            raise ValueError(
                f"The weights of a teacher must be plain floating-point numbers; this {name} is "
                f"quantised, {path} is {kind}. Load it without quantization_config; the Raptor may "
                "be quantised instead."
            )


def check_teacher(teacher: PreTrainedModel) -> None:
    """Refuse models that no Raptor can be made of.

    Raises:
        ValueError: with the reason.
    """
    config = teacher.config
    if config.model_type == "raptor":
        raise ValueError(f"{type(teacher).__name__} is a Raptor already; give its teacher.")
    layers = find_part(teacher, teacher_family(config).layers)
    if layers is None:
        raise ValueError(
            f"A Raptor is made of a bare {config.model_type!r}; this {type(teacher).__name__} is "
            "a model around one. Give the backbone within it, or use raptor_hf.raptorize."
        )
    if not isinstance(layers, nn.ModuleList) or len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"A Raptor is made of a teacher with its own {config.num_hidden_layers} layers; this "
            f"{type(teacher).__name__} has a {type(layers).__name__} of {len(layers)}."
        )
    check_weights(teacher)
    for name, module in teacher.named_modules():
        drops = getattr(module, "p", 0) > 0 or getattr(module, "drop_prob", 0)
        if teacher.training and drops:
            raise ValueError(
                f"The teacher is in training mode, and {name} makes its states random: call "
                "teacher.eval() first."
            )


@torch.no_grad()
def check_against(model: RaptorModel, teacher: PreTrainedModel, *, blocks: bool) -> None:
    """Compare a new Raptor with its teacher on one image of the teacher's size.

    Compared are state 0, its number of tokens, and the final norm where the teacher's last state
    is given after it.

    Args:
        blocks: compare a copy of the first layer with it, too.

    Raises:
        ValueError: they differ: the row of its family in `TEACHER_FAMILIES` is wrong for it.
    """
    # an image, and the call of the teacher's first layer
    config, like = model.config, next(teacher.parameters())
    size = (1, config.num_channels, *pair(config.image_size))
    image = torch.linspace(-1, 1, math.prod(size)).view(size).to(like)
    states, args, kwargs = first_layer_call(teacher, image)

    # number of tokens
    rows, columns = patch_grid(size[-2:], config)
    number = token_layout(config).num_prefix_tokens + rows * columns
    if states.shape[-2] != number:
        raise ValueError(
            f"A state of this {type(teacher).__name__} should have {number} tokens (cls, registers "
            f"and {rows}×{columns} patches), and has {states.shape[-2]}. Its row in "
            "TEACHER_FAMILIES miscounts them."
        )

    # states of both; a GPU may leave out bits of products (TF32), and devices round differently
    pairs = {"the embeddings": (model.embed(image.to(model.device)), states)}
    if blocks:
        pairs["a copy of the first layer"] = _copied_layer(config, teacher, states, args, kwargs)
    if (last := _last_states(teacher, image)) is not None:
        pairs["the final norm"] = (model.norm(last[0].to(model.device)), last[1])
    exact = like.dtype == torch.float32 and like.device.type == "cpu"
    tolerance = 1e-4 if exact else 5e-2
    for name, (ours, theirs) in pairs.items():
        error = (ours.to(theirs) - theirs).abs().max() / theirs.abs().max()
        # states of a broken teacher, NaN or infinite, are left to the training
        if theirs.isfinite().all() and not error < tolerance:
            raise ValueError(
                f"{name} of this {type(teacher).__name__} should give its own states, and "
                f"differ by {error:.1e} of their largest value: it computes something that "
                f"raptor_hf does not know of a {config.teacher_config.model_type!r}."
            )


def _copied_layer(
    config: RaptorConfig, teacher: PreTrainedModel, states: torch.Tensor, args: tuple, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of a block that is a copy of a teacher's first layer, and of the layer.

    Args:
        config: of the block.
        states, args, kwargs: inputs of the layer, see `first_layer_call`.
    """
    layer = teacher.get_submodule(teacher_family(teacher.config).layers)[0]
    config = copy.deepcopy(config)
    config.depth_scaling = False
    with torch.device("meta"):
        block = RaptorBlock(config).eval()
    block.load_state_dict(teacher_layer_weights(layer, layer_parts(teacher.config)), assign=True)
    output = layer(states, *args, **kwargs)
    depth = torch.ones(1, device=states.device)
    return block(states, depth, None, rotary_angles_of_call(args, kwargs)), output


def _last_states(
    teacher: PreTrainedModel, pixel_values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the state after a teacher's last layer, and its `last_hidden_state` after the norm.

    None where it has no such output: CLIP norms its pooled output alone, a backbone gives maps.
    """
    family, states = teacher_family(teacher.config), []
    if not family.output_normed:
        return None
    layer = teacher.get_submodule(family.layers)[-1]
    hook = layer.register_forward_hook(lambda _module, _args, output: states.append(output))
    try:
        normed = getattr(call_whole(teacher, pixel_values), "last_hidden_state", None)
    finally:
        hook.remove()
    return None if normed is None else (states[0], normed)
