"""The states of a teacher: its trajectory, single layers, the final norm."""

import copy
import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_raptor import TEACHER_FAMILIES, TokenLayout, teacher_family
from ..modeling_raptor import image_arguments, pair, rotary_angles


def infer_token_layout(
    config: PreTrainedConfig, *, num_tokens: int, height: int, width: int
) -> TokenLayout:
    """Infer the token layout of any vision model's states from their number of tokens.

    Tokens that are no patches come first: one cls, the rest count as registers (so does DeiT's
    distillation token). SigLIP and I-JEPA have none of them.

    Args:
        config: of the model; its `patch_size` is a number or (height, width), in pixels.
        num_tokens: N, tokens of a state.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Raises:
        ValueError: no patch size, or fewer tokens than patches.
    """
    patch_size = getattr(config, "patch_size", None)
    if patch_size is None:
        raise ValueError(f"The configuration of a {config.model_type!r} has no patch_size.")
    patch_height, patch_width = pair(patch_size)
    num_patches = (height // patch_height) * (width // patch_width)
    if num_tokens < num_patches:
        raise ValueError(
            f"An image of {height}×{width} pixels has {num_patches} patches; a state of this "
            f"{config.model_type!r} has {num_tokens} tokens: it merges or masks patches."
        )
    num_prefix_tokens = num_tokens - num_patches
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
    """Run some layers of a teacher one after another; return states (B, N, D), and each output.

    Args:
        teacher: of a family of `TEACHER_FAMILIES`.
        layers: numbers 1 … L.
        image_size: height and width of the images in pixels; default: as the teacher was made for.
    """
    size = image_size or pair(teacher.config.image_size)
    modules = teacher.get_submodule(teacher_family(teacher.config).layers)
    options = {}
    if "attention_mask" in inspect.signature(modules[0].forward).parameters:  # CLIP needs one
        options["attention_mask"] = None
    if (angles := rotary_angles(teacher, size, states)) is not None:
        options["position_embeddings"] = angles
    run = [states]
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

    Args:
        model: a Raptor, or a teacher of a family of `TEACHER_FAMILIES`. CLIP norms its pooled
            output alone; here all of its tokens are.
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

    transformers replaces the last of the hidden states by `last_hidden_state` in many models
    (`tie_last_hidden_states`), so a hook on the layer itself reads it. None for Raptors and their
    teachers, where it is right and a hook would recompile compiled ones, and where no list of
    layers is found.
    """
    tied = getattr(model.config, "tie_last_hidden_states", None)
    if not tied and model.config.model_type in (*TEACHER_FAMILIES, "raptor"):
        return None
    depth = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module[-1]
    return None


def _check_states(model: PreTrainedModel, states: list[torch.Tensor]) -> None:
    """Refuse hidden states that are no trajectory, with the errors of `trajectory`."""
    name = type(model).__name__
    if not states:
        raise ValueError(
            f"{name} returns no hidden_states: its layers can't be compared. Take a Vision "
            "Transformer of transformers, such as DINOv2, ViT, CLIP or SigLIP."
        )
    shapes = [tuple(state.shape[1:]) for state in states]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(
            f"The states of all layers must have one shape (tokens, channels); {name} has "
            f"{', '.join(map(str, dict.fromkeys(shapes)))} over its depth, and so no phases."
        )
    depth = getattr(model.config, "num_hidden_layers", len(states) - 1)
    if len(states) != depth + 1:
        raise ValueError(
            f"{name} has {depth} layers, so {depth + 1} states with the embeddings; it returns "
            f"{len(states)}."
        )
