"""The one equation of training: a rollout that is reset to the teacher's states at some layers.

Given a teacher's trajectory a₀ … a_L and a set R of reset layers that contains the first,

    â_ℓ = B(a_{ℓ-1} if ℓ-1 ∈ R else â_{ℓ-1}, depth ℓ)
    loss(R) = mean over ℓ of token_loss(â_ℓ, a_ℓ)

R = every layer is teacher forcing, R = the start of every span is block pre-training, and R = {0}
is the whole model end to end (arXiv 2512.19941, §4 and Fig. 10). Both stages of training mix two of
them, λ·loss(every layer) + (1 − λ)·loss(first layer): see `matching.TrajectoryMatching`.
"""

import torch
from accelerate.utils import gather_object
from torch.nn import functional

from ..activations.online import Activations
from ..data import batches

_VARIANCE_ROWS = 512
_ROWS_AT_ONCE = 32


def token_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    groups: dict[str, slice],
    weights: dict[str, float] | None = None,
    loss: str = "mse",
    variances: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean error of the tokens of some states (…, S, N, D), a scalar.

    Args:
        groups: token groups of the states (`TokenLayout.groups`).
        weights: weight of each group's own mean; groups that the model does not have are left out
            and the rest is scaled to the same sum. None takes the plain mean over all tokens.
        loss: the error of a token. `"mse"`: mean over channels of the squared difference;
            `"cosine"`: 1 − cosine similarity; `"mse+cosine"`: half of each. (The reference's half
            and half lacks the constant ½, and its cosine alone is minimised with the wrong sign.)
        variances: (groups, S), what the squared error of each token group and layer is divided by.
            Of the variances of the teacher's states (`state_variances`), the result is 1 − R².
    """
    error = 0.0
    if loss in ("mse", "mse+cosine"):
        error = (prediction - target).square().mean(dim=-1)
        if variances is not None:
            error = error * _per_token(1 / variances, groups, error.shape[-1])
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


def _per_token(values: torch.Tensor, groups: dict[str, slice], num_tokens: int) -> torch.Tensor:
    """Return values (groups, S) as (S, N): each token has those of its group."""
    spread = values.new_empty(values.shape[1], num_tokens)
    for row, tokens in zip(values, groups.values(), strict=True):
        spread[:, tokens] = row[:, None]
    return spread


@torch.no_grad()
def state_variances(activations: Activations) -> dict[str, list[float]]:
    """Measure the variance of a teacher's states, by token group and layer of the source.

    The mean over channels of the variance around the channel's mean over images and the tokens of
    the group, as in `RSquared`; `all` pools the groups. Of 512 rows at most, at equal distances,
    which the processes share: every run on these activations gets the same numbers.
    """
    number = min(_VARIANCE_ROWS, len(activations))
    rows = torch.linspace(0, len(activations) - 1, number).long().tolist()
    groups, sums = activations.layout.groups(), []
    for batch in batches(activations, _ROWS_AT_ONCE, "variance of the states", rows=rows):
        states = activations.states(batch)
        for name, tokens in groups.items():
            part = states[:, :, tokens].double()
            count = part.shape[0] * part.shape[2]
            moments = part.sum(dim=(0, 2)).cpu(), part.square().sum(dim=(0, 2)).cpu()
            sums.append((name, count, *moments))
    spreads, counts = {}, {}
    sums = gather_object(sums)
    for name in groups:
        own = [entry for entry in sums if entry[0] == name]
        counts[name] = sum(entry[1] for entry in own)
        total, squares = (sum(entry[i] for entry in own) for i in (2, 3))
        spreads[name] = (squares - total.square() / counts[name]).mean(dim=1)
    spreads["all"], counts["all"] = sum(spreads.values()), sum(counts.values())
    return {name: (spreads[name] / counts[name]).tolist() for name in spreads}
