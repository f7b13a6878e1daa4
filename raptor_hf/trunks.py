"""Turn a live model into its Raptor, in place of its layers."""
# `raptorize` is over 40 lines: more than half of it is signature and docstring.

from torch import nn
from transformers import PreTrainedModel

from .configuration_raptor import TEACHER_FAMILIES, RaptorConfig, RaptorizedConfig
from .distillation.starts import new_raptor
from .modeling_raptor import (
    RaptorModel,
    RaptorPreTrainedModel,
    check_weights,
    describe,
    find_towers,
)
from .modeling_raptorized import RaptorTrunk, install_trunk, raptorized_class


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
            untrained ones.
        init: what untrained blocks start from: "aligned", "teacher" or "random".
        tower: path of the tower within the model, where it has several.

    Raises:
        ValueError: a model without such a tower or with several, one that has a trunk already, a
            tower that is offloaded or quantised, phases that don't sum to its depth, or blocks of
            another family, width or phases.

    Returns:
        The model itself.
    """
    path, teacher = _find_tower(model, tower)
    if blocks is None:
        if phases is None:
            raise ValueError("Give phases, such as [7, 3, 2], or blocks that were distilled.")
        raptor = new_raptor(teacher, phases, init=init)
    else:
        raptor = _check_blocks(blocks.base_model, phases, teacher)
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
    if any(isinstance(module, RaptorTrunk) for module in model.modules()) or isinstance(
        model, RaptorPreTrainedModel
    ):
        raise ValueError(f"This {type(model).__name__} is a Raptor already.")
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
    raptor: RaptorModel, phases: list[int] | None, teacher: PreTrainedModel
) -> RaptorModel:
    """Return a Raptor whose blocks fit a tower; a ValueError says what does not."""
    if phases is not None and list(phases) != raptor.config.phases:
        raise ValueError(
            f"The blocks were made for phases={raptor.config.phases}; got {list(phases)}."
        )

    def facts(config) -> dict:
        return {
            "family": config.model_type,
            "channels": config.hidden_size,
            "heads": config.num_attention_heads,
            "layers": config.num_hidden_layers,
        }

    own: RaptorConfig = raptor.config.teacher_config
    ours, theirs = facts(own), facts(teacher.config)
    if ours != theirs:
        raise ValueError(
            "The blocks must be of a Raptor of this tower: it has "
            f"{', '.join(f'{key} {value}' for key, value in theirs.items())}; the blocks were made "
            f"for {', '.join(f'{key} {value}' for key, value in ours.items())}."
        )
    return raptor
