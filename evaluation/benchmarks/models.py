"""What the benchmarks of the model compare: blocks of the reference, ours, the teacher's layers.

All of base size (DINOv2 ViT-B/14 with registers at 224 px: 261 tokens, 768 channels, 12 layers or
applications), weights at random, k = 3. What is compared: *reference* (the block of the research
code, written out below), *exact* (its architecture in ours), *matched* (ours by default: what a
layer of the teacher costs), *teacher* (transformers' own layers).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.configuration_raptor import RaptorConfig
from raptor_hf.distillation.compute import application_flops
from raptor_hf.modeling_raptor import RaptorBlock, RaptorModel

from .settings import TEACHERS

PHASES = [7, 3, 2]
RAPTORS = ("reference", "exact", "matched")


class _ReferenceBlock(nn.Module):
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
        """Return states (B, N, D) one layer deeper; `depth` (B, 1) for every sample."""
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


class _ReferenceChain(nn.Module):
    """Three reference blocks, each applied as often as its phase is long."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(_ReferenceBlock(size, heads) for _ in PHASES)

    def forward(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Return the states (B, N, D) after every layer."""
        trajectory, depth = [], 0
        for block, length in zip(self.blocks, PHASES, strict=True):
            for _ in range(length):
                depth += 1
                states = block(states, states.new_full((len(states), 1), float(depth)))
                trajectory.append(states)
        return trajectory


class Candidates:
    """The models that are compared, of one size, with what they start from.

    LayerScales are 0.1, as a trained model's are: at their start of 1e-5 blocks do nothing, and
    nothing could be told from the errors of fewer bits.
    """

    def __init__(self, size: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        shape = {**TEACHERS[size], "layerscale_value": 0.1}
        config = Dinov2WithRegistersConfig(**shape, num_register_tokens=4, num_hidden_layers=12)
        self.num_tokens = 5 + (shape["image_size"] // shape["patch_size"]) ** 2
        self.width, self.device, self.dtype = config.hidden_size, device, dtype
        self.teacher = self.place(Dinov2WithRegistersModel(config))
        self.reference = self.place(_ReferenceChain(config.hidden_size, config.num_attention_heads))
        exact = {"ffn": "swiglu", "intermediate_size": 4 * config.hidden_size}
        self.exact, self.matched = self.raptor(config, **exact), self.raptor(config)
        for ours, theirs in zip(self.exact.blocks, self.reference.blocks, strict=True):
            theirs.copy_to(ours)

    def place(self, model: nn.Module) -> nn.Module:
        """Return where and in what it computes."""
        return model.to(self.device, self.dtype).eval()

    def raptor(self, config: Dinov2WithRegistersConfig, **options) -> RaptorModel:
        """Return a Raptor with random blocks."""
        options = {"teacher_config": config, "phases": PHASES, "layerscale_value": 0.1, **options}
        return self.place(RaptorModel(RaptorConfig(**options)))

    def states(self, batch: int) -> torch.Tensor:
        """Return states (B, N, D) after the embeddings."""
        generator = torch.Generator().manual_seed(batch)
        states = torch.randn(batch, self.num_tokens, self.width, generator=generator)
        return states.to(self.device, self.dtype)

    def layers(self) -> dict[str, list[nn.Module]]:
        """Return what of each of them is applied: blocks or layers."""
        models = {name: list(getattr(self, name).blocks) for name in RAPTORS}
        return {**models, "teacher": list(self.teacher.encoder.layer)}

    def rollouts(self) -> dict[str, Callable]:
        """Return how each of them goes from the embeddings to the last layer: a list of states."""
        return {
            "reference": self.reference,
            "exact": partial(rollout_states, self.exact),
            "matched": partial(rollout_states, self.matched),
            "teacher": partial(_teacher_layers, self.teacher),
        }

    def flops(self) -> dict[str, int]:
        """Return FLOP of an image."""
        one = {name: getattr(self, name).config for name in ("exact", "matched")}
        flops = {n: 12 * application_flops(config, self.num_tokens) for n, config in one.items()}
        return {"reference": flops["exact"], **flops, "teacher": flops["matched"]}

    def weight_bytes(self) -> dict[str, int]:
        """Return bytes of the weights of all blocks or layers."""
        return {
            name: sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
            for name, parts in self.layers().items()
        }


def rollout_states(model: RaptorModel, states: torch.Tensor) -> list[torch.Tensor]:
    """Return the states (B, N, D) after every application."""
    trajectory = []
    for depth in range(1, model.config.num_hidden_layers + 1):
        states = model.advance(states, depth)
        trajectory.append(states)
    return trajectory


def _teacher_layers(model: Dinov2WithRegistersModel, states: torch.Tensor) -> list[torch.Tensor]:
    """Return the states (B, N, D) after every layer."""
    trajectory = []
    for layer in model.encoder.layer:
        states = layer(states)
        trajectory.append(states)
    return trajectory
