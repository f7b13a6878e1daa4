"""The module that both stages train: chains of blocks that follow a teacher."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..activations.online import Activations
from ..loop.scalars import StepResult
from ..metrics import state_statistics
from ..runs.processes import compiled
from .arguments import ObjectiveArguments
from .blocks import Chain, covered_layers
from .objective import token_loss
from .rollout import rollout


class _ChainOutput(NamedTuple):
    """How a chain of S layers follows a trajectory.

    Args:
        loss: a scalar.
        prediction: (B, S, N, D), rolled out if the loss counts that, else teacher-forced; without
            gradients.
        target: (B, S + 1, N, D), the teacher's states, with the one that it starts from.
    """

    loss: torch.Tensor
    prediction: torch.Tensor
    target: torch.Tensor

    def statistics(self, groups: dict[str, slice]) -> dict[str, list]:
        """Return rows for `RSquared`."""
        whole = torch.cat([self.target[:, :1], self.prediction], dim=1)
        return state_statistics(prediction=whole, target=self.target, groups=groups)


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
    ):
        super().__init__()
        self._no_split_modules = ["RaptorBlock"]  # compiled one by one; Muon takes their matrices
        self.chains, self.arguments, self.groups = chains, arguments, groups
        self.angles, self.token_loss = angles, compiled(token_loss)
        self.layers = covered_layers(chains)
        self.blocks = nn.ModuleDict(
            {span.name: span.block for chain in chains for span in chain.spans}
        )
        rows = None if arguments.normalize == "none" else self._variances(variances)
        self.register_buffer("variances", rows)

    def _variances(self, variances: dict[str, list[float]]) -> torch.Tensor:
        """Return the variances that the loss is divided by, (groups, layers)."""
        rows = []
        for name in self.groups:
            row = variances[name if self.arguments.normalize == "group" else "all"]
            for layer, variance in zip(self.layers[1:], row[1:], strict=True):
                if not variance > 0:
                    raise ValueError(
                        f"The state of {name} after layer {layer} is the same in all images: its "
                        f"variance is {variance}, and normalize={self.arguments.normalize!r} would "
                        "divide by it. Choose another --normalize."
                    )
            rows.append(row)
        return torch.tensor(rows)

    def forward(self, trajectory: torch.Tensor, progress: float) -> dict[str, _ChainOutput]:
        """Return, for every chain, how it follows the states of `layers` (B, layers, N, D)."""
        forcing = self.arguments.forcing(progress)
        outputs = {}
        for chain in self.chains:
            starts = {span.start for span in chain.spans}
            if not self.arguments.by_phases(progress):
                starts = {min(starts)}
            part = self.part(chain, trajectory)
            outputs[chain.name] = self.follow(chain, part, forcing, starts)
        return outputs

    def part(self, chain: Chain, trajectory: torch.Tensor) -> torch.Tensor:
        """Return the states (B, S + 1, N, D) of the layers of a chain; variances likewise."""
        first = self.layers.start
        return trajectory[:, chain.spans[0].start - first : chain.spans[-1].stop - first + 1]

    def follow(
        self,
        chain: Chain,
        trajectory: torch.Tensor,
        forcing: float,
        starts: set[int],
    ) -> _ChainOutput:
        """Return the mixed loss of one chain, with its prediction.

        Args:
            forcing: weight of teacher forcing; rollouts have the rest.
            starts: layers whose teacher's state rollouts start from.
        """
        start, stop = chain.spans[0].start, chain.spans[-1].stop
        options = self.arguments
        layers = slice(-1, None) if options.layers_learned == "last" else slice(None)
        variances = None
        if self.variances is not None:
            variances = self.part(chain, self.variances)[:, 1:][:, layers]

        # teacher forcing is a rollout that is reset at every layer
        total = 0.0
        for weight, resets in ((forcing, range(start, stop)), (1 - forcing, starts)):
            if weight == 0:
                continue
            prediction = rollout(
                chain.spans,
                trajectory,
                resets=resets,
                noise_std=options.noise_std,
                angles=self.angles,
            )
            total = total + weight * self.token_loss(
                prediction[:, layers],
                trajectory[:, 1:][:, layers],
                groups=self.groups,
                weights=chain.weights,
                loss=options.loss,
                variances=variances,
            )
        return _ChainOutput(total, prediction.detach(), trajectory)

    def kind(self, progress: float) -> tuple | None:
        """Return the properties of a step beside its batch, as `fit` takes them."""
        if self.arguments.noise_std:
            return None
        return self.arguments.forcing(progress), self.arguments.by_phases(progress)

    @torch.no_grad()
    def explain(self, trajectory: torch.Tensor) -> str | None:
        """Return what is not finite in the learned states or in what the blocks make of them."""
        for layer, states in zip(self.layers, trajectory.unbind(1), strict=True):
            if not torch.isfinite(states).all():
                return f"the teacher's state after layer {layer} is not finite"
        for chain in self.chains:
            start = chain.spans[0].start
            part = self.part(chain, trajectory)
            prediction = rollout(chain.spans, part, resets={start}, angles=self.angles)
            for layer, states in enumerate(prediction.unbind(1), start=start + 1):
                if not torch.isfinite(states).all():
                    return f"the rollout of {chain.name} is not finite from layer {layer} on"
        return None


def matching_loss(activations: Activations) -> Callable:
    """Return `compute_loss` of `fit` for a `TrajectoryMatching` and the source of its batches."""
    groups = activations.layout.groups()

    def compute_loss(module: nn.Module, batch: dict, progress: float) -> StepResult:
        states = activations.states(batch).float()
        losses, statistics = {}, {}
        for name, output in module(states, progress).items():
            losses[name] = output.loss
            # the log's R², without the graph of the loss
            statistics[name] = partial(output._replace(loss=None).statistics, groups)
        return StepResult(
            sum(losses.values()), losses, statistics, explain=lambda: module.explain(states)
        )

    return compute_loss
