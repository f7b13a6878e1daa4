"""How many floating-point operations blocks and their training take."""

import torch
from transformers import PreTrainedConfig

from ..configuration_raptor import RaptorConfig
from ..loop.arguments import LoopArguments
from ..modeling_raptor import bare_teacher
from ..teachers.layers import config_for_teacher
from .arguments import ObjectiveArguments

UNIT_IMAGES = 64


def application_flops(config: RaptorConfig, num_tokens: int) -> int:
    """Return FLOP of one application of a block to one image, forward only."""
    linear = sum(inputs * outputs for inputs, outputs in config.linear_sizes().values())
    return 2 * num_tokens * linear + 4 * num_tokens * num_tokens * config.hidden_size


def optimizer_flops(optimizer: str, config: RaptorConfig, num_blocks: int) -> int:
    """Return FLOP of an update's products: Muon's five Newton-Schulz iterations; 0 for AdamW.

    For a matrix of m ≤ n: X·Xᵀ, the square of that, and its product with X.
    """
    if optimizer != "muon":
        return 0
    total = 0
    for size in config.linear_sizes().values():
        m, n = sorted(size)
        total += 5 * (4 * m * m * n + 2 * m**3)
    return num_blocks * total


def teacher_layer(teacher_config: PreTrainedConfig, **changes) -> RaptorConfig:
    """Return the configuration of a block like a layer of a teacher, which is not loaded.

    Args:
        changes: how it shall differ, see `config_for_teacher`.
    """
    with torch.device("meta"):
        teacher = bare_teacher(teacher_config, num_layers=1)
    return config_for_teacher(teacher, [teacher_config.num_hidden_layers], **changes)


def rollouts_per_step(objective: ObjectiveArguments, steps: int) -> float:
    """Return how often a step goes through a chain on average; with forcing it may be twice."""
    passes = 0
    for step in range(steps):
        forcing = objective.forcing(step / steps)
        passes += (forcing > 0) + (forcing < 1)
    return passes / max(1, steps)


def step_units(
    objective: ObjectiveArguments,
    loop: LoopArguments,
    config: RaptorConfig,
    num_tokens: int,
    *,
    num_applications: int | None = None,
) -> float:
    """Return the compute of a training step on average: the student both ways, and its optimiser.

    The unit is one step of a Raptor of matched blocks through all of the teacher's layers, forward
    and backward, with 64 images.

    Args:
        num_tokens: of an image.
        num_applications: how many blocks a student runs through; default: L.
    """
    layers = config.num_hidden_layers
    flops = 3 * rollouts_per_step(objective, 1000) * loop.batch_size * (num_applications or layers)
    flops *= application_flops(config, num_tokens)
    flops += optimizer_flops(loop.optimizer, config, len(config.phases))
    layer = application_flops(teacher_layer(config.teacher_config), num_tokens)
    return flops / (3 * UNIT_IMAGES * layers * layer)
