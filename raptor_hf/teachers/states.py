"""The states of a teacher: its trajectory, single layers, the final norm."""

import copy
import inspect
import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_raptor import TEACHER_FAMILIES, TokenLayout, teacher_family
from ..modeling_raptor import image_arguments, pair, patch_grid, rotary_angles


def infer_token_layout(
    config: PreTrainedConfig, *, num_tokens: int, height: int, width: int
) -> TokenLayout:
    """Infer the token layout of any vision model's states from their number of tokens.

    Tokens that are no patches come first: one cls, the rest count as registers (so does DeiT's
    distillation token). SigLIP and I-JEPA have none of them.

    Args:
        num_tokens: N, tokens of a state.
        height, width: of the image in pixels.

    Raises:
        ValueError: no patch size, or fewer tokens than patches.
    """
    if getattr(config, "patch_size", None) is None:
        raise ValueError(f"The configuration of a {config.model_type!r} has no patch_size.")
    num_patches = math.prod(patch_grid((height, width), config))
    num_prefix_tokens = num_tokens - num_patches
    if num_prefix_tokens < 0:
        raise ValueError(
            f"An image of {height}×{width} pixels has {num_patches} patches; a state of this "
            f"{config.model_type!r} has {num_tokens} tokens: it merges or masks patches."
        )
    return TokenLayout(min(1, num_prefix_tokens), max(0, num_prefix_tokens - 1))


@torch.no_grad()
def trajectory(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return all states before the final norm: (B, C, H, W) to (B, L + 1, N, D).

    A model that masks patches (MAE) is run on whole images.

    Raises:
        ValueError: a model that gives no states, not one for every layer, or states whose shape
            changes over the depth.
    """
    arguments = {}
    if model.config.model_type in TEACHER_FAMILIES:
        arguments = image_arguments(model.config, pixel_values)

    # transformers' own hidden states, and the last layer's output where they may be normed
    layer, last = _unverified_last_layer(model), []
    hook = layer and layer.register_forward_hook(lambda _module, _args, out: last.append(out))
    mask_ratio = getattr(model.config, "mask_ratio", None)
    try:
        if mask_ratio:
            model.config.mask_ratio = 0.0
        output = model(pixel_values, output_hidden_states=True, **arguments)
    finally:
        if mask_ratio:
            model.config.mask_ratio = mask_ratio
        if hook:
            hook.remove()

    # a layer may return a tuple
    states = list(getattr(output, "hidden_states", None) or [])
    if states and last:
        states[-1] = last[-1]
        if isinstance(last[-1], tuple):
            states[-1] = last[-1][0]
    _check_states(model, states)
    return torch.stack(states, dim=1)


@torch.no_grad()
def run_layers(
    teacher: PreTrainedModel,
    states: torch.Tensor,
    layers: Sequence[int],
    image_size: tuple[int, int] | None = None,
) -> list[torch.Tensor]:
    """Run layers (1 … L) of a teacher one after another; return states (B, N, D) and each output.

    Args:
        image_size: height and width of the images in pixels; default: as the teacher was made for.
    """
    modules = teacher.get_submodule(teacher_family(teacher.config).layers)
    options, run = {}, [states]
    if "attention_mask" in inspect.signature(modules[0].forward).parameters:  # CLIP needs one
        options["attention_mask"] = None
    angles = rotary_angles(teacher, image_size or pair(teacher.config.image_size), states)
    if angles is not None:
        options["position_embeddings"] = angles
    for layer in layers:
        run.append(modules[layer - 1](run[-1], **options))
    return run


def final_norm(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Apply the norm after the last layer of a teacher or Raptor, if it has one, to (B, N, D)."""
    if model.config.model_type == "raptor":
        return model.norm(states)
    norm = teacher_family(model.config).final_norm
    if norm is None:
        return states
    return model.get_submodule(norm)(states)


@torch.no_grad()
def normed_state(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the state (B, N, D) after the last layer and the final norm, of images (B, C, H, W).

    The model is a Raptor or a teacher. CLIP norms its pooled output alone; here all tokens are.
    """
    if model.config.model_type == "raptor":
        return model(pixel_values).last_hidden_state
    arguments = image_arguments(model.config, pixel_values)
    states = model(pixel_values, output_hidden_states=False, **arguments).last_hidden_state
    if teacher_family(model.config).output_normed:
        return states
    return final_norm(model, states)


def up_to_layer(teacher: PreTrainedModel, layer: int) -> PreTrainedModel:
    """Return the same model with the same weights, but without the layers after `layer`.

    A model of an unknown family (`TEACHER_FAMILIES`) is returned whole.
    """
    family = TEACHER_FAMILIES.get(teacher.config.model_type)
    if family is None or layer == teacher.config.num_hidden_layers:
        return teacher
    weights = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
    shallow = copy.deepcopy(teacher, weights)  # a copy of all but the tensors
    shallow.set_submodule(family.layers, shallow.get_submodule(family.layers)[:layer])
    shallow.config.num_hidden_layers = layer
    return shallow


def _unverified_last_layer(model: PreTrainedModel) -> nn.Module | None:
    """Return the last layer of a model whose `hidden_states[-1]` may come after the final norm.

    transformers puts `last_hidden_state` there for many models (`tie_last_hidden_states`). None for
    Raptors and their teachers, where it does not, and where no list of layers is found.
    """
    if model.config.model_type in (*TEACHER_FAMILIES, "raptor"):
        return None
    depth = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module[-1]
    return None


def _check_states(model: PreTrainedModel, states: list[torch.Tensor]) -> None:
    """Refuse hidden states that are no trajectory, with the errors of `trajectory`."""
    name, depth = type(model).__name__, getattr(model.config, "num_hidden_layers", len(states) - 1)
    if not states or len(states) != depth + 1:
        raise ValueError(
            f"A Vision Transformer returns the states of its embeddings and of every layer as "
            f"hidden_states; {name} has {max(depth, 0)} layers and returns {len(states)} states."
        )
    shapes = list(dict.fromkeys(tuple(state.shape[1:]) for state in states))
    if len(shapes) > 1 or len(shapes[0]) != 2:
        raise ValueError(
            f"The states of all layers must have one shape (tokens, channels); {name} has "
            f"{', '.join(map(str, shapes))} over its depth, and so no phases."
        )
