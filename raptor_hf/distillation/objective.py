"""The one equation of training: a rollout that is reset to the teacher's states at some layers.

Given a teacher's trajectory a₀ … a_L and a set R of reset layers that contains the first,

    â_ℓ = B(a_{ℓ-1} if ℓ-1 ∈ R else â_{ℓ-1}, depth ℓ)
    loss(R) = mean over ℓ of token_loss(â_ℓ, a_ℓ)

R = every layer is teacher forcing, R = the start of every span is block pre-training, and R = {0}
is the whole model end to end (arXiv 2512.19941, §4 and Fig. 10). Both stages of training mix two of
them, λ·loss(every layer) + (1 − λ)·loss(first layer): see `matching.TrajectoryMatching`.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn import functional

TOKEN_GROUPS = ("cls", "registers", "patches")


@dataclass(kw_only=True)
class ObjectiveArguments:
    """What a block is trained to do; every option of the reference trainer."""

    objective: Literal["annealed", "autoregressive", "teacher_forcing"] = field(
        default="annealed",
        metadata={"help": "annealed goes from teacher forcing to autoregressive (rollouts)"},
    )
    teacher_forcing_fraction: float | None = field(
        default=None,
        metadata={"help": "annealed: share of the steps over which forcing fades; default 0.25"},
    )
    teacher_forcing_floor: float | None = field(
        default=None,
        metadata={"help": "annealed: least weight of forcing; default 0"},
    )
    annealing: Literal["weighted", "drawn"] = field(
        default="weighted",
        metadata={
            "help": "annealed: both losses at every step and their weighted mean, or one of them, "
            "drawn with its weight as the probability (the same on average, for less compute)"
        },
    )
    phase_fraction: float = field(
        default=0.0,
        metadata={
            "help": "share of the steps, the first ones, in which every block of a Raptor rolls "
            "out from the teacher's state at the start of its phase; then from the first layer"
        },
    )
    forcing_patches: int = field(
        default=0,
        metadata={
            "help": "teacher forcing learns that many patches, drawn anew at every step, beside "
            "cls and registers (all tokens are looked at); 0: all"
        },
    )
    loss: Literal["mse", "cosine", "mse+cosine"] = field(
        default="mse", metadata={"help": "error of a token: mse, cosine (1 − cos), or half of each"}
    )
    token_weights: str = field(
        default="none",
        metadata={"help": "weights of cls,registers,patches (0.45,0.10,0.45), or none: plain mean"},
    )
    noise_std: float = field(
        default=0.0,
        metadata={"help": "σ of Gaussian noise on every block's input"},
    )

    def __post_init__(self):
        self.check_objective()

    def check_objective(self) -> None:
        """Refuse options that are out of range or contradict each other."""
        if self.objective not in ("annealed", "autoregressive", "teacher_forcing"):
            raise ValueError(
                "objective must be 'annealed', 'autoregressive' or 'teacher_forcing'; "
                f"got {self.objective!r}."
            )
        if self.loss not in ("mse", "cosine", "mse+cosine"):
            raise ValueError(f"loss must be 'mse', 'cosine' or 'mse+cosine'; got {self.loss!r}.")
        for name in ("teacher_forcing_fraction", "teacher_forcing_floor"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.objective != "annealed":
                raise ValueError(
                    f"{name}={value} contradicts objective={self.objective!r}: only 'annealed' "
                    f"fades teacher forcing. Leave out {name}, or choose objective='annealed'."
                )
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {value}.")
        if self.annealing not in ("weighted", "drawn"):
            raise ValueError(f"annealing must be 'weighted' or 'drawn'; got {self.annealing!r}.")
        if self.annealing == "drawn" and self.objective != "annealed":
            raise ValueError(
                f"annealing='drawn' is for objective='annealed'; got {self.objective!r}, which has "
                "one loss at every step."
            )
        if not 0 <= self.phase_fraction <= 1:
            raise ValueError(f"phase_fraction must lie in [0, 1]; got {self.phase_fraction}.")
        if self.phase_fraction and self.objective == "teacher_forcing":
            raise ValueError(
                "phase_fraction says where rollouts start; objective='teacher_forcing' has none."
            )
        if self.forcing_patches < 0 or (
            self.forcing_patches and self.objective == "autoregressive"
        ):
            raise ValueError(
                "forcing_patches is a number of patches ≥ 0, for an objective with teacher "
                f"forcing; got {self.forcing_patches} and objective={self.objective!r}."
            )
        if not 0 <= self.noise_std < math.inf:
            raise ValueError(f"noise_std must be a number ≥ 0; got {self.noise_std}.")
        parse_token_weights(self.token_weights)

    def forcing(self, progress: float) -> float:
        """λ, the weight of teacher forcing, at a progress through the run in [0, 1)."""
        if self.objective != "annealed":
            return 1.0 if self.objective == "teacher_forcing" else 0.0
        fraction = 0.25 if self.teacher_forcing_fraction is None else self.teacher_forcing_fraction
        fading = 1 - progress / fraction if fraction > 0 else 0.0
        return max(self.teacher_forcing_floor or 0.0, fading)

    def weights(self, progress: float) -> tuple[float, float]:
        """How much teacher forcing and rollouts count in a step, λ and 1 − λ, or one of both."""
        forcing = self.forcing(progress)
        if self.annealing == "drawn" and 0 < forcing < 1:
            forcing = float(torch.rand(()) < forcing)
        return forcing, 1 - forcing


def parse_token_weights(text: str) -> dict[str, float] | None:
    """`"0.45,0.10,0.45"` as the weights of cls, registers and patches; `"none"` as None.

    Raises:
        ValueError: not three numbers, a negative one, or a sum of zero.
    """
    if text == "none":
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != 3 or not all(0 <= w < math.inf for w in weights) or sum(weights) <= 0:
        raise ValueError(
            "Token weights are three numbers ≥ 0 for cls, registers and patches, "
            f"like 0.45,0.10,0.45, or none; got {text!r}."
        )
    return dict(zip(TOKEN_GROUPS, weights, strict=True))


def token_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    groups: dict[str, slice],
    weights: dict[str, float] | None = None,
    loss: str = "mse",
) -> torch.Tensor:
    """Mean error of the tokens of some states (…, N, D), a scalar.

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
