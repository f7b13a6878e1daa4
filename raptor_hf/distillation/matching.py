"""The module that both stages train: chains of blocks that follow a teacher."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..activations.online import Activations
from ..loop.scalars import StepResult
from ..metrics import state_statistics
from ..runs.processes import compiled
from .arguments import ObjectiveArguments
from .objective import token_loss
from .rollout import Chain, covered_layers, rollout
from .rounding import round_once, round_products


class TrajectoryMatching(nn.Module):
    """Chains of blocks that learn to follow a teacher's trajectory; they never see each other.

    Stage 1 has one chain per span, each with a block of its own; stage 2 one chain with all blocks
    of a Raptor. A chain from layer s has the loss λ·loss(every layer) + (1 − λ)·loss({s}), with λ
    from `ObjectiveArguments.forcing`; over the first `phase_fraction` of the steps rollouts start
    anew with every span. `layers` are those whose states it learns from.

    Args:
        variances: of the states of `layers` (`state_variances`), where the arguments ask for
            `normalize`; they are saved with the module, and a resumed run goes on with them.
        angles: rotary angles of families that have them, see `rotary_angles`.
        last_only: the state of each chain's last layer alone counts, as in plain distillation.

    Raises:
        ValueError: a variance of zero.
    """

    def __init__(
        self,
        chains: list[Chain],
        arguments: ObjectiveArguments,
        groups: dict[str, slice],
        variances: dict[str, list[float]] | None = None,
        angles: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        last_only: bool = False,
    ):
        super().__init__()
        self._no_split_modules = ["RaptorBlock"]  # compiled one by one; Muon takes their matrices
        self.chains, self.arguments, self.groups = chains, arguments, groups
        self.angles, self.token_loss = angles, compiled(token_loss)
        self.layers = covered_layers(chains)
        self.learned = slice(-1, None) if last_only else slice(None)
        self.blocks = nn.ModuleDict(
            {span.name: span.block for chain in chains for span in chain.spans}
        )
        self.products = []
        if arguments.quantize:
            self.products = round_products(self.blocks, arguments.quantize)

        # the variances that errors are divided by, (groups, layers)
        rows = None
        if arguments.normalize == "group":
            rows = torch.tensor([variances[name] for name in groups])
            if not (rows[:, 1:] > 0).all():
                raise ValueError(
                    "The states of a layer are the same in all images: their variance is 0, and "
                    "--normalize group would divide by it. Take --normalize none."
                )
        self.register_buffer("variances", rows)

    def forward(
        self, trajectory: torch.Tensor, progress: float
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return, for every chain, how it follows the states of `layers` (B, layers, N, D).

        A chain of S layers gives its loss, the states (B, S, N, D) that it makes, without gradients
        (rolled out if the loss counts that, else teacher-forced), and the teacher's states
        (B, S + 1, N, D), with the one that it starts from.
        """
        forcing, by_phases = self.kind(progress)
        outputs = {}
        with round_once(self.products):
            for chain in self.chains:
                outputs[chain.name] = self._follow(chain, trajectory, forcing, by_phases)
        return outputs

    def _follow(
        self, chain: Chain, trajectory: torch.Tensor, forcing: float, by_phases: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss of a chain, its states and the teacher's."""
        # the teacher's states, and their variances, at the layers of the chain
        start, stop = chain.layers[0], chain.layers[-1]
        part = slice(start - self.layers.start, stop - self.layers.start + 1)
        target, variances = trajectory[:, part], None
        if self.variances is not None:
            variances = self.variances[:, part][:, 1:][:, self.learned]

        # teacher forcing is a rollout that is reset at every layer
        starts, loss = {start}, 0.0
        if by_phases:
            starts = {span.start for span in chain.spans}
        for weight, resets in ((forcing, range(start, stop)), (1 - forcing, starts)):
            if weight == 0:
                continue
            prediction = rollout(chain.spans, target, resets=resets, angles=self.angles)
            loss = loss + weight * self.token_loss(
                prediction[:, self.learned],
                target[:, 1:][:, self.learned],
                groups=self.groups,
                weights=chain.weights,
                variances=variances,
            )
        return loss, prediction.detach(), target

    def kind(self, progress: float) -> tuple:
        """Return the properties of a step beside its batch, as `fit` takes them."""
        return self.arguments.forcing(progress), self.arguments.by_phases(progress)


def chain_statistics(
    prediction: torch.Tensor, target: torch.Tensor, groups: dict[str, slice]
) -> dict[str, list]:
    """Return rows for `RSquared` of the states (B, S, N, D) of a chain.

    Args:
        target: (B, S + 1, N, D), the teacher's states, with the one that the chain starts from.
    """
    whole = torch.cat([target[:, :1], prediction], dim=1)
    return state_statistics(prediction=whole, target=target, groups=groups)


def matching_loss(activations: Activations) -> Callable:
    """Return `compute_loss` of `fit` for a `TrajectoryMatching` and the source of its batches."""
    groups = activations.layout.groups()

    def compute_loss(module: nn.Module, batch: dict, progress: float) -> StepResult:
        losses, statistics = {}, {}
        states = activations.states(batch).float()
        for name, (loss, prediction, target) in module(states, progress).items():
            losses[name] = loss
            statistics[name] = partial(chain_statistics, prediction, target, groups)
        return StepResult(sum(losses.values()), losses, statistics)

    return compute_loss
