"""Raptor blocks beside the reference's and the teacher's layers: CPU time, FLOP, memory.

All of base size (DINOv2 ViT-B/14 with registers at 224 px: 261 tokens, 768 channels, 12 layers or
applications), weights at random, k = 3. What is compared: *reference* (the block of the research
code, written out below), *exact* (its architecture in ours), *matched* (ours by default: what a
layer of the teacher costs), *teacher* (transformers' own layers).
"""

import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from .activation_benchmark import TEACHERS
from .benchmark import interleaved, median_ratio
from .configuration_raptor import RaptorConfig
from .modeling_raptor import RaptorBlock, RaptorModel
from .plan import application_flops
from .spans import ComputeArguments

PHASES = [7, 3, 2]


class ReferenceBlock(nn.Module):
    """A block as the research code has it: attention that also returns its weights, a SwiGLU of
    hidden width 4·D, and a depth MLP that is run for every sample.
    """

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size, eps=1e-6), nn.LayerNorm(size, eps=1e-6)
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)
        self.gate_and_up, self.down = nn.Linear(size, 8 * size), nn.Linear(4 * size, size)
        self.depth = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 3 * size))
        for weight in self.depth[2].parameters():
            nn.init.normal_(weight, std=1e-4)
        self.layer_scale1 = nn.Parameter(torch.full((size,), 0.1))
        self.layer_scale2 = nn.Parameter(torch.full((size,), 0.1))

    def forward(self, states: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        """States (B, N, D) one layer deeper; `depth` (B, 1) for every sample."""
        s1, s2, s3 = (self.depth(depth) + 1)[:, None].chunk(3, dim=-1)
        normed = self.norm1(states)
        mixed, _ = self.attention(normed, normed, normed)
        states = states + s1 * self.layer_scale1 * mixed
        gate, up = self.gate_and_up(self.norm2(states)).chunk(2, dim=-1)
        states = states + s2 * self.layer_scale2 * self.down(nn.functional.silu(gate) * up)
        return states * s3

    def copy_to(self, block: RaptorBlock) -> None:
        """Give a block of ours (SwiGLU, hidden 4·D) the same weights."""
        attention, depth = self.attention, block.depth_scaling
        pairs = {
            block.norm1: self.norm1, block.norm2: self.norm2, block.ffn.fc1: self.gate_and_up,
            block.ffn.fc2: self.down, block.attention.proj: attention.out_proj,
            depth.fc1: self.depth[0], depth.fc2: self.depth[2],
        }  # fmt: skip
        for ours, theirs in pairs.items():
            ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            block.attention.qkv.weight.copy_(attention.in_proj_weight)
            block.attention.qkv.bias.copy_(attention.in_proj_bias)
            block.layer_scale1.copy_(self.layer_scale1)
            block.layer_scale2.copy_(self.layer_scale2)


class ReferenceChain(nn.Module):
    """Three reference blocks, each applied as often as its phase is long."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(ReferenceBlock(size, heads) for _ in PHASES)

    def forward(self, states: torch.Tensor) -> list[torch.Tensor]:
        """The states (B, N, D) after every layer."""
        trajectory, depth = [], 0
        for block, length in zip(self.blocks, PHASES, strict=True):
            for _ in range(length):
                depth += 1
                states = block(states, torch.full((len(states), 1), float(depth)))
                trajectory.append(states)
        return trajectory


class Candidates:
    """The models that are compared, of one size, with what they start from."""

    def __init__(self, size: str):
        torch.manual_seed(0)
        shape = TEACHERS[size]
        config = Dinov2WithRegistersConfig(**shape, num_register_tokens=4, num_hidden_layers=12)
        self.teacher = Dinov2WithRegistersModel(config).eval()
        self.reference = ReferenceChain(config.hidden_size, config.num_attention_heads).eval()
        self.exact = self.raptor(config, ffn="swiglu", intermediate_size=4 * config.hidden_size)
        for ours, theirs in zip(self.exact.blocks, self.reference.blocks, strict=True):
            theirs.copy_to(ours)
        self.matched = self.raptor(config)
        self.num_tokens = 5 + (shape["image_size"] // shape["patch_size"]) ** 2
        self.width = config.hidden_size

    @staticmethod
    def raptor(config: Dinov2WithRegistersConfig, **options) -> RaptorModel:
        """A Raptor with random blocks."""
        return RaptorModel(RaptorConfig(teacher_config=config, phases=PHASES, **options)).eval()

    def states(self, batch: int) -> torch.Tensor:
        """States (B, N, D) after the embeddings."""
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, self.num_tokens, self.width, generator=generator)

    def rollouts(self) -> dict[str, Callable]:
        """How each of them goes from the embeddings to the last layer: a list of states."""
        return {
            "reference": self.reference,
            "exact": partial(roll, self.exact),
            "matched": partial(roll, self.matched),
            "teacher": partial(teacher_layers, self.teacher),
        }

    def flops(self) -> dict[str, float]:
        """FLOP of an image, as multiples of the teacher's."""
        teacher = application_flops(self.matched.config, self.num_tokens)
        exact = application_flops(self.exact.config, self.num_tokens) / teacher
        return {"reference": exact, "exact": exact, "matched": 1.0, "teacher": 1.0}


def roll(model: RaptorModel, states: torch.Tensor) -> list[torch.Tensor]:
    """The states (B, N, D) after every application."""
    trajectory = []
    for depth in range(1, model.config.num_hidden_layers + 1):
        states = model.advance(states, depth)
        trajectory.append(states)
    return trajectory


def teacher_layers(model: Dinov2WithRegistersModel, states: torch.Tensor) -> list[torch.Tensor]:
    """The states (B, N, D) after every layer."""
    trajectory = []
    for layer in model.encoder.layer:
        states = layer(states)
        trajectory.append(states)
    return trajectory


def compare(candidates: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Speed beside the reference: how many times longer it takes (CPU time of all threads)."""
    candidates = {**candidates, "reference again": candidates["reference"]}
    calls = {name: lambda _visit, call=call: call() for name, call in candidates.items()}
    times = interleaved(calls, rounds=rounds, clock=time.process_time)
    return {name: median_ratio(times, "reference", name) for name in times if name != "reference"}


def benchmark_model(size: str, batches: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Inference, 12 applications: times longer that the reference takes, for each batch size."""
    candidates = Candidates(size)
    result = {"FLOP, times the teacher's": candidates.flops()}
    for batch in batches:
        states = candidates.states(batch)
        with torch.no_grad():
            calls = {n: partial(r, states) for n, r in candidates.rollouts().items()}
            result[f"inference, batch {batch}"] = compare(calls, rounds)
    return result


def benchmark_train_step(size: str, batches: list[int], rounds: int) -> dict[str, dict]:
    """A rollout with its loss, backward pass, clipping and AdamW, and what it keeps in memory."""
    candidates, result = Candidates(size), {}
    checkpointed = copy.deepcopy(candidates.matched)
    ComputeArguments(gradient_checkpointing=True).set_up(checkpointed)
    modules = {
        "reference": candidates.reference,
        "exact": candidates.exact,
        "matched": candidates.matched,
        "matched, checkpointed": checkpointed,
    }
    for batch in batches:
        states = candidates.states(batch)
        target = torch.stack(teacher_layers(candidates.teacher, states)).detach()
        steps, kept = {}, {}
        for name, module in modules.items():
            rollout = module if name == "reference" else partial(roll, module)
            weights = list(module.train().blocks.parameters())
            optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=name != "reference")
            steps[name] = partial(step, rollout, states, target, weights, optimizer)
            kept[name] = kept_bytes(partial(loss_of, rollout, states, target)) / batch
        shares = {name: amount / kept["reference"] for name, amount in kept.items()}
        shares["reference, MB an image"] = kept["reference"] / 1e6
        result[f"training step, batch {batch}"] = compare(steps, rounds)
        result[f"kept for the backward pass, batch {batch}"] = shares
    return result


def loss_of(rollout: Callable, states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over all layers."""
    return nn.functional.mse_loss(torch.stack(rollout(states)), target)


def step(
    rollout: Callable,
    states: torch.Tensor,
    target: torch.Tensor,
    weights: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """One optimiser update."""
    loss_of(rollout, states, target).backward()
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def kept_bytes(work: Callable[[], torch.Tensor]) -> int:
    """Bytes of all different tensors that autograd keeps for the backward pass, but the weights."""
    kept: dict[tuple[int, int], int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not is_view_of_weight(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    del result
    return sum(kept.values())


def is_view_of_weight(tensor: torch.Tensor) -> bool:
    """A transposed weight and its like."""
    return isinstance(tensor._base, nn.Parameter)
