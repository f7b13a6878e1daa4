"""The one equation of training: a rollout that is reset to the teacher's states at some layers.

Given a teacher's trajectory a₀ … a_L and a set R of reset layers that contains the first,

    â_ℓ = B(a_{ℓ-1} if ℓ-1 ∈ R else â_{ℓ-1}, depth ℓ)
    loss(R) = mean over ℓ of token_loss(â_ℓ, a_ℓ)

R = every layer is teacher forcing, R = the start of every span is block pre-training, and R = {0}
is the whole model end to end (arXiv 2512.19941, §4 and Fig. 10). Both stages of training mix two of
them, λ·loss(every layer) + (1 − λ)·loss(first layer): see `matching.TrajectoryMatching`.
"""

import torch
from torch.nn import functional

from .arguments import ObjectiveArguments


def loss_weights(objective: ObjectiveArguments, progress: float) -> tuple[float, float]:
    """Return how much teacher forcing and rollouts count in a step: λ and 1 − λ, or one of both."""
    forcing = objective.forcing(progress)
    if objective.annealing == "drawn" and 0 < forcing < 1:
        forcing = float(torch.rand(()) < forcing)
    return forcing, 1 - forcing


def token_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    groups: dict[str, slice],
    weights: dict[str, float] | None = None,
    loss: str = "mse",
) -> torch.Tensor:
    """Return the mean error of the tokens of some states (…, N, D), a scalar.

    Args:
        groups: token groups of the states (`TokenLayout.groups`).
        weights: weight of each group's own mean; groups that the model does not have are left out
            and the rest is scaled to the same sum. None takes the plain mean over all tokens.
        loss: the error of a token. `"mse"`: mean over channels of the squared difference;
            `"cosine"`: 1 − cosine similarity; `"mse+cosine"`: half of each. (The reference's half
            and half lacks the constant ½, and its cosine alone is minimised with the wrong sign.)
    """
    error = 0.0
    if loss in ("mse", "mse+cosine"):
        error = (prediction - target).square().mean(dim=-1)
    if loss in ("cosine", "mse+cosine"):
        angular = 1 - functional.cosine_similarity(prediction, target, dim=-1)
        error = angular if loss == "cosine" else 0.5 * error + 0.5 * angular
    if weights is None:
        return error.mean()
    present = sum(weights[name] for name in groups)
    if present <= 0:
        raise ValueError(
            f"The token weights {weights} leave nothing to learn for a model with the token groups "
            f"{', '.join(groups)}."
        )
    scale = sum(weights.values()) / present
    return scale * sum(weights[name] * error[..., groups[name]].mean() for name in groups)
