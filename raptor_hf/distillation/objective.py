"""The one equation of training: a rollout that is reset to the teacher's states at some layers.

Given a teacher's trajectory a₀ … a_L and a set R of reset layers that contains the first,

    â_ℓ = B(a_{ℓ-1} if ℓ-1 ∈ R else â_{ℓ-1}, depth ℓ)
    loss(R) = mean over ℓ of token_loss(â_ℓ, a_ℓ)

R = every layer is teacher forcing, R = the start of every span is block pre-training, and R = {0}
is the whole model end to end (arXiv 2512.19941, §4 and Fig. 10). A step may mix two of them,
λ·loss(every layer) + (1 − λ)·loss(first layer): see `matching.TrajectoryMatching`.
"""

import torch
from accelerate.utils import gather_object

from ..activations.online import Activations
from ..data import batches


def token_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    groups: dict[str, slice],
    weights: dict[str, float] | None = None,
    variances: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean squared error of the tokens of some states (…, S, N, D), a scalar.

    Args:
        groups: token groups of the states (`TokenLayout.groups`).
        weights: weight of each group's own mean; groups that the model does not have are left out
            and the rest is scaled to the same sum. None takes the plain mean over all tokens.
        variances: (groups, S), what the squared error of each token group and layer is divided by.
            Of the variances of the teacher's states (`state_variances`), the result is 1 − R².
    """
    error = (prediction - target).square().mean(dim=-1)
    if variances is not None:
        # each token has the variance of its group
        divisors = torch.empty_like(error[0])
        for row, tokens in zip(variances, groups.values(), strict=True):
            divisors[:, tokens] = row[:, None]
        error = error / divisors
    if weights is None:
        return error.mean()
    present = sum(weights[name] for name in groups)
    if present <= 0:
        raise ValueError(f"Token weights {weights} leave nothing to learn of {', '.join(groups)}.")
    scale = sum(weights.values()) / present
    return scale * sum(weights[name] * error[..., groups[name]].mean() for name in groups)


def choose_rows(activations: Activations, number: int) -> list[int]:
    """Return so many rows at equal distances, or all if there are fewer."""
    last, number = len(activations) - 1, min(number, len(activations))
    return torch.linspace(0, last, number).long().tolist()


@torch.no_grad()
def state_variances(activations: Activations) -> dict[str, list[float]]:
    """Measure the variance of a teacher's states, by token group and layer of the source.

    The mean over channels of the variance around the channel's mean over images and the tokens of
    the group, as in `RSquared`. Of 512 rows at most, at equal distances,
    which the processes share: every run on these activations gets the same numbers.
    """
    groups = activations.layout.groups()
    sums = {name: [0, 0.0, 0.0] for name in groups}  # number, sum and sum of squares
    rows = choose_rows(activations, 512)
    for batch in batches(activations, 32, "variance of the states", rows=rows):
        states = activations.states(batch)
        for name, tokens in groups.items():
            part = states[:, :, tokens].double()
            sums[name][0] += part.shape[0] * part.shape[2]
            sums[name][1] += part.sum(dim=(0, 2)).cpu()
            sums[name][2] += part.square().sum(dim=(0, 2)).cpu()

    # over all processes; the mean over channels, by layer
    variances, shares = {}, gather_object([sums])
    for name in groups:
        count, total, squares = (sum(share[name][i] for share in shares) for i in range(3))
        variances[name] = ((squares - total.square() / count).mean(dim=1) / count).tolist()
    return variances
