"""Matrices of few bits: rounded to keep their products (GPTQ), then learning on while rounded.

A matrix is rounded as onnxruntime's MatMulNBits stores it without zero points: integers, and a
float16 scale for every group of 32 inputs of an output. The value of largest magnitude in a group
becomes −2^(bits − 1). So rounded weights round to themselves, and exporters find their integers
again; they need no second rounding. Biases, norms, scales and embeddings are left alone.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

GROUP = 32
_DAMPING = 0.01  # of the mean of the diagonal, as in GPTQ


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


def product_layers(module: nn.Module) -> list[nn.Linear]:
    """Return the layers whose matrices are rounded."""
    return [layer for layer in module.modules() if type(layer) is nn.Linear]


@contextmanager
def record_inputs(layers: Iterable[nn.Linear]) -> Iterator[dict[nn.Linear, torch.Tensor]]:
    """Yield what linear layers get within: by layer xᵀx (in, in), the sum over all inputs x."""
    squares, handles = {}, []

    def add(layer: nn.Linear, inputs: tuple[torch.Tensor]) -> None:
        rows = inputs[0].flatten(0, -2).float()
        squares[layer] += rows.mT @ rows

    for layer in layers:
        squares[layer] = layer.weight.new_zeros(layer.in_features, layer.in_features)
        handles.append(layer.register_forward_pre_hook(add))
    yield squares
    for handle in handles:
        handle.remove()


@torch.no_grad()
def gptq(weight: torch.Tensor, squares: torch.Tensor, bits: int) -> torch.Tensor:
    """Round a matrix (outputs, inputs) so that its outputs change little (arXiv 2210.17323).

    Columns are rounded one by one, those with the largest inputs first, and those to come make up
    for the error. A group has the scale of `round_weight`.

    Args:
        squares: xᵀx (inputs, inputs) of inputs x, see `record_inputs`.

    Returns:
        A matrix that `round_weight` leaves as it is.

    Raises:
        ValueError: as `round_weight`.
    """
    # of every value: its scale, and whether it sets the scale and so keeps its integer
    scales = round_weight(weight, bits)[1].float().repeat_interleave(GROUP, dim=1)
    groups = weight.detach().float().unflatten(1, (-1, GROUP))
    largest = groups.abs().argmax(dim=2, keepdim=True)
    fixed = torch.zeros_like(groups, dtype=torch.bool).scatter(2, largest, True).flatten(1)

    # how columns make up for each other: the upper U of (xᵀx + damping)⁻¹ = UᵀU
    order = squares.diagonal().argsort(descending=True)
    identity = torch.eye(len(order), device=order.device)
    damping = _DAMPING * squares.diagonal().mean().clamp(min=1e-12)
    damped = squares[order][:, order] + damping * identity
    root = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    factor = torch.linalg.solve_triangular(root, identity, upper=True)

    # errors move on within some columns first, then to all behind them
    left, half = groups.flatten(1)[:, order], 2 ** (bits - 1)
    scales, fixed = scales[:, order], fixed[:, order]
    for start in range(0, len(order), GROUP):
        stop = start + GROUP
        errors = left.new_empty(len(left), GROUP)
        for i in range(start, stop):
            integers = (left[:, i] / scales[:, i]).nan_to_num().round().clamp(-half, half - 1)
            rounded = torch.where(fixed[:, i], -half, integers) * scales[:, i]
            errors[:, i - start] = (left[:, i] - rounded) / factor[i, i]
            left[:, i] = rounded
            left[:, i + 1 : stop] -= torch.outer(errors[:, i - start], factor[i, i + 1 : stop])
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return left[:, order.argsort()]


class RoundedLinear(nn.Linear):
    """A linear layer that computes with its rounded weight; gradients pass straight through."""

    bits: int
    rounded: torch.Tensor | None  # the rounded weight, where it is at hand: `round_once`

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return (…, in) to (…, out)."""
        weight = self.round() if self.rounded is None else self.rounded
        return nn.functional.linear(inputs, weight, self.bias)

    def round(self) -> torch.Tensor:
        """Return the rounded weight."""
        rounded = unpack_weight(*round_weight(self.weight, self.bits))
        # plus an exact zero that carries the gradient (arXiv 1308.3432)
        return rounded + (self.weight - self.weight.detach())


@contextmanager
def round_once(layers: list[RoundedLinear]) -> Iterator[None]:
    """Let layers be rounded once for all applications within."""
    for layer in layers:
        layer.rounded = layer.round()
    yield
    for layer in layers:
        layer.rounded = None


def round_products(blocks: nn.Module, bits: int) -> list[RoundedLinear]:
    """Let the linear layers of blocks compute with weights of so many bits, in place; return them.

    Raises:
        ValueError: as `round_weight`.
    """
    layers = product_layers(blocks)
    for layer in layers:
        round_weight(layer.weight, bits)
        layer.__class__, layer.bits, layer.rounded = RoundedLinear, bits, None
    return layers


@torch.no_grad()
def keep_rounded(blocks: nn.Module) -> None:
    """Write the rounded weights of trained blocks into plain linear layers, in place."""
    for layer in blocks.modules():
        if isinstance(layer, RoundedLinear):
            layer.weight.copy_(unpack_weight(*round_weight(layer.weight, layer.bits)))
            layer.__class__ = nn.Linear
