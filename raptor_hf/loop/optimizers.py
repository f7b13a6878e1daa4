"""AdamW and Muon."""

import math
from collections import defaultdict

import torch
from torch import nn

from .arguments import LoopArguments

# Muon's learning rate is that of matrices; biases, norms and scales learn by AdamW, at this share
# of it. On the digits teacher (k = 3, batch 16, 400 steps) R² was 0.982 with an eighth, and 0.980
# with the whole.
_VECTOR_RATE = 1 / 8
_MOMENTUM = 0.9
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic that brings singular values near 1
_NEWTON_SCHULZ_STEPS = 5


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that need gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def layer_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return the matrices of attention and FFN in the blocks or layers of a module.

    Heads, embeddings and depth scaling (no `nn.Linear`) are left to AdamW.

    Raises:
        ValueError: a module without any.
    """
    kinds = getattr(module, "_no_split_modules", None) or []
    matrices = []
    for block in module.modules():
        for layer in block.modules() if type(block).__name__ in kinds else ():
            if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                matrices.append(layer.weight)
    if not matrices:
        raise ValueError("--optimizer muon is for blocks and layers; here are none that learn.")
    return matrices


class Muon(torch.optim.Optimizer):
    """Muon: updates of matrices whose singular values are all made alike.

    A few steps of Newton and Schulz make the (Nesterov) momentum nearly orthogonal
    (kellerjordan.github.io/posts/muon); the update is scaled to the size of AdamW's (arXiv
    2502.16982). It differs from `torch.optim.Muon` in three ways. The products are float32 if they
    are asked for so: in bfloat16 an update took as long as 1.2 to 12 whole training steps on CPUs
    without units for it (docs/performance.md). Matrices of one shape go through the products
    together. And a step with `found_inf`, a scalar on the device, at 1 changes no weight, as with
    fused AdamW.

    Args:
        params: matrices, or groups of them with their `lr`.
        lr: learning rate of groups that have none.
        weight_decay: the share of a weight that a step takes away, times the learning rate.
        products: dtype of the products.
    """

    def __init__(
        self, params, lr: float = 1e-3, weight_decay: float = 0.0, *, products: torch.dtype
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.products = products

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update all matrices that have gradients."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group["lr"], group["weight_decay"])

    def _update(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Update matrices of one shape."""
        # a gradient that is not finite counts as zero, at a learning rate of zero
        device, shape = matrices[0].device, matrices[0].shape
        skip = getattr(self, "found_inf", torch.zeros((), device=device)).bool()
        gradients = [torch.where(skip, 0.0, matrix.grad) for matrix in matrices]
        lr = torch.where(skip, 0.0, lr)

        # Nesterov's momentum
        for matrix in matrices:
            self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - _MOMENTUM)
        momentum = torch.stack(torch._foreach_lerp(gradients, buffers, _MOMENTUM))

        # the update, in the size of AdamW's
        updates = _orthogonalize(momentum.to(self.products)).to(momentum.dtype)
        updates = updates * (lr * 0.2 * math.sqrt(max(shape)))
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_sub_(matrices, list(updates.unbind()))


def _orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices (number, rows, columns) with all singular values near 1."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        squares = wide @ wide.mT
        polynomial = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    return wide.mT if tall else wide


def make_optimizers(
    module: nn.Module,
    groups: list[dict],
    arguments: LoopArguments,
    products: torch.dtype,
) -> list[torch.optim.Optimizer]:
    """Return AdamW (fused: several times faster), after Muon if the arguments ask for it.

    Args:
        groups: `params`, and `lr` if it is not `arguments.learning_rate`.
        products: dtype of Muon's products.

    Raises:
        ValueError: Muon for a module without matrices for it.
    """
    options = {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay}
    if arguments.optimizer == "adamw":
        return [torch.optim.AdamW(groups, fused=True, **options)]

    # every group is split: Muon takes its matrices, AdamW the rest
    for_muon = set(map(id, layer_matrices(module)))
    muon_groups, adamw_groups = [], []
    for group in groups:
        rate, split = group.get("lr", arguments.learning_rate), {True: [], False: []}
        for parameter in group["params"]:
            split[id(parameter) in for_muon].append(parameter)
        muon_groups.append({"params": split[True], "lr": rate})
        adamw_groups.append({"params": split[False], "lr": _VECTOR_RATE * rate})
    adamw = torch.optim.AdamW(adamw_groups, fused=True, **options)
    return [Muon(muon_groups, products=products, **options), adamw]
