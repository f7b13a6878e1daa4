"""Make a Raptor of a teacher: blocks like its layers around its embeddings and its final norm."""

import os

from transformers import PreTrainedModel

from ..modeling_raptor import RaptorModel
from .checks import check_against, check_teacher
from .layers import config_for_teacher, copy_mean_of_layers, layer_parts


def make_raptor(
    teacher: PreTrainedModel,
    phases: list[int],
    *,
    init: str = "teacher",
    ffn: str | None = None,
    intermediate_size: int | None = None,
    depth_scaling: bool = True,
    block_norm_eps: float | None = None,
) -> RaptorModel:
    """Make an untrained Raptor around the frozen embeddings and final norm of a teacher.

    Args:
        teacher: the backbone (`Dinov2Model`, …), not a model with a task head.
        phases: number of layers that each block stands for; they sum to the teacher's depth.
        init: `"teacher"`: every block starts as the mean of its phase's layers; or `"random"`. On
            a real DINOv2-S the R² after 220 steps was .521 and .349.
        ffn, intermediate_size: see `RaptorConfig`; None takes the teacher's own.
        depth_scaling: see `RaptorConfig`.
        block_norm_eps: of random blocks; None takes the eps of the teacher's layers.

    Raises:
        ValueError: phases that do not sum to the teacher's depth, a teacher of an unknown family,
            offloaded or quantised, a model around a teacher (`raptorize` takes those), or
            `init="teacher"` with an eps or another FFN than the teacher's.
    """
    if init not in ("random", "teacher"):
        raise ValueError(f"init must be 'teacher' or 'random'; got {init!r}.")
    if init == "teacher" and block_norm_eps is not None:
        raise ValueError(
            f"block_norm_eps={block_norm_eps} contradicts init='teacher', which takes over the "
            "teacher's. Leave it out, or start with init='random'."
        )
    check_teacher(teacher)

    # embeddings and final norm are the teacher's, and stay as they are
    config = config_for_teacher(
        teacher,
        phases,
        ffn=ffn,
        intermediate_size=intermediate_size,
        depth_scaling=depth_scaling,
        block_norm_eps=block_norm_eps,
    )
    if os.path.isdir(teacher.name_or_path):
        config.teacher_config.name_or_path = ""  # do not leak local paths to the Hub
    model = RaptorModel(config).to(teacher.dtype)
    weights = teacher.state_dict()
    model.shell.load_state_dict({name: weights[name] for name in model.shell.state_dict()})
    model.shell.requires_grad_(False)

    # blocks
    if init == "teacher":
        layers = teacher.get_submodule(model.family.layers)
        for block, (start, stop) in zip(model.blocks, config.spans(), strict=True):
            copy_mean_of_layers(block, layers[start:stop], layer_parts(teacher.config))
    check_against(model, teacher, blocks=init == "teacher")
    return model
