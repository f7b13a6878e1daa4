"""Teachers: Vision Transformers of transformers, local or from the Hub, and their trajectories.

Looking at a model (`load_vision_model`, `infer_token_layout`, `trajectory`) works for any that
returns the states of its layers; a Raptor can be made of the families that `load_backbone` takes.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .configuration_raptor import (
    TEACHER_FAMILIES,
    TokenLayout,
    teacher_family,
    tower_config,
)
from .modeling_raptor import find_towers, first_layer_call, image_arguments, make_shell, pair
from .weights import check_weight_files, weights_digest


def load_backbone(name_or_path: str, revision: str | None = None) -> PreTrainedModel:
    """Load a frozen teacher or Raptor, without a task head, in evaluation mode and float32.

    Args:
        name_or_path: a Hub id or a local folder; of a classifier, or of a model with a vision tower
            (CLIP, LLaVA, Depth Anything), the backbone within it is taken.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: a model of a family that a Raptor can't be made of, or weights that are missing.
        OSError: no such model.
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    teacher_family(getattr(config, "teacher_config", tower_config(config)))
    return load_vision_model(name_or_path, revision)


def load_vision_model(name_or_path: str, revision: str | None = None) -> PreTrainedModel:
    """Load any vision model without its head, frozen, in evaluation mode and float32.

    Args:
        name_or_path: a Hub id or a local folder; of a model with a vision tower (CLIP, LLaVA, Depth
            Anything) this tower is taken.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: a model that `AutoModel` does not know, or weights that are missing or pickled.
        OSError: no such model, or one without weights in safetensors.
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    check_weight_files(name_or_path, config, revision)
    options = {"revision": revision, "dtype": torch.float32, "use_safetensors": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a classifier's head that is not wanted here is no warning
    try:
        model = _load_alone(name_or_path, tower_config(config), **options)
    except (ValueError, KeyError):
        if tower_config(config) is config:
            raise
        # some towers AutoModel can't load by themselves, or not out of the weights of a whole model
        model = _load_within(name_or_path, config, **options)
    finally:
        logging.set_verbosity(verbosity)
    _own_weights(model)
    if getattr(model.config, "mask_ratio", 0):  # MAE masks in evaluation, too
        model.config.mask_ratio = 0.0
    return model.eval().requires_grad_(False)


def _load_alone(name_or_path: str, config: PreTrainedConfig, **options) -> PreTrainedModel:
    """Load a backbone by its own configuration; a ValueError names weights that are missing."""
    model, loaded = AutoModel.from_pretrained(
        name_or_path, config=config, output_loading_info=True, **options
    )
    missing = loaded["missing_keys"]
    if missing and all(key.startswith("pooler.") for key in missing):
        # a classifier was trained without the pooler that its backbone has: no state needs it, and
        # random weights would make the digest of the teacher another one every time
        model.pooler, missing = None, set()
    if missing or loaded["mismatched_keys"]:
        raise ValueError(
            f"{name_or_path} lacks weights of its own model: "
            f"{sorted(missing)[:5]} … Download or save it again."
        )
    return model


def _load_within(name_or_path: str, config: PreTrainedConfig, **options) -> PreTrainedModel:
    """Load a whole model for the sake of its vision tower, and return that as a bare backbone.

    Raises:
        ValueError: a class that transformers has not, or a model without one such tower.
    """
    name = (config.architectures or [config.model_type])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(f"{name_or_path} is a {name}, which transformers does not have.")
    towers = list(find_towers(model_class.from_pretrained(name_or_path, **options)).values())
    if len(towers) != 1:
        raise ValueError(
            f"{name_or_path}, a {name}, must have one vision tower of a family that can teach "
            f"({', '.join(TEACHER_FAMILIES)}); it has {len(towers)}."
        )
    weights, config = towers[0].state_dict(), towers[0].config
    bare = make_shell(config, config.num_hidden_layers)
    bare.load_state_dict({key: weights[key] for key in bare.state_dict()})
    bare.name_or_path = config.name_or_path = str(name_or_path)
    return bare


def _own_weights(model: PreTrainedModel) -> None:
    """Copy a model's weights out of the file that they are mapped from.

    They lie there at any address, and kernels choose their way by the address: so equal weights of
    two files would give states that differ in the last bits. Torch's own memory is aligned alike.
    """
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.clone()


def load_processor(
    name_or_path: str, revision: str | None = None, resolution: list[int] | None = None
):
    """Load the image processor that belongs to a teacher or a Raptor.

    Args:
        resolution: height and width in pixels that it shall make; empty: its own.

    Raises:
        OSError: there is none beside the model.
        ValueError: a resolution that is no multiple of the patch, or for a processor whose sizes
            are given in another way.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path, revision=revision)
    except ImportError as error:
        raise ImportError(
            f"The image processor of {name_or_path} needs a library that is not installed: "
            f"{' '.join(str(error).split())[:120]} …"
        ) from error
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name_or_path} must bring its image processor (preprocessor_config.json), which says "
            "how its images are resized and normalised; none was found. Save one beside the model "
            "with processor.save_pretrained."
        ) from error
    if not resolution:
        return processor
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    patch = getattr(tower_config(config), "patch_size", None)
    patches = [patch, patch] if isinstance(patch, int) else list(patch or [1, 1])
    if any(pixels % side for pixels, side in zip(resolution, patches, strict=True)):
        raise ValueError(
            f"--resolution takes multiples of the patch, {patches[0]}×{patches[1]} pixels in "
            f"{name_or_path}; got {resolution[0]}×{resolution[1]}."
        )
    return _at_resolution(processor, resolution)


def image_size(processor) -> tuple[int, int]:
    """Return the height and width in pixels of what a processor makes of a photograph."""
    made = processor(Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"]
    return tuple(made.shape[-2:])


def _at_resolution(processor, resolution: list[int]):
    """Return a processor that makes images of another height and width in pixels.

    What is cut off at the edges stays the same share of the image.

    Args:
        processor: of a model; it is not changed.
        resolution: height and width.

    Raises:
        ValueError: a processor whose sizes are given in another way.
    """
    if tuple(resolution) == image_size(processor):
        return processor
    height, width = resolution
    size, crop = dict(processor.size), getattr(processor, "crop_size", None)
    processor = copy.deepcopy(processor)
    if processor.do_resize and size.get("height") and size.get("width"):
        processor.size = type(processor.size)(height=height, width=width)
        if getattr(processor, "do_center_crop", False):
            processor.crop_size = type(processor.size)(height=height, width=width)
    elif processor.do_resize and size.get("shortest_edge") and processor.do_center_crop:
        margin = size["shortest_edge"] / max(crop["height"], crop["width"])
        processor.size = type(processor.size)(shortest_edge=round(margin * max(resolution)))
        processor.crop_size = type(processor.size)(height=height, width=width)
    else:
        raise ValueError(
            f"--resolution needs an image processor that resizes to a height and width, or resizes "
            f"the shorter side and crops the middle; this {type(processor).__name__} has size "
            f"{size} and crop_size {crop}. Change its preprocessor_config.json instead."
        )
    return processor


def hub_commit(name_or_path: str, revision: str | None = None) -> str | None:
    """Commit of a loaded Hub model, read off the local cache; None for a local folder."""
    if Path(name_or_path).is_dir():
        return None
    config = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def teacher_identity(
    teacher: PreTrainedModel, revision: str | None = None
) -> dict[str, str | None]:
    """Return what an activation dataset remembers of its teacher: name, Hub commit, weights."""
    return {
        "name": teacher.name_or_path,
        "revision": hub_commit(teacher.name_or_path, revision),
        "weights_sha256": weights_digest(teacher),
    }


def infer_token_layout(
    config: PreTrainedConfig, *, num_tokens: int, height: int, width: int
) -> TokenLayout:
    """Return the token layout of any vision model's states, from how many tokens an image gives.

    Tokens that are no patches come first: one cls, the rest count as registers (so does DeiT's
    distillation token). No such token, no cls (SigLIP, I-JEPA).

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
        raise ValueError(
            f"A model cut into patches has a patch_size; the configuration of this "
            f"{config.model_type!r} has none, so its states can't be told apart into tokens."
        )
    patch_height, patch_width = (
        (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    )
    num_patches = (height // patch_height) * (width // patch_width)
    if num_tokens < num_patches:
        raise ValueError(
            f"An image of {height}×{width} pixels has {num_patches} patches of {patch_height}×"
            f"{patch_width}, and a state at least as many tokens; this {config.model_type!r} has "
            f"{num_tokens}: it merges or masks patches (set mask_ratio to 0 where it has one)."
        )
    num_prefix_tokens = num_tokens - num_patches
    return TokenLayout(min(1, num_prefix_tokens), max(0, num_prefix_tokens - 1))


@torch.no_grad()
def trajectory(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return all states before the final norm: (B, C, H, W) to (B, L + 1, N, D).

    Raises:
        ValueError: a model that gives no states, not one for every layer, or states whose shape
            changes over the depth.
    """
    known = model.config.model_type in TEACHER_FAMILIES
    arguments = image_arguments(model.config, pixel_values) if known else {}
    layer, last = _unverified_last_layer(model), []
    hook = layer and layer.register_forward_hook(lambda _module, _args, out: last.append(out))
    try:
        output = model(pixel_values, output_hidden_states=True, **arguments)
    finally:
        if hook:
            hook.remove()
    states = list(getattr(output, "hidden_states", None) or [])
    if states and last:
        states[-1] = last[-1][0] if isinstance(last[-1], tuple) else last[-1]
    _check_states(model, states)
    if known:  # a teacher that masks patches has fewer
        height, width = pixel_values.shape[-2:]
        infer_token_layout(model.config, num_tokens=states[0].shape[1], height=height, width=width)
    return torch.stack(states, dim=1)


@torch.no_grad()
def run_layers(
    teacher: PreTrainedModel,
    states: torch.Tensor,
    layers: Sequence[int],
    image_size: tuple[int, int] | None = None,
) -> list[torch.Tensor]:
    """Return states (B, N, D) and what every one of some layers of a teacher makes of them in turn.

    Args:
        teacher: of a family of `TEACHER_FAMILIES`.
        layers: numbers 1 … L.
        image_size: height and width of the images in pixels; default: as the teacher was made for.
    """
    size = image_size or pair(teacher.config.image_size)
    modules = teacher.get_submodule(teacher_family(teacher.config).layers)
    black = states.new_zeros(1, teacher.config.num_channels, *size)
    _, args, kwargs = first_layer_call(teacher, black)
    run = [states]
    for layer in layers:
        output = modules[layer - 1](run[-1], *args, **kwargs)
        run.append(output[0] if isinstance(output, tuple) else output)
    return run


def final_norm(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Apply the norm after the last layer of a teacher or Raptor, if it has one, to (B, N, D)."""
    if model.config.model_type == "raptor":
        return model.norm(states)
    norm = teacher_family(model.config).final_norm
    return states if norm is None else model.get_submodule(norm)(states)


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
    family = teacher_family(model.config)
    return states if family.output_normed else final_norm(model, states)


def up_to_layer(teacher: PreTrainedModel, layer: int) -> PreTrainedModel:
    """Return the same model with the same weights, but without the layers after `layer`.

    A model whose layers are not known (`TEACHER_FAMILIES`) is given back whole.
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
    (`tie_last_hidden_states`), so it is read off the layer itself. None where that can't be or need
    not be: Raptors and their teachers keep the contract, and hooks would recompile compiled ones.
    """
    tied = getattr(model.config, "tie_last_hidden_states", None)
    if not tied and model.config.model_type in (*TEACHER_FAMILIES, "raptor"):
        return None
    depth = getattr(model.config, "num_hidden_layers", None)
    stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    stack = next(stacks, None)
    return stack[-1] if stack else None


def _check_states(model: PreTrainedModel, states: list[torch.Tensor]) -> None:
    """Refuse states that are no trajectory; errors as `trajectory`."""
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
