"""Turn a live model into its Raptor, in place of its layers."""
# `raptorize` is over 40 lines: more than half of it is signature and docstring.

import math
import warnings

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_raptor import (
    TEACHER_FAMILIES,
    RaptorizedConfig,
    token_layout,
)
from .distillation.starts import new_raptor
from .modeling_raptor import RaptorModel, RaptorPreTrainedModel, pair, patch_grid, patch_sides
from .modeling_raptorized import RaptorTrunk, install_trunk, raptorized_class
from .teachers.checks import check_weights, describe
from .teachers.layers import layer_parts
from .teachers.loading import find_towers


def raptorize(
    model: PreTrainedModel,
    phases: list[int] | None = None,
    blocks: RaptorPreTrainedModel | None = None,
    *,
    init: str = "aligned",
    tower: str | None = None,
) -> PreTrainedModel:
    """Let a few shared blocks stand where a model's layers stood.

    The model stays what it is: a `CLIPModel` still gives `logits_per_image`, a classifier
    classifies, a vision language model generates. `save_pretrained` makes one repository that
    transformers' Auto classes load again, also without this package (`trust_remote_code=True`).

    Args:
        model: of any class of transformers, with a vision tower of a family of `TEACHER_FAMILIES`.
        phases: how many layers each block stands for; default: those of `blocks`.
        blocks: a Raptor that was distilled from this tower, whose blocks are taken over; default:
            untrained ones. A warning says where its embeddings are not the tower's.
        init: what untrained blocks start from: "aligned", "teacher" or "random".
        tower: path of the tower within the model, where it has several.

    Raises:
        ValueError: a model without such a tower or with several, one that is a Raptor already, a
            tower that is offloaded or quantised, phases that don't sum to its depth, or blocks that
            were made for another kind of tower, for other phases or to exit early.

    Returns:
        The model itself.
    """
    path, teacher = _find_tower(model, tower)
    if blocks is None:
        if phases is None:
            raise ValueError("Give phases, such as [7, 3, 2], or blocks that were distilled.")
        raptor = new_raptor(teacher, phases, init=init)
    else:
        raptor = _check_blocks(blocks, phases, teacher)
        _compare_weights(raptor, teacher)
    layers = teacher.get_submodule(TEACHER_FAMILIES[teacher.config.model_type].layers)
    config = RaptorizedConfig(
        teacher_config=model.config,
        architecture=type(model).__name__,
        tower=path,
        raptor=raptor.config,
        layer_parameters=sum(w.numel() for w in layers.parameters()),
    )
    model.__class__ = raptorized_class(type(model))
    model.config.raptorized = config
    like = next(teacher.parameters())
    trunk = install_trunk(model, config)
    trunk.blocks.load_state_dict(raptor.blocks.state_dict())
    trunk.to(device=like.device, dtype=like.dtype)
    return model


def _find_tower(model: nn.Module, tower: str | None) -> tuple[str, PreTrainedModel]:
    """Return the path and the module of the one tower that is meant."""
    for inside, module in model.named_modules():
        if isinstance(module, RaptorTrunk | RaptorPreTrainedModel):
            part = f", at {inside!r}" if inside else ""
            raise ValueError(f"This {type(model).__name__} is a Raptor already{part}.")
    towers = find_towers(model)
    if not isinstance(model, PreTrainedModel) or not towers:
        raise ValueError(
            f"{type(model).__name__} has no vision tower whose layers blocks can stand for; the "
            f"families that have are {', '.join(TEACHER_FAMILIES)}."
        )
    if tower is not None and tower not in towers:
        raise ValueError(f"{tower!r} is no vision tower of this model; there are {list(towers)}.")
    if tower is None and len(towers) > 1:
        raise ValueError(f"The model has several vision towers, {list(towers)}: name one (tower=).")
    path = next(iter(towers)) if tower is None else tower
    describe(towers[path])
    check_weights(towers[path])
    return path, towers[path]


def _check_blocks(
    blocks: RaptorPreTrainedModel, phases: list[int] | None, teacher: PreTrainedModel
) -> RaptorModel:
    """Return a Raptor whose blocks fit a tower; a ValueError says what does not."""
    if not isinstance(blocks, RaptorPreTrainedModel):
        raise ValueError(
            "blocks must be a Raptor that was distilled from this tower, such as "
            f"RaptorModel.from_pretrained gives; got a {type(blocks).__name__}."
        )
    config = blocks.config
    if phases is not None and list(phases) != config.phases:
        raise ValueError(f"The blocks were made for phases={config.phases}; got {list(phases)}.")
    for name in ("num_applications", "exit_angle"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"The blocks' configuration has {name}={getattr(config, name)}, and within another "
                f"model blocks make all its layers. Set {name} to None to use them so."
            )
    ours, theirs = _facts(config.teacher_config), _facts(teacher.config)
    unlike = [name for name in ours if ours[name] != theirs[name]]
    if unlike:
        raise ValueError(
            "The blocks must be of a Raptor of this tower: it has "
            f"{', '.join(f'{name} {theirs[name]}' for name in unlike)}; the blocks were made "
            f"for {', '.join(f'{name} {ours[name]}' for name in unlike)}."
        )
    return blocks.base_model


def _facts(config: PreTrainedConfig) -> dict[str, object]:
    """Return what a tower and the teacher of its blocks must have in common, by its name."""
    layout, patch = token_layout(config), patch_sides(config)
    return {
        "family": config.model_type,
        "channels": config.hidden_size,
        "heads": config.num_attention_heads,
        "layers": config.num_hidden_layers,
        "colours": config.num_channels,
        "patches of": f"{patch[0]}×{patch[1]} pixels",
        "patches": math.prod(patch_grid(pair(config.image_size), config)),
        "cls tokens": layout.num_cls,
        "registers": layout.num_registers,
        "norm": getattr(config, "norm_type", "of its family"),
        "eps": getattr(config, layer_parts(config).eps),
    }


@torch.no_grad()
def _compare_weights(raptor: RaptorModel, teacher: PreTrainedModel) -> None:
    """Warn where what a Raptor took over from its teacher is otherwise in a tower.

    It is no error: a model that was fine-tuned from this teacher has moved its embeddings, too.
    """
    shell, found, differences = raptor.shell.state_dict(), teacher.state_dict(), {}
    for name, own in shell.items():
        other = found.get(name, own)
        if any(w.is_meta or not w.is_floating_point() for w in (own, other)):
            continue
        rounding = max(torch.finfo(weight.dtype).eps for weight in (own, other))
        own, other = own.float().cpu(), other.float().cpu()
        if own.shape != other.shape:
            differences[name] = math.inf
        elif (error := (own - other).norm()) > rounding * other.norm():
            differences[name] = float(error / max(own.norm(), other.norm()))
    if differences:
        most = max(differences, key=differences.get)
        warnings.warn(
            f"The weights around the layers of this {type(teacher).__name__} are not those that "
            f"the blocks were distilled with: {len(differences)} of {len(shell)} differ, most of "
            f"all {most}, by {differences[most]:.2g} of its norm. Go on if the model was "
            "fine-tuned from the blocks' teacher; blocks of another teacher make nothing of its "
            "states.",
            stacklevel=3,
        )
