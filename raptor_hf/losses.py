"""The one equation of training: a rollout that is reset to the teacher's states at some layers.

Given a teacher's trajectory a₀ … a_L and a set R of reset layers that contains the first,

    â_ℓ = B(a_{ℓ-1} if ℓ-1 ∈ R else â_{ℓ-1}, depth ℓ)
    loss(R) = mean over ℓ of token_loss(â_ℓ, a_ℓ)

R = every layer is teacher forcing, R = the start of every span is block pre-training, and R = {0}
is the whole model end to end (arXiv 2512.19941, §4 and Fig. 10).
"""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from .configuration_raptor import RaptorConfig
from .modeling_raptor import RaptorModel

# weights of the token groups (reference code): in blocks that end at the last layer, in stage 2
LAST_BLOCK_WEIGHTS = {"cls": 0.34, "registers": 0.33, "patches": 0.33}
DISTILL_WEIGHTS = {"cls": 0.45, "registers": 0.10, "patches": 0.45}


class Span(NamedTuple):
    """A block that takes the state after layer `start` to the state after layer `stop`."""

    block: nn.Module
    start: int
    stop: int


def make_span(
    teacher: PreTrainedModel, start: int, stop: int, *, attn_implementation: str = "sdpa", **options
) -> Span:
    """A new block for a span of a teacher's layers.

    Args:
        options: `init` and the architecture, as in `RaptorModel.from_teacher`.

    Raises:
        ValueError: not 0 ≤ start < stop ≤ L, or options that don't fit the teacher.
    """
    num_layers = teacher.config.num_hidden_layers
    if not 0 <= start < stop <= num_layers:
        raise ValueError(f"A span needs 0 ≤ start < stop ≤ {num_layers}; got {start}-{stop}.")
    phases = [length for length in (start, stop - start, num_layers - stop) if length]
    model = RaptorModel.from_teacher(teacher, phases, **options)
    model.set_attn_implementation(attn_implementation)
    return Span(model.blocks[1 if start else 0], start, stop)


def raptor_from_blocks(
    teacher: PreTrainedModel, phases: list[int], folder: str | Path
) -> RaptorModel:
    """A Raptor whose blocks were trained in stage 1.

    Args:
        folder: of `pretrain_blocks.py`: `blocks.safetensors` and the architecture, `config.json`.

    Raises:
        ValueError: no block for one of the phases (those that there are are named).
    """
    config = RaptorConfig.from_pretrained(folder)
    architecture = ("ffn", "intermediate_size", "depth_scaling", "block_norm_eps")
    options = {name: getattr(config, name) for name in architecture}
    model = RaptorModel.from_teacher(teacher, phases, **options)
    weights = load_file(Path(folder) / "blocks.safetensors")
    for block, (start, stop) in zip(model.blocks, model.config.spans(), strict=True):
        prefix = f"{start}-{stop}."
        state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if not state:
            there = sorted({name.split(".")[0] for name in weights})
            raise ValueError(
                f"{folder} has no block for the span {start}-{stop}, only for {there}."
            )
        block.load_state_dict(state)
    return model


def rollout(
    spans: list[Span], trajectory: torch.Tensor, *, resets: Collection[int]
) -> torch.Tensor:
    """Predict the states after the layers start + 1 … stop of consecutive spans.

    Args:
        spans: spans that follow each other; `trajectory` begins at layer 0.
        trajectory: (B, L + 1, N, D), the teacher's states.
        resets: layers whose *teacher* state is fed to the block that makes the next one.

    Returns:
        (B, S, N, D), S the number of layers that the spans cover.

    Raises:
        ValueError: the first layer of the first span is not a reset, or the spans leave a gap.
    """
    if spans[0].start not in resets:
        raise ValueError(
            f"The resets must contain the first layer, {spans[0].start}; got {resets}."
        )
    predictions, state, reached = [], None, spans[0].start
    for block, start, stop in spans:
        if start != reached:
            raise ValueError(
                f"Spans must follow each other: one stops at {reached}, the next starts at {start}."
            )
        reached = stop
        if all(layer in resets for layer in range(start, stop)):
            # teacher forcing: the layers of a span are independent, one batched call makes all
            depths = torch.arange(start + 1, stop + 1, device=trajectory.device)
            predictions.append(block(trajectory[:, start:stop], depths))
            state = predictions[-1][:, -1]
            continue
        for depth in range(start + 1, stop + 1):
            if depth - 1 in resets:
                state = trajectory[:, depth - 1]
            state = block(state, depth)
            predictions.append(state[:, None])
    return torch.cat(predictions, dim=1)


def token_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    groups: dict[str, slice],
    weights: dict[str, float] | None = None,
) -> torch.Tensor:
    """Mean squared error of states (…, N, D), a scalar.

    Args:
        groups: token groups of the states (`TokenLayout.groups`).
        weights: weight of each group's own mean; groups that the model does not have are left out
            and the rest is scaled to the same sum. None takes the plain mean over all tokens.
    """
    squared_error = (prediction - target).square()
    if weights is None:
        return squared_error.mean()
    scale = sum(weights.values()) / sum(weights[name] for name in groups)
    return scale * sum(
        weights[name] * squared_error[..., groups[name], :].mean() for name in groups
    )


def teacher_forcing_weight(progress: float, fraction: float = 0.25) -> float:
    """λ of stage 1: falls linearly from 1 to 0 over the first `fraction` of the steps."""
    return max(0.0, 1 - progress / fraction) if fraction > 0 else 0.0


class BlockPretraining(nn.Module):
    """Stage 1: any number of spans, each with a block of its own that never sees the others.

    Calling it gives λ·loss(every layer) + (1 − λ)·loss(span start), one per span.
    """

    def __init__(self, spans: list[Span], groups: dict[str, slice], num_layers: int):
        super().__init__()
        self.blocks = nn.ModuleDict({f"{span.start}-{span.stop}": span.block for span in spans})
        self.spans, self.groups, self.num_layers = spans, groups, num_layers

    def forward(self, trajectory: torch.Tensor, forcing: float) -> dict[str, torch.Tensor]:
        """(B, L + 1, N, D) and λ to a loss per span."""
        return {
            f"{span.start}-{span.stop}": self.span_loss(span, trajectory, forcing)
            for span in self.spans
        }

    def span_loss(self, span: Span, trajectory: torch.Tensor, forcing: float) -> torch.Tensor:
        """The mixed loss of one span, a scalar."""
        weights = LAST_BLOCK_WEIGHTS if span.stop == self.num_layers else None
        target = trajectory[:, span.start + 1 : span.stop + 1]
        loss = 0.0
        for weight, resets in (
            (forcing, range(span.start, span.stop)),
            (1 - forcing, {span.start}),
        ):
            if weight > 0:
                prediction = rollout([span], trajectory, resets=resets)
                loss = loss + weight * token_loss(
                    prediction, target, groups=self.groups, weights=weights
                )
        return loss


class Distillation(nn.Module):
    """Stage 2: the blocks of a Raptor in a row, end to end from the teacher's layer 0."""

    def __init__(
        self, blocks: nn.ModuleList, spans: list[tuple[int, int]], groups: dict[str, slice]
    ):
        super().__init__()
        self.blocks = blocks
        self.spans = [Span(block, *span) for block, span in zip(blocks, spans, strict=True)]
        self.groups = groups

    def forward(self, trajectory: torch.Tensor) -> torch.Tensor:
        """(B, L + 1, N, D) to the loss, a scalar."""
        prediction = rollout(self.spans, trajectory, resets={0})
        return token_loss(
            prediction, trajectory[:, 1:], groups=self.groups, weights=DISTILL_WEIGHTS
        )
