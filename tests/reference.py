"""The reference code's modules, and files as it writes them."""

import sys
import types

import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel


def make_teacher(width=32, heads=4, layers=12):
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers,
        image_size=8, patch_size=4,
    )  # fmt: skip
    return Dinov2WithRegistersModel(config).eval()


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return self.gamma * x


class SwiGLU(nn.Module):
    def forward(self, x):
        gate, up = x.tensor_split(2, dim=-1)
        return up * gate * torch.sigmoid(gate)


class Block(nn.Module):
    def __init__(self, width, heads, hidden, swiglu, t_scale, layer_scale=True):
        super().__init__()
        self.t_scale = t_scale
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()
        inner = [nn.Linear(width, 2 * hidden), SwiGLU()] if swiglu else None
        inner = inner or [nn.Linear(width, hidden), nn.GELU()]
        self.mlp = nn.Sequential(*inner, nn.Linear(hidden, width))
        if t_scale:
            self.t_proj = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 3 * width))

    def forward(self, x, depth):
        attention, ffn, output = 1, 1, 1
        if self.t_scale:
            factors = self.t_proj(torch.tensor([[float(depth)]])) + 1
            attention, ffn, output = factors.split(x.shape[-1], dim=-1)
        y = self.norm1(x)
        x = x + attention * self.ls1(self.attn(y, y, y, need_weights=False)[0])
        return output * (x + ffn * self.ls2(self.mlp(self.norm2(x))))


class Raptor(nn.Module):
    def __init__(self, blocks, thresholds):
        super().__init__()
        self.blocks, self.thresholds = nn.ModuleList(blocks), thresholds

    def trajectory(self, x, layers):
        states = [x]
        for depth in range(1, layers + 1):
            block = self.blocks[sum(depth > threshold for threshold in self.thresholds)]
            states.append(block(states[-1], torch.tensor([depth])))
        return torch.stack(states, dim=1).detach()


def save_as_reference(module, path, monkeypatch):
    """Pickle a module as the reference does: whole, under its own module names."""
    homes = {Raptor: "raptor", Block: "block", LayerScale: "block", SwiGLU: "block"}
    with monkeypatch.context() as patch:
        for cls, home in homes.items():
            if home not in sys.modules or not hasattr(sys.modules[home], "throw_away"):
                fake = types.ModuleType(home)
                fake.throw_away = True
                patch.setitem(sys.modules, home, fake)
            setattr(sys.modules[home], cls.__name__, cls)
            patch.setattr(cls, "__module__", home)
        torch.save(module, path)
    assert "block" not in sys.modules and "raptor" not in sys.modules
