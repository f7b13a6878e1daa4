"""Matrices of few bits: blocks learn with rounded weights (quantisation-aware training).

A matrix is rounded as onnxruntime's MatMulNBits stores it without zero points: integers, and a
float16 scale for every group of 32 inputs of an output. The value of largest magnitude in a group
becomes −2^(bits − 1). So rounded weights round to themselves, and exporters find their integers
again; they need no second rounding. Biases, norms, scales and embeddings are left alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

GROUP = 32


def round_weight(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix (outputs, inputs) in groups of 32 inputs.

    Args:
        bits: 2 to 8.

    Returns:
        Integers (outputs, groups, 32), int8, in −2^(bits − 1) … 2^(bits − 1) − 1, and scales
        (outputs, groups), float16, of either sign; `unpack_weight` multiplies them. MatMulNBits
        packs the integers plus 2^(bits − 1).

    Raises:
        ValueError: the number of inputs is no multiple of 32.
    """
    if weight.shape[1] % GROUP:
        raise ValueError(
            f"Weights are rounded in groups of {GROUP} inputs; a layer has {weight.shape[1]}. "
            "Take another --intermediate_size, or leave out --quantize."
        )
    # the value of largest magnitude, with its sign, sets the scale
    half, groups = 2 ** (bits - 1), weight.detach().float().unflatten(1, (-1, GROUP))
    extremes = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales = (extremes / -half).half()

    # it keeps its integer where float16 can hardly hold the scale; a scale of 0 divides zeros
    integers = (groups / scales.float()).nan_to_num().round().clamp(-half, half - 1)
    integers = torch.where(groups == extremes, -half, integers)
    return integers.to(torch.int8), scales.squeeze(2)


def unpack_weight(integers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the matrix (outputs, inputs) of integers and scales, float32 and exact."""
    return (integers.float() * scales.float()[..., None]).flatten(1)


class RoundedLinear(nn.Linear):
    """A linear layer that computes with its rounded weight; gradients pass straight through.

    Without `rounding` it is a plain linear layer.
    """

    bits: int
    rounding: bool
    rounded: torch.Tensor | None  # the rounded weight, where it is at hand: `round_once`

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return (…, in) to (…, out)."""
        if not self.rounding:
            return super().forward(inputs)
        weight = self.round() if self.rounded is None else self.rounded
        return nn.functional.linear(inputs, weight, self.bias)

    def round(self) -> torch.Tensor:
        """Return the rounded weight."""
        rounded = unpack_weight(*round_weight(self.weight, self.bits))
        # plus an exact zero that carries the gradient (arXiv 1308.3432)
        return rounded + (self.weight - self.weight.detach())


@contextmanager
def round_once(layers: list[RoundedLinear], rounding: bool) -> Iterator[None]:
    """Let layers compute with rounded weights or not, rounded once for all applications within."""
    for layer in layers:
        layer.rounding = rounding
        layer.rounded = layer.round() if rounding else None
    yield
    for layer in layers:
        layer.rounded = None


def round_products(blocks: nn.Module, bits: int) -> list[RoundedLinear]:
    """Let the linear layers of blocks compute with weights of so many bits, in place; return them.

    Raises:
        ValueError: as `round_weight`.
    """
    layers = [layer for layer in blocks.modules() if type(layer) is nn.Linear]
    for layer in layers:
        round_weight(layer.weight, bits)
        layer.__class__, layer.bits, layer.rounding = RoundedLinear, bits, True
        layer.rounded = None
    return layers


@torch.no_grad()
def keep_rounded(blocks: nn.Module) -> None:
    """Write the rounded weights of trained blocks into plain linear layers, in place."""
    for layer in blocks.modules():
        if isinstance(layer, RoundedLinear):
            layer.weight.copy_(unpack_weight(*round_weight(layer.weight, layer.bits)))
            layer.__class__ = nn.Linear
