"""Count the floating-point operations of blocks and their training."""

from ..configuration_raptor import RaptorConfig
from .arguments import ObjectiveArguments


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


def rollouts_per_step(objective: ObjectiveArguments, steps: int) -> float:
    """Return how often a step goes through a chain on average; with forcing it may be twice."""
    passes = 0
    for step in range(steps):
        forcing = objective.forcing(step / steps)
        passes += (forcing > 0) + (forcing < 1)
    return passes / max(1, steps)
