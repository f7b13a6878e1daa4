"""Make a Raptor of a teacher: blocks like its layers around its embeddings and its final norm."""

import os

from transformers import PreTrainedModel

from ..modeling_raptor import RaptorModel
from .checks import check_against, check_teacher, full_products
from .layers import config_for_teacher, copy_teacher_layers, layer_parts


def make_raptor(
    teacher: PreTrainedModel,
    phases: list[int],
    *,
    init: str = "random",
    ffn: str | None = None,
    intermediate_size: int | None = None,
    depth_scaling: bool = True,
    correction_rank: int = 0,
    correction_on: str = "attention",
    ffn_experts: int = 1,
    layerscale_value: float | None = None,
    block_norm_eps: float | None = None,
) -> RaptorModel:
    """Make an untrained Raptor around the frozen embeddings and final norm of a teacher.

    Args:
        teacher: the backbone (`Dinov2Model`, …), not a model with a task head.
        phases: numbers of layers that each block stands for; they sum to the teacher's depth.
        init: `"random"`, or `"teacher"`: every block starts as the mean of its phase's layers.
            On the digits teacher no single layer of a phase (the first, the middle, the last,
            the one that rolls out best) led to a better R² after 100 steps at k = 2, 3 or 4.
        ffn, intermediate_size: see `RaptorConfig`; None takes the teacher's own.
        depth_scaling, correction_rank, correction_on, ffn_experts: see `RaptorConfig`. With
            `init="teacher"` the phase's layers are split among the experts.
        layerscale_value: where random blocks start; None takes 1e-5.
        block_norm_eps: None takes the eps of the teacher's layers.

    Raises:
        ValueError: phases that do not sum to the teacher's depth, a teacher of an unknown
            family, offloaded, quantised or in training mode with dropout, a model around a
            teacher (`raptorize` takes those), or `init="teacher"` with a LayerScale or another
            FFN than its own.
    """
    if init not in ("random", "teacher"):
        raise ValueError(f"init must be 'random' or 'teacher'; got {init!r}.")
    if init == "teacher" and layerscale_value is not None:
        raise ValueError(
            f"layerscale_value={layerscale_value} contradicts init='teacher', which takes over "
            "the teacher's LayerScales. Leave it out, or start with init='random'."
        )
    check_teacher(teacher)
    config = config_for_teacher(
        teacher,
        phases,
        ffn=ffn,
        intermediate_size=intermediate_size,
        depth_scaling=depth_scaling,
        correction_rank=correction_rank,
        correction_on=correction_on,
        ffn_experts=ffn_experts,
        layerscale_value=1e-5 if layerscale_value is None else layerscale_value,
        block_norm_eps=block_norm_eps,
    )
    if os.path.isdir(teacher.name_or_path):  # a folder of this machine is nobody's business
        config.teacher_config.name_or_path = ""
    model = RaptorModel(config).to(teacher.dtype)
    weights = teacher.state_dict()
    model.shell.load_state_dict({name: weights[name] for name in model.shell.state_dict()})
    model.shell.requires_grad_(False)
    if init == "teacher":
        layers = teacher.get_submodule(model.family.layers)
        for block, (start, stop) in zip(model.blocks, config.spans(), strict=True):
            copy_teacher_layers(block, layers[start:stop], layer_parts(teacher.config))
    with full_products():
        check_against(model, teacher, blocks=init == "teacher")
    return model
