"""Spans of layers, and their rollout with resets to the teacher."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn


class Span(NamedTuple):
    """A block that takes the state after layer `start` to the state after layer `stop`."""

    block: nn.Module
    start: int
    stop: int

    @property
    def name(self) -> str:
        """First and last layer, like `"0-7"`."""
        return f"{self.start}-{self.stop}"


class Chain(NamedTuple):
    """Consecutive spans that are rolled out together, and the token weights of their loss."""

    spans: list[Span]
    weights: dict[str, float] | None

    @property
    def layers(self) -> range:
        """The layers whose states it starts from or makes."""
        return range(self.spans[0].start, self.spans[-1].stop + 1)

    @property
    def name(self) -> str:
        """First and last layer, like `"0-7"`."""
        return f"{self.layers[0]}-{self.layers[-1]}"


def covered_layers(chains: list[Chain]) -> range:
    """Return the layers whose states some chains start from or learn."""
    first = min(chain.layers[0] for chain in chains)
    return range(first, max(chain.layers[-1] for chain in chains) + 1)


def rollout(
    spans: list[Span],
    trajectory: torch.Tensor,
    *,
    resets: Collection[int],
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Predict the states after the layers start + 1 … stop of consecutive spans.

    Args:
        spans: spans that follow each other and cover S layers.
        trajectory: (B, S + 1, N, D), the teacher's states from the first span's start on.
        resets: the first layer, and others whose *teacher* state is fed to the next application.
        angles: rotary angles of families that have them, see `rotary_angles`.

    Returns:
        (B, S, N, D), the states after every one of these layers.
    """
    first, more = spans[0].start, {}
    if angles is not None:
        more["position_embeddings"] = tuple(part.to(trajectory.device) for part in angles)
    predictions, state = [], None
    for block, start, stop in spans:
        if all(layer in resets for layer in range(start, stop)):
            # teacher forcing: the layers of a span are independent, one batched call makes all
            depths = torch.arange(start + 1, stop + 1, device=trajectory.device)
            inputs = trajectory[:, start - first : stop - first]
            predictions.append(block(inputs, depths, **more))
            state = predictions[-1][:, -1]
            continue
        for depth in range(start + 1, stop + 1):
            if depth - 1 in resets:
                state = trajectory[:, depth - 1 - first]
            state = block(state, torch.full((1,), depth, device=state.device), **more)
            predictions.append(state[:, None])
    return torch.cat(predictions, dim=1)
