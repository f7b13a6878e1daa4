"""AdamW, Muon, the learning-rate schedule and gradient clipping."""

import math
from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

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
        if type(block).__name__ in kinds:
            layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
            matrices += [layer.weight for layer in layers if layer.weight.requires_grad]
    if not matrices:
        raise ValueError("--optimizer muon is for blocks and layers; here are none that learn.")
    return matrices


class Muon(torch.optim.Optimizer):
    """Muon: updates of matrices whose singular values are all made alike.

    A few steps of Newton and Schulz make the (Nesterov) momentum nearly orthogonal
    (kellerjordan.github.io/posts/muon); the update is scaled to the size of AdamW's (arXiv
    2502.16982). It differs from `torch.optim.Muon` in three ways. On a CPU the products are
    float32: in bfloat16 an update took as long as 1.2 to 12 whole training steps on CPUs without
    units for it (docs/performance.md). Matrices of one shape go through the products together. And
    a step with `found_inf`, a scalar on the device, at 1 changes no weight, as with fused AdamW.

    Args:
        params: matrices, or groups of them with their `lr`.
        lr: learning rate of groups that have none.
        weight_decay: the share of a weight that a step takes away, times the learning rate.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

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
        products = torch.float32 if device.type == "cpu" else torch.bfloat16
        updates = _orthogonalize(momentum.to(products)).to(momentum.dtype)
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
    module: nn.Module, groups: list[dict], arguments: LoopArguments
) -> list[torch.optim.Optimizer]:
    """Return AdamW (fused: several times faster), after Muon if the arguments ask for it.

    Args:
        groups: `params`, and `lr` if it is not `arguments.learning_rate`.

    Raises:
        ValueError: Muon for a module without matrices for it.
    """
    matrices = layer_matrices(module) if arguments.optimizer == "muon" else []
    for_muon = {id(matrix) for matrix in matrices}
    vector_rate = _VECTOR_RATE if matrices else 1.0
    muon_groups, adamw_groups = [], []
    for group in groups:
        rate = group.get("lr", arguments.learning_rate)
        taken = [parameter for parameter in group["params"] if id(parameter) in for_muon]
        rest = [parameter for parameter in group["params"] if id(parameter) not in for_muon]
        muon_groups += [{"params": taken, "lr": rate}] if taken else []
        adamw_groups += [{"params": rest, "lr": vector_rate * rate}]
    adamw = torch.optim.AdamW(adamw_groups, weight_decay=arguments.weight_decay, fused=True)
    if not matrices:
        return [adamw]
    return [Muon(muon_groups, weight_decay=arguments.weight_decay), adamw]


def make_schedule(
    optimizer: torch.optim.Optimizer, arguments: LoopArguments
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return warm-up and cosine, a factor: each group keeps its share of the learning rate."""
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        arguments.warmup_steps,
        arguments.steps,
        min_lr_rate=arguments.final_learning_rate / arguments.learning_rate,
    )


def clip_gradients(
    accelerator: Accelerator, groups: list[dict], max_norm: float
) -> list[torch.Tensor]:
    """Clip the gradients of each group by their norm; return the norms."""
    accelerator.unscale_gradients()
    return [nn.utils.clip_grad_norm_(group["params"], max_norm) for group in groups]
