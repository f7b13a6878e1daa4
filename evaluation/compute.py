"""The unit of compute in which recipes and students are compared."""

import torch

from raptor_hf.configuration_raptor import RaptorConfig
from raptor_hf.distillation.arguments import ObjectiveArguments
from raptor_hf.distillation.compute import (
    application_flops,
    optimizer_flops,
    rollouts_per_step,
)
from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.modeling_raptor import bare_teacher
from raptor_hf.teachers.layers import config_for_teacher

UNIT_IMAGES = 64


def step_units(
    objective: ObjectiveArguments, loop: LoopArguments, config: RaptorConfig, num_tokens: int
) -> float:
    """Return the compute of a training step on average: the student both ways, and its optimiser.

    The unit is one step of a Raptor of matched blocks through all of the teacher's layers, forward
    and backward, with 64 images.

    Args:
        num_tokens: of an image.
    """
    layers = config.num_hidden_layers
    flops = 3 * rollouts_per_step(objective, 1000) * loop.batch_size * layers
    flops *= application_flops(config, num_tokens)
    flops += optimizer_flops(loop.optimizer, config, len(config.phases))
    # a block like a layer of the teacher
    with torch.device("meta"):
        teacher = bare_teacher(config.teacher_config, num_layers=1)
    matched = config_for_teacher(teacher, [layers])
    layer = application_flops(matched, num_tokens)
    return flops / (3 * UNIT_IMAGES * layers * layer)
