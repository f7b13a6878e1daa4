"""A Raptor: a Vision Transformer made of a few blocks, each applied several times in a row.

Method: "Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941). Read downwards, this
file is the whole network; it is one long file because it travels to the Hub beside the weights.
Shapes: B images, N tokens (cls, registers, patches), D channels, L layers.
"""
# `from_teacher`, `check_against` and `forward` are over 40 lines: half of them is signature,
# docstring and what errors say; and so is `teacher_layer_weights`, a list. `RaptorBlock` and
# `RaptorModel` are over 80 lines: all that a block or a model does is told in one place.

import contextlib
import copy
import itertools
import math
import os
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    DepthEstimatorOutput,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_raptor import (
    TEACHER_FAMILIES,
    LayerParts,
    RaptorConfig,
    teacher_family,
    token_layout,
)

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CONTEXTS_KEPT = 8  # sizes of images: at 512 pixels a bias of 16 heads takes 67 MB


class LayerContext(NamedTuple):
    """What a teacher's forward hands to its layers beside the states; the same for all of them.

    Args:
        rotary: cosine and sine (N', D / heads) that query and key of the last N' tokens are rotated
            by.
        bias: what is added to the attention (1 or B, heads or 1, N, N), or a mask of booleans.
        image_size: height and width of the images in pixels, for a block's own position bias.
    """

    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    bias: torch.Tensor | None = None
    image_size: tuple[int, int] | None = None

    @classmethod
    def of_call(cls, args: tuple, kwargs: dict) -> "LayerContext":
        """Read the arguments that a layer of any family is called with, after the states."""
        rotary = kwargs.get("position_embeddings")
        bias = kwargs.get("attention_mask")
        for argument in (*args, kwargs.get("relative_position_bias")):
            if isinstance(argument, (tuple, list)) and len(argument) == 2:
                rotary = argument
            elif isinstance(argument, torch.Tensor):
                bias = argument
        return cls(None if rotary is None else tuple(rotary), bias, kwargs.get("resolution"))

    def to(self, device: torch.device) -> "LayerContext":
        """Return the same on a device."""
        rotary = self.rotary and tuple(angles.to(device) for angles in self.rotary)
        return self._replace(
            rotary=rotary, bias=None if self.bias is None else self.bias.to(device)
        )


def eager_attention(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
    """Compute plain softmax attention in the form of transformers' attention interface."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            weights = weights.masked_fill(~attention_mask, -math.inf)
        else:
            weights = weights + attention_mask
    weights = torch.softmax(weights, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the last N' tokens of (B, heads, N, d) by angles whose cosine is (N', d).

    The angles may be of a higher precision (MLCD); the result is of that of the states.
    """
    prefix = states.shape[-2] - cos.shape[-2]
    tokens = states[..., prefix:, :]
    first, second = tokens.chunk(2, dim=-1)
    tokens = (tokens * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)
    return torch.cat([states[..., :prefix, :], tokens], dim=-2) if prefix else tokens


def make_norm(config: RaptorConfig) -> nn.Module:
    """Return a norm of a block."""
    norm = nn.RMSNorm if config.block_norm == "rmsnorm" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.block_norm_eps)


class LinearChanges(NamedTuple):
    """What P depths change in the linear layers of a block; by default nothing.

    Args:
        corrections: by a layer's name its factors A (P, r, in) and B (P, out, r): B·A·x is added.
        shares: of the FFN's experts, (P, E), before the softmax; None: there is one FFN.
    """

    corrections: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    shares: torch.Tensor | None = None

    def correct(self, name: str, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs of a linear layer with its correction, if there is one."""
        if name not in self.corrections:
            return outputs
        down, up = self.corrections[name]
        return outputs + linear_by_depth(linear_by_depth(inputs, down), up)


NO_CHANGES = LinearChanges()


def linear_by_depth(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply linear layers of P depths to the states of each: (B, P, N, in) to (B, P, N, out).

    Args:
        inputs: of one depth also (B, N, in).
        weight, bias: (P, out, in) and (P, out).
    """
    if len(weight) == 1:
        return nn.functional.linear(inputs, weight[0], None if bias is None else bias[0])
    outputs = torch.einsum("bpni,poi->bpno", inputs, weight)
    return outputs if bias is None else outputs + bias[:, None]


class RaptorCorrection(nn.Module):
    """Low-rank factors for one linear layer of a block, a pair for each layer of its span.

    No `nn.Linear`: what quantises or adapts those shall leave them alone.
    """

    def __init__(self, num_layers: int, rank: int, in_features: int, out_features: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(num_layers, rank, in_features))
        self.up = nn.Parameter(torch.empty(num_layers, out_features, rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A from N(0, 1 / in), and let B be zero: a new correction adds nothing."""
        init.normal_(self.down, std=self.down.shape[-1] ** -0.5)
        init.zeros_(self.up)

    def forward(self, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (P, r, in) and B (P, out, r) of P rows."""
        return self.down[rows], self.up[rows]


class RaptorExperts(nn.Module):
    """A linear layer whose weights are mixed from those of E experts."""

    def __init__(self, config: RaptorConfig, name: str):
        super().__init__()
        self.in_features, self.out_features = config.linear_sizes()[name]
        self.std, number = config.initializer_range, config.ffn_experts
        self.weight = nn.Parameter(torch.empty(number, self.out_features, self.in_features))
        biased = config.has_bias(name)
        self.bias = nn.Parameter(torch.empty(number, self.out_features)) if biased else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every expert as a linear layer of a block."""
        init.trunc_normal_(self.weight, std=self.std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def mixed(self, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weights (P, out, in) and biases (P, out) for shares (P, E) before the softmax."""
        kind = shares.device.type
        if torch.is_autocast_enabled(kind):  # in the weights' own precision
            with torch.autocast(kind, enabled=False):
                return self.mixed(shares)
        mix = shares.softmax(dim=-1)
        weight = (mix @ self.weight.flatten(1)).view(-1, *self.weight.shape[1:])
        return weight, None if self.bias is None else mix @ self.bias

    def forward(self, inputs: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return (B, P, N, in) to (B, P, N, out), of one depth also without that axis."""
        return linear_by_depth(inputs, *self.mixed(shares))


OWN_SHARE = 0.9  # of a layer's own experts, before they learn


def expert_runs(num_layers: int, experts: int) -> torch.Tensor:
    """Return which experts are a layer's own at the start, (layers, E): those of its run of layers.

    The runs are as equal as can be; of more experts than layers several share a layer.
    """
    longer = max(num_layers, experts)
    own = [[False] * experts for _ in range(num_layers)]
    for n in range(longer):
        own[n * num_layers // longer][n * experts // longer] = True
    return torch.tensor(own)


def expert_shares(num_layers: int, experts: int) -> torch.Tensor:
    """Return shares (layers, E), before a softmax, that give a layer's own experts `OWN_SHARE`."""
    own = expert_runs(num_layers, experts)
    number = own.sum(dim=1, keepdim=True)
    others = (1 - OWN_SHARE) / (experts - number).clamp(min=1)
    return torch.where(own, OWN_SHARE / number, others).log()


class RaptorAttention(nn.Module):
    """Multi-head self-attention with one fused projection for query, key and value."""

    def __init__(self, config: RaptorConfig):
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.biased = [config.has_bias(name) for name in ("query", "key", "value")]
        self.qkv = nn.Linear(size, 3 * size, bias=all(self.biased))
        # of those that have one: a key's bias would be a weight that the teacher lacks
        some = any(self.biased) and not all(self.biased)
        self.some_bias = nn.Parameter(torch.zeros(sum(self.biased), size)) if some else None
        self.proj = nn.Linear(size, size, bias=config.has_bias("output"))
        self.q_norm = nn.RMSNorm(size, eps=1e-6) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(size, eps=1e-6) if config.qk_norm else None

    def project(
        self, hidden_states: torch.Tensor, changes: LinearChanges = NO_CHANGES
    ) -> torch.Tensor:
        """Return query, key and value, (…, N, D) to (…, N, 3·D)."""
        if self.some_bias is None:
            projected = self.qkv(hidden_states)
        else:
            rows = iter(self.some_bias)
            none = self.some_bias.new_zeros(self.some_bias.shape[1])
            bias = torch.cat([next(rows) if biased else none for biased in self.biased])
            if type(self.qkv) is nn.Linear and not self.qkv.weight.is_meta:
                projected = nn.functional.linear(hidden_states, self.qkv.weight, bias)
            else:  # offloaded or replaced, by an adapter say: what it computes it alone knows
                projected = self.qkv(hidden_states)
                projected = projected + bias.to(projected.dtype)
        projected = changes.correct("qkv", projected, hidden_states)
        if self.q_norm is None:
            return projected
        query, key, value = projected.chunk(3, dim=-1)
        return torch.cat([self.q_norm(query), self.k_norm(key), value], dim=-1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attentions: list[torch.Tensor] | None = None,
        context: LayerContext | None = None,
        changes: LinearChanges = NO_CHANGES,
    ) -> torch.Tensor:
        """Return (…, N, D) to (…, N, D); the weights (…, heads, N, N) are appended to
        `attentions`.
        """
        projected = self.project(hidden_states, changes)
        tokens, sizes = projected.shape[-2], (3, self.num_heads, self.head_dim)
        # (3, batch, heads, tokens, D / heads): leading axes are made one
        stacked = projected.view(-1, tokens, *sizes).permute(2, 0, 3, 1, 4)
        query, key, value = stacked.unbind()
        bias = None
        if context is not None:
            bias = context.bias
            if context.rotary is not None:
                query, key = rotate(query, *context.rotary), rotate(key, *context.rotary)
        # of all implementations the eager one alone tells its weights
        name = "eager" if attentions is not None else self.config._attn_implementation or "sdpa"
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        mixed, weights = attention(self, query, key, value, bias, scaling=self.scaling, dropout=0.0)
        if attentions is not None:
            attentions.append(weights)
        mixed = mixed.reshape(hidden_states.shape)
        return changes.correct("proj", self.proj(mixed), mixed)


class RaptorFFN(nn.Module):
    """Feed-forward branch: W₂·φ(W₁x), or W₂·(SiLU(gate)·up) with gate and up stacked in W₁."""

    def __init__(self, config: RaptorConfig):
        super().__init__()
        self.gated = config.ffn == "swiglu"
        self.fc1, self.fc2 = (
            RaptorExperts(config, name)
            if config.ffn_experts > 1
            else nn.Linear(*config.linear_sizes()[name], bias=config.has_bias(name))
            for name in ("fc1", "fc2")
        )
        self.activation = None if config.ffn in ("swiglu", "gelu") else ACT2FN[config.ffn]

    def linear(self, name: str, inputs: torch.Tensor, changes: LinearChanges) -> torch.Tensor:
        """Apply one of the two linear layers, as it is at some depths."""
        shares = () if changes.shares is None else (changes.shares,)
        return changes.correct(name, getattr(self, name)(inputs, *shares), inputs)

    def forward(
        self, hidden_states: torch.Tensor, changes: LinearChanges = NO_CHANGES
    ) -> torch.Tensor:
        """Return (…, N, D) to (…, N, D)."""
        hidden = self.linear("fc1", hidden_states, changes)
        # the largest tensor of all: no second one of it; a compiler needs none
        in_place = not hidden.requires_grad and not torch.compiler.is_compiling()
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            gate = nn.functional.silu(gate, inplace=in_place)
            hidden = gate.mul_(up) if in_place else gate * up
        elif self.activation is not None:
            hidden = self.activation(hidden)
        else:
            gelu = torch.ops.aten.gelu_ if in_place else nn.functional.gelu
            hidden = gelu(hidden)
        return self.linear("fc2", hidden, changes)


class RaptorDepthLinear(nn.Module):
    """A linear layer of the depth scaling.

    No `nn.Linear`: what quantises or adapts those shall leave factors of 1 ± 1e-4 alone.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw U(-1, 1) for what takes the depth, N(0, 1e-4²) for what gives the factors."""
        for weight in (self.weight, self.bias):
            if self.weight.shape[1] == 1:
                init.uniform_(weight, -1, 1)
            else:
                init.normal_(weight, std=1e-4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return (…, in) to (…, out)."""
        return nn.functional.linear(inputs, self.weight, self.bias)


class RaptorDepthScaling(nn.Module):
    """Three per-channel factors: W₂·SiLU(W₁·depth + b₁) + b₂ + 1 (paper, App. A.3)."""

    hidden_size = 16

    def __init__(self, config: RaptorConfig):
        super().__init__()
        self.fc1 = RaptorDepthLinear(1, self.hidden_size)
        self.fc2 = RaptorDepthLinear(self.hidden_size, 3 * config.hidden_size)

    def forward(self, depth: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return factors of the attention, the FFN and the output, for depths (…, 1): (…, D)
        each.
        """
        kind = depth.device.type
        if torch.is_autocast_enabled(kind):
            # in the weights' own precision: bfloat16 knows no number between 1 and 1.0078
            with torch.autocast(kind, enabled=False):
                return self(depth.to(self.fc1.weight.dtype))
        return (self.fc2(nn.functional.silu(self.fc1(depth))) + 1).chunk(3, dim=-1)


class DepthScales(NamedTuple):
    """What an application of a block multiplies by, LayerScales γ included; (D,) or (P, 1, D) each.

    Args:
        attention: s₁·γ₁.
        ffn: s₃·s₂·γ₂.
        state: s₃; None without depth scaling.
        linear: what depth changes in the linear layers.
    """

    attention: torch.Tensor
    ffn: torch.Tensor
    state: torch.Tensor | None
    linear: LinearChanges = NO_CHANGES


class RaptorBlock(GradientCheckpointingLayer):
    """One shared block. An application makes a state one layer deeper:

    x ← x + s₁·γ₁·attention(LN₁ x);  x ← x + s₂·γ₂·ffn(LN₂ x);  x ← s₃·x

    with LayerScales γ and depth scales s(depth), which are worked out once for the whole batch.

    Args:
        span: first and last layer that it takes states from and to, (start, stop): for each layer
            between it has corrections and shares of experts, if any; default: the whole teacher.
    """

    def __init__(self, config: RaptorConfig, span: tuple[int, int] | None = None):
        super().__init__()
        size = config.hidden_size
        self.start, stop = span or (0, config.num_hidden_layers)
        self.num_layers = stop - self.start
        self.norm1 = make_norm(config)
        self.attention = RaptorAttention(config)
        self.layer_scale1 = nn.Parameter(torch.full((size,), config.layerscale_value))
        self.norm2 = make_norm(config)
        self.ffn = RaptorFFN(config)
        self.layer_scale2 = nn.Parameter(torch.full((size,), config.layerscale_value))
        self.depth_scaling = RaptorDepthScaling(config) if config.depth_scaling else None
        sizes, rank = config.linear_sizes(), config.correction_rank
        self.corrections = nn.ModuleDict(
            {
                name: RaptorCorrection(self.num_layers, rank, *sizes[name])
                for name in config.corrected_layers()
            }
        )
        shares = expert_shares(self.num_layers, config.ffn_experts)
        self.expert_shares = nn.Parameter(shares) if config.ffn_experts > 1 else None
        self.position_bias = None
        if config.position_bias:
            from transformers.models.beit.modeling_beit import BeitRelativePositionBias

            self.position_bias = BeitRelativePositionBias(config.teacher_config)
            self.position_bias.generate_relative_position_index = relative_positions
            self.patch_sides = patch_sides(config)
        self.register_buffer("folded_scales", None, persistent=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        depth: int | torch.Tensor | DepthScales,
        attentions: list[torch.Tensor] | None = None,
        context: LayerContext | None = None,
    ) -> torch.Tensor:
        """Apply the block once.

        Args:
            hidden_states: (B, N, D), or (B, P, N, D) for P independent layers at once.
            depth: the layer that is asked for (1 … L), a tensor (P,) of them, or what `at` makes of
                a layer: a compiled block would be compiled anew for another number.
            attentions: a list that the attention weights (B, heads, N, N) are appended to.
            context: of families whose layers are handed more than states, see
                `RaptorModel.context`.

        Returns:
            The state(s) one layer deeper, in the shape of `hidden_states`.
        """
        states = hidden_states
        scales = self.scales(depth, states)
        if self.position_bias is not None:
            context = self.with_position_bias(context)
        mixed = self.attention(self.norm1(states), attentions, context, scales.linear)
        states = torch.addcmul(states, mixed, scales.attention)
        added = self.ffn(self.norm2(states), scales.linear)
        # s₃·(x + s₂·γ₂·f), with s₃·s₂·γ₂ at once: one tensor less is kept for the backward pass
        states = states if scales.state is None else states * scales.state
        return torch.addcmul(states, added, scales.ffn)

    def with_position_bias(self, context: LayerContext) -> LayerContext:
        """Return a context with the block's own bias for images of that size, (1, heads, N, N)."""
        grid = tuple(
            n // side for n, side in zip(context.image_size, self.patch_sides, strict=True)
        )
        own = self.position_bias(grid)
        return context._replace(bias=own if context.bias is None else own + context.bias)

    def at(self, depth: int, device: torch.device) -> torch.Tensor | DepthScales:
        """Return what `forward` takes for a layer: its folded scales, if there are any."""
        if self.folded_scales is None:
            return torch.full((1,), depth, device=device)
        # views: nothing is worked out
        return DepthScales(*self.folded_scales[depth], self.linear_changes(depth))

    def linear_changes(self, depth: int | torch.Tensor) -> LinearChanges:
        """Return what a layer, or a tensor (P,) of them, changes in the linear layers.

        A layer beyond the span changes what the nearest one within it does.
        """
        if not self.changes_layers:
            return NO_CHANGES
        if isinstance(depth, int):
            row = min(max(depth - self.start, 1), self.num_layers) - 1
            rows = slice(row, row + 1)
        else:
            rows = (depth.long() - self.start).clamp(1, self.num_layers) - 1
        corrections = {name: correction(rows) for name, correction in self.corrections.items()}
        shares = None if self.expert_shares is None else self.expert_shares[rows]
        return LinearChanges(corrections, shares)

    def scales(self, depth: int | torch.Tensor | DepthScales, like: torch.Tensor) -> DepthScales:
        """Return the scales for what `forward` takes as a depth; of the kind of `like`."""
        depth = self.at(depth, like.device) if isinstance(depth, int) else depth
        if isinstance(depth, DepthScales):
            return depth
        changes = self.linear_changes(depth)
        if self.folded_scales is not None:
            return DepthScales(*self.folded_scales[depth][:, :, None].unbind(1), changes)
        if self.depth_scaling is None:
            return DepthScales(self.layer_scale1, self.layer_scale2, None, changes)
        # where the states are, not where the weights are: these may be offloaded
        s1, s2, s3 = self.depth_scaling(depth.to(like)[:, None, None])
        return DepthScales(s1 * self.layer_scale1, s3 * s2 * self.layer_scale2, s3, changes)

    @torch.no_grad()
    def fold_scales(self, num_layers: int) -> None:
        """Work out the scales of all depths 0 … L once: (L + 1, 3, D), as the weights are now."""
        self.folded_scales = None
        depths = torch.arange(num_layers + 1, device=self.layer_scale1.device)
        attention, ffn, state, _ = self.scales(depths, self.layer_scale1)
        if self.depth_scaling is not None:
            self.folded_scales = torch.stack([attention[:, 0], ffn[:, 0], state[:, 0]], dim=1)
        elif self.changes_layers:  # the same for all depths, for one graph to take as its inputs
            scales = torch.stack([attention, ffn, torch.ones_like(ffn)])
            self.folded_scales = scales.expand(num_layers + 1, -1, -1)

    def train(self, mode: bool = True) -> "RaptorBlock":
        """Set the mode as everywhere in PyTorch; drop folded scales, as the weights will change."""
        if mode:
            self.folded_scales = None
        return super().train(mode)

    def copy_teacher_layers(self, layers: list[nn.Module], parts: LayerParts) -> None:
        """Take over the mean of the weights of some of the teacher's layers; of one: be that layer.

        Args:
            parts: where a layer keeps them, see `TEACHER_FAMILIES`.

        Raises:
            ValueError: the layers are not of the block's kind or width.
        """
        copies = [teacher_layer_weights(layer, parts) for layer in layers]
        theirs = {name: weight.shape for name, weight in copies[0].items()}
        # an expert is a layer's FFN
        own = {
            name: weight.shape[1:] if self.has_experts and name.startswith("ffn.") else weight.shape
            for name, weight in self.state_dict().items()
            if not name.startswith(("depth_scaling.", "corrections.", "expert_shares"))
        }
        if own != theirs:
            gated, width = is_gated(layers[0], parts), theirs["ffn.fc2.weight"][1]
            missing = sorted(own.keys() ^ theirs.keys())
            raise ValueError(
                "init='teacher' needs blocks like the teacher's layers, whose FFN is "
                f"{'gated (swiglu)' if gated else 'not gated'} and has "
                f"intermediate_size={width}; these have {'swiglu' if self.ffn.gated else 'no gate'}"
                f" and {self.ffn.fc2.in_features}"
                f"{f', and only one of the two has {missing[:4]}' if missing else ''}. "
                "Leave ffn and intermediate_size out, or start with init='random'."
            )
        self.start_from(copies)

    def start_from(self, copies: list[dict[str, torch.Tensor]]) -> None:
        """Take over the mean of layers; an expert takes the mean of the layers whose own it is.

        Args:
            copies: of `teacher_layer_weights`, a layer of the block's span each.
        """

        def mean(layers: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
            return torch.stack([layer[name] for layer in layers]).mean(0)

        means = {name: mean(copies, name) for name in copies[0]}
        if self.has_experts:
            own = expert_runs(len(copies), self.expert_shares.shape[1]).T.tolist()
            runs = [list(itertools.compress(copies, expert)) for expert in own]
            for name in (name for name in means if name.startswith("ffn.")):
                means[name] = torch.stack([mean(run, name) for run in runs])
        # the depth scaling, and what a layer changes, are the block's own
        self.load_state_dict(means, strict=False)

    @property
    def has_experts(self) -> bool:
        """Whether the FFN is mixed from several."""
        return self.expert_shares is not None

    @property
    def changes_layers(self) -> bool:
        """Whether a depth changes linear layers, by corrections or by a mix of experts."""
        return len(self.corrections) > 0 or self.has_experts


def relative_positions(grid: tuple[int, int]) -> torch.Tensor:
    """Return the index of BEiT's relative positions on a grid of patches, (N, N).

    transformers keeps one for every grid. What it made in inference mode no training pass can use:
    that takes a copy.
    """
    from transformers.models.beit.modeling_beit import BeitRelativePositionBias

    index = BeitRelativePositionBias.generate_relative_position_index(grid)
    return index.clone() if torch.is_grad_enabled() else index


def find_part(module: nn.Module, path: str) -> object | None:
    """Return what lies at a path of attributes below a module; None where there is nothing."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def is_gated(layer: nn.Module, parts: LayerParts) -> bool:
    """Return whether the FFN of a teacher's layer has a gate."""
    return find_part(layer, parts.gated_ffn[0]) is not None


def teacher_layer_weights(layer: nn.Module, parts: LayerParts) -> dict[str, torch.Tensor]:
    """Return the weights of one of the teacher's layers under the names of a `RaptorBlock`.

    Args:
        parts: where a layer keeps them.
    """
    *qkv, output = (layer.get_submodule(path) for path in parts.attention)
    *into, fc2 = (
        layer.get_submodule(path)
        for path in (parts.gated_ffn if is_gated(layer, parts) else parts.ffn)
    )
    weights = {
        "attention.qkv.weight": torch.cat([part.weight for part in qkv]),
        "ffn.fc1.weight": torch.cat([part.weight for part in into]),
    }
    biases = [part.bias for part in qkv if part.bias is not None]
    if biases and len(biases) == len(qkv):
        weights["attention.qkv.bias"] = torch.cat(biases)
    elif biases:
        weights["attention.some_bias"] = torch.stack(biases)
    if into[0].bias is not None:
        weights["ffn.fc1.bias"] = torch.cat([part.bias for part in into])
    for number, path in enumerate(parts.scales, start=1):
        scale = find_part(layer, path)  # of BEiT the number 1 where it has none
        ones = torch.ones_like(output.weight[0])
        weights[f"layer_scale{number}"] = scale if isinstance(scale, torch.Tensor) else ones
    same = {
        "norm1": layer.get_submodule(parts.norms[0]),
        "norm2": layer.get_submodule(parts.norms[1]),
        "attention.proj": output,
        "ffn.fc2": fc2,
        "position_bias": find_part(layer, parts.position_bias),
        "attention.q_norm": find_part(layer, parts.qk_norms[0]),
        "attention.k_norm": find_part(layer, parts.qk_norms[1]),
    }
    for name, part in same.items():
        if part is not None:
            weights |= {f"{name}.{key}": weight for key, weight in part.state_dict().items()}
    return weights


def config_for_teacher(teacher: PreTrainedModel, phases: list[int], **changes) -> RaptorConfig:
    """Return the configuration of blocks like the layers of a teacher.

    Args:
        teacher: a bare one, with one layer at least.
        changes: fields of `RaptorConfig` that shall be otherwise; None leaves the teacher's own.
    """
    family = teacher_family(teacher.config)
    parts, layer = family.layer, teacher.get_submodule(family.layers)[0]
    weights = teacher_layer_weights(layer, parts)
    gated = is_gated(layer, parts)
    *qkv, output = parts.attention
    qkv = qkv * 3 if len(qkv) == 1 else qkv
    linear = dict(zip(("query", "key", "value", "output"), (*qkv, output), strict=True))
    linear |= dict(zip(("fc1", "fc2"), (parts.gated_ffn[1:] if gated else parts.ffn), strict=True))
    biases = [n for n, path in linear.items() if layer.get_submodule(path).bias is not None]
    fields = {
        "ffn": "swiglu" if gated else teacher.config.hidden_act,
        "intermediate_size": weights["ffn.fc2.weight"].shape[1],
        "block_norm": "layernorm" if "norm1.bias" in weights else "rmsnorm",
        "block_norm_eps": getattr(teacher.config, family.eps),
        "biases": None if len(biases) == len(linear) else biases,
        # a norm of each head, as in models of timm, is narrower: blocks have none of that kind
        "qk_norm": len(weights.get("attention.q_norm.weight", ())) == teacher.config.hidden_size,
        "position_bias": any(name.startswith("position_bias.") for name in weights),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes.get("ffn", fields["ffn"]) != fields["ffn"]:
        fields["intermediate_size"] = None  # the width that suits the other kind
    return RaptorConfig(teacher_config=teacher.config, phases=phases, **(fields | changes))


class RaptorPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of every Raptor."""

    config_class = RaptorConfig
    base_model_prefix = "raptor"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["RaptorBlock"]  # transformers adds the embeddings of the shell
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args, use_safetensors: bool | None = None, **kwargs):
        """Load as everywhere in transformers, but from safetensors only, never from a pickle.

        Raises:
            ValueError: `use_safetensors=False`, or weights in other files.
        """
        if use_safetensors is False:
            raise ValueError("The weights of a Raptor are read from safetensors, never a pickle.")
        return super().from_pretrained(*args, use_safetensors=True, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        # an index of shards, or a configuration, may name files of any kind
        foreign = [f for f in checkpoint_files or [] if not str(f).endswith(".safetensors")]
        if foreign:
            raise ValueError(
                f"The weights of a Raptor are read from safetensors, never a pickle; got {foreign}."
            )
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, *args, **kwargs
        )

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save as everywhere in transformers. The code goes along, for any Auto class to load.

        transformers itself would note down the one Auto class of the model that is saved, and
        `AutoModel` would not find the backbone of a classifier.
        """
        models = {name: f"modeling_raptor.{cls.__name__}" for name, cls in AUTO_CLASSES.items()}
        self.config.auto_map = {"AutoConfig": "configuration_raptor.RaptorConfig", **models}
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the teacher's patch embedding."""
        return self.base_model.shell.get_input_embeddings()

    def wanted_states(self, output_hidden_states: bool | int | list[int] | None) -> set[int]:
        """Return the layers (0 … L) whose states an argument, or else the configuration, wants."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        number = self.config.num_hidden_layers + 1
        if isinstance(output_hidden_states, bool) or output_hidden_states is None:
            return set(range(number)) if output_hidden_states else set()
        layers = output_hidden_states
        layers = [layers] if isinstance(layers, int) else layers
        return {layer % number for layer in layers if -number <= layer < number}

    def trajectory(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return images (B, C, H, W) to the states of all layers, (B, L + 1, N, D)."""
        outputs = self.base_model(pixel_values, output_hidden_states=True)
        return torch.stack(outputs.hidden_states, dim=1)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """One black image of the teacher's size."""
        size = pair(self.config.image_size)
        return {"pixel_values": torch.zeros(1, self.config.num_channels, *size)}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw linear weights from N(0, initializer_range²); a depth scaling starts as 1 ± 1e-4."""
        if isinstance(module, RaptorDepthLinear | RaptorCorrection | RaptorExperts):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RaptorAttention) and module.some_bias is not None:
            init.zeros_(module.some_bias)
        elif isinstance(module, RaptorBlock):
            init.constant_(module.layer_scale1, self.config.layerscale_value)
            init.constant_(module.layer_scale2, self.config.layerscale_value)
            if module.has_experts:
                init.copy_(module.expert_shares, expert_shares(*module.expert_shares.shape))


class RaptorModel(RaptorPreTrainedModel):
    """The teacher's embeddings, k shared blocks, the teacher's final norm.

    `embed`, `advance` and `norm` are the three seams; `forward` is those three in a row.
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]  # any model with a head has a backbone

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        config.check_phases()
        self.family = teacher_family(config.teacher_config)
        self.shell = make_shell(config.teacher_config)
        self._contexts: dict[tuple, LayerContext] = {}
        self._cuda_graphs = False  # whether a forward overwrites what the one before returned
        self.blocks = nn.ModuleList(RaptorBlock(config, span) for span in config.spans())
        self.post_init()

    @classmethod
    def from_teacher(
        cls,
        teacher: PreTrainedModel,
        phases: list[int],
        *,
        init: str = "random",
        ffn: str | None = None,
        intermediate_size: int | None = None,
        depth_scaling: bool = True,
        correction_rank: int = 0,
        correction_on: str = "attention",
        ffn_experts: int = 1,
        layerscale_value: float | None = None,
        block_norm_eps: float | None = None,
    ) -> "RaptorModel":
        """Make an untrained Raptor around the frozen embeddings and final norm of a teacher.

        Args:
            teacher: the backbone (`Dinov2Model`, …), not a model with a task head.
            phases: numbers of layers that each block stands for; they sum to the teacher's depth.
            init: `"random"`, or `"teacher"`: every block starts as the mean of its phase's layers.
                On the digits teacher no single layer of a phase (the first, the middle, the last,
                the one that rolls out best) led to a better R² after 100 steps at k = 2, 3 or 4.
            ffn, intermediate_size: see `RaptorConfig`; None takes the teacher's own.
            depth_scaling, correction_rank, correction_on, ffn_experts: see `RaptorConfig`. With
                `init="teacher"` the phase's layers are split among the experts.
            layerscale_value: where random blocks start; None takes 1e-5.
            block_norm_eps: None takes the eps of the teacher's layers.

        Raises:
            ValueError: phases that do not sum to the teacher's depth, a teacher of an unknown
                family, offloaded, quantised or in training mode with dropout, a model around a
                teacher (`raptorize` takes those), or `init="teacher"` with a LayerScale or another
                FFN than its own.
        """
        if init not in ("random", "teacher"):
            raise ValueError(f"init must be 'random' or 'teacher'; got {init!r}.")
        if init == "teacher" and layerscale_value is not None:
            raise ValueError(
                f"layerscale_value={layerscale_value} contradicts init='teacher', which takes over "
                "the teacher's LayerScales. Leave it out, or start with init='random'."
            )
        check_teacher(teacher)
        config = config_for_teacher(
            teacher,
            phases,
            ffn=ffn,
            intermediate_size=intermediate_size,
            depth_scaling=depth_scaling,
            correction_rank=correction_rank,
            correction_on=correction_on,
            ffn_experts=ffn_experts,
            layerscale_value=1e-5 if layerscale_value is None else layerscale_value,
            block_norm_eps=block_norm_eps,
        )
        if os.path.isdir(teacher.name_or_path):  # a folder of this machine is nobody's business
            config.teacher_config.name_or_path = ""
        model = cls(config).to(teacher.dtype)
        weights = teacher.state_dict()
        model.shell.load_state_dict({name: weights[name] for name in model.shell.state_dict()})
        model.shell.requires_grad_(False)
        if init == "teacher":
            layers = teacher.get_submodule(model.family.layers)
            for block, (start, stop) in zip(model.blocks, config.spans(), strict=True):
                block.copy_teacher_layers(layers[start:stop], model.family.layer)
        with full_products():
            model.check_against(teacher, blocks=init == "teacher")
        return model

    @torch.no_grad()
    def check_against(self, teacher: PreTrainedModel, *, blocks: bool) -> None:
        """Compare with what the teacher's own forward makes of an image of its size.

        That is state 0, how many tokens it has, and the final norm where the teacher's last state
        is given after it.

        Args:
            blocks: compare a copy of the first layer with it, too.

        Raises:
            ValueError: they differ: the teacher is not what its family is in `TEACHER_FAMILIES`.
        """
        config = self.config
        like = next(teacher.parameters())
        size = (1, config.num_channels, *pair(config.image_size))
        image = torch.linspace(-1, 1, math.prod(size)).view(size).to(like)
        call = first_layer_call(teacher, image)
        expected = call[0]
        rows, columns = patch_grid(size[-2:], config)
        number = token_layout(config).num_prefix_tokens + rows * columns
        if expected.shape[-2] != number:
            raise ValueError(
                f"A state of this {type(teacher).__name__} should have {number} tokens (cls, "
                f"registers and {rows}×{columns} patches), and has {expected.shape[-2]}. Its row "
                "in TEACHER_FAMILIES miscounts them."
            )
        home = self.shell.device
        self.shell.to(like.device)  # a GPU's convolutions (TF32) differ from another device's
        try:
            pairs = {"the embeddings": (self.embed(image), expected)}
            if blocks:
                pairs["a copy of the first layer"] = copied_layer(config, teacher, *call)
            if (last := last_states(teacher, image)) is not None:
                pairs["the final norm"] = (self.norm(last[0].to(like.device)), last[1])
        finally:
            self.shell.to(home)
        tolerance = 1e-4 if like.dtype == torch.float32 else 5e-2
        for what, (found, wanted) in pairs.items():
            error = (found.to(wanted) - wanted).abs().max() / wanted.abs().max()
            # of a teacher that is itself broken, whoever trains says at which layer
            if wanted.isfinite().all() and not error < tolerance:
                raise ValueError(
                    f"{what} of this {type(teacher).__name__} should give its own states, and "
                    f"differ by {error:.1e} of their largest value: it computes something that "
                    f"raptor_hf does not know of a {config.teacher_config.model_type!r}."
                )

    def train(self, mode: bool = True) -> "RaptorModel":
        """Set the mode of the blocks; the teacher's embeddings stay as they are in evaluation."""
        if mode or self.training:  # the weights may change, or have changed
            self._contexts.clear()
        super().train(mode)
        self.shell.eval()  # see `make_shell`; others drop tokens
        return self

    def _load_from_state_dict(self, *args) -> None:
        self._contexts.clear()  # they are of the weights before
        super()._load_from_state_dict(*args)

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed images: (B, C, H, W) to the states of layer 0, (B, N, D).

        Raises:
            ValueError: not four axes, another number of channels than the teacher's, a height or
                width that is not a multiple of the patch, or another size than the teacher's where
                its family takes no other.
        """
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values must have the shape (batch, {channels}, height, width); "
                f"got {tuple(pixel_values.shape)}."
            )
        patch_height, patch_width = patch_sides(self.config)
        height, width = pixel_values.shape[2:]
        native = (height, width) == pair(self.config.image_size)  # SigLIP: 384 with patches of 14
        if not native and (height % patch_height or width % patch_width):
            raise ValueError(
                f"Image height and width must be multiples of the patch "
                f"({patch_height}×{patch_width} pixels); got {height}×{width}. "
                "Resize or pad the images first."
            )
        arguments = image_arguments(self.config.teacher_config, pixel_values)
        states = pixel_values
        for path in self.family.embeddings:
            given = arguments if path.endswith("embeddings") else {}
            states = find_part(self.shell, path)(states, **given)
        return states[0] if isinstance(states, tuple) else states

    def context(
        self, image_size: tuple[int, int] | None = None, like: torch.Tensor | None = None
    ) -> LayerContext | None:
        """Return what blocks need beside states of images of a size: rotary angles, a bias.

        It is what the teacher's own forward hands to its layers, and kept for the last sizes. None
        for families whose layers need nothing else.

        Args:
            image_size: height and width in pixels; default: as the teacher was made for.
            like: images or states, on whose device it shall be; default: where the weights are.
        """
        if not self.family.context:
            return None
        size = tuple(image_size or pair(self.config.image_size))
        weight = next(self.shell.parameters())  # of an offloaded one the device says nothing
        key = (size, weight.device if like is None else like.device, weight.dtype)
        if key not in self._contexts:
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"Run the model once on images of {size[0]}×{size[1]} pixels before it is "
                    f"compiled or exported: a {self.config.teacher_config.model_type!r} works out "
                    "positions once for each size."
                )
            layers = self.shell.get_submodule(self.family.layers)
            layers.append(nn.Identity())  # a first layer
            try:
                self._contexts[key] = layer_context(self.shell, size, key[1])
            finally:
                del layers[0]
            if len(self._contexts) > CONTEXTS_KEPT:
                del self._contexts[next(iter(self._contexts))]  # the first that was made
        return self._contexts[key]

    def context_of(
        self, states: torch.Tensor, image_size: tuple[int, int] | None = None
    ) -> LayerContext | None:
        """Return `context` for states (B, N, D).

        Raises:
            ValueError: images of that size have another number of tokens.
        """
        if self.family.context:
            size = tuple(image_size or pair(self.config.image_size))
            rows, columns = patch_grid(size, self.config)
            expected = token_layout(self.config).num_prefix_tokens + rows * columns
            if states.shape[-2] != expected:
                raise ValueError(
                    f"Images of {size[0]}×{size[1]} pixels have {expected} tokens; the states have "
                    f"{states.shape[-2]}. Say of which size their images are (image_size)."
                )
        return self.context(image_size, states)

    def advance(
        self,
        states: torch.Tensor,
        depth: int,
        attentions: list[torch.Tensor] | None = None,
        context: LayerContext | None = None,
    ) -> torch.Tensor:
        """Apply one block: (B, N, D) after layer depth − 1 to (B, N, D) after layer depth.

        Args:
            attentions: the attention weights (B, heads, N, N) are appended to it.
            context: of the images' size; default: of images as the teacher was made for.
        """
        block = self.blocks[self.config.phase_of(depth)]
        context = self.context_of(states) if context is None else context
        return block(states, block.at(depth, states.device), attentions, context)

    def advance_moving(
        self,
        states: torch.Tensor,
        depth: int,
        moving: torch.Tensor,
        context: LayerContext | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply one block to the images that have not settled, the rows `moving` of (B, N, D).

        Returns:
            The states (B, N, D), and the rows that go on: all before the last phase, and in it
            those whose cls token turned by `exit_angle` or more.
        """
        before = states[moving]
        after = self.advance(before, depth, context=context)
        states = states.index_copy(0, moving, after)
        cosine = nn.functional.cosine_similarity(before[:, 0], after[:, 0], dim=-1)
        if self.config.phase_of(depth) == len(self.blocks) - 1:
            moving = moving[cosine <= math.cos(math.radians(self.config.exit_angle))]
        return states, moving

    def prepare_for_inference(self, *, compile: bool = False, **options) -> "RaptorModel":
        """Make `forward` faster for weights that stay as they are.

        The depth scales of all layers are worked out once, LayerScales included; `train()` drops
        them again.

        Args:
            compile: compile a block, once for all its applications: a fraction of the time that
                the unrolled model takes to compile.
            options: of `torch.compile`. `mode="reduce-overhead"` replays CUDA graphs, which is
                faster for few images; `"max-autotune"` also tries kernels, for minutes.

        Returns:
            The model itself, in evaluation mode.

        Raises:
            ValueError: weights that are offloaded.
        """
        if (offloaded := first_offloaded(self)) is not None:
            raise ValueError(
                "prepare_for_inference needs weights in memory; those of this model are offloaded, "
                f"{offloaded} first. Load it onto one device, or run it as it is."
            )
        self.eval()
        self.context()
        graphs = options.get("options", {}).get("triton.cudagraphs", False)
        self._cuda_graphs = graphs or options.get("mode") in ("reduce-overhead", "max-autotune")
        for block in self.blocks:
            block.fold_scales(self.config.num_hidden_layers)
            if compile:
                block.compile(**{"fullgraph": True, **options})
        return self

    def _begin_rollout(self) -> None:
        """Let CUDA graphs, if there are any, write over the states of the rollout before."""
        if self._cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def _kept(self, states: torch.Tensor) -> torch.Tensor:
        """Return states of a rollout that the next one leaves alone."""
        return states.clone() if self._cuda_graphs else states

    def norm(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the teacher's final norm, if it has one: (B, N, D) to (B, N, D)."""
        norm = self.family.final_norm
        return states if norm is None else self.shell.get_submodule(norm)(states)

    def rollout(
        self,
        states: torch.Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Return the trajectory from layer `start` to layer `stop` (default L).

        Args:
            states: (B, N, D), the states after layer `start`.
            image_size: height and width of the images in pixels, see `context`.

        Returns:
            (B, stop − start + 1, N, D): `states` and every state after it.
        """
        stop = self.config.num_hidden_layers if stop is None else stop
        if not 0 <= start <= stop <= self.config.num_hidden_layers:
            raise ValueError(
                f"rollout needs 0 ≤ start ≤ stop ≤ {self.config.num_hidden_layers}; "
                f"got start={start}, stop={stop}."
            )
        self._begin_rollout()
        trajectory, context = [states], self.context_of(states, image_size)
        for depth in range(start + 1, stop + 1):
            trajectory.append(self.advance(trajectory[-1], depth, context=context))
        return torch.stack(trajectory, dim=1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Return images (B, C, H, W) to the state after the last layer.

        Args:
            output_hidden_states: as everywhere in transformers; numbers of layers (0 … L, negative
                ones count from the end) keep these alone, and the others are None.

        Returns:
            `last_hidden_state` (B, N, D) after the final norm, `pooler_output` (B, D), its cls
            token, if there is one; where they are asked for, `hidden_states`: L + 1 states
            (B, N, D) before the final norm, and `attentions`: L times (B, heads, N, N), worked out
            by the eager attention whatever the model's own is. With `config.num_applications` or
            `config.exit_angle` the states of some layers are those of the layer before.

        Raises:
            ValueError: attentions of a model with `exit_angle`, or see `embed`.
        """
        wanted = self.wanted_states(output_hidden_states)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        attentions = [] if output_attentions else None
        exits = self.config.exit_angle is not None
        if exits and output_attentions:
            raise ValueError("With exit_angle set, images stop early: attentions can't be told.")
        self._begin_rollout()
        states = self.embed(pixel_values)
        context = self.context(tuple(pixel_values.shape[-2:]), states)
        hidden_states = [states if 0 in wanted else None]
        applied = self.config.applied_layers()
        moving = torch.arange(len(states), device=states.device) if exits else None
        for depth in range(1, self.config.num_hidden_layers + 1):
            if depth in applied and not exits:
                states = self.advance(states, depth, attentions, context)
            elif depth in applied and len(moving):
                states, moving = self.advance_moving(states, depth, moving, context)
            hidden_states.append(self._kept(states) if depth in wanted else None)
        last_hidden_state = (
            self._kept(states) if self.family.final_norm is None else self.norm(states)
        )
        has_cls = token_layout(self.config).num_cls > 0
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[:, 0] if has_cls else None,
            hidden_states=tuple(hidden_states) if wanted else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


@torch.inference_mode(False)  # what is made in that mode no training pass can use later
@torch.no_grad()
def layer_context(
    teacher: PreTrainedModel, image_size: tuple[int, int], device: torch.device | None = None
) -> LayerContext | None:
    """Return what a teacher's forward hands to its layers beside states, for images of a size.

    None for families whose layers take states alone.

    Args:
        device: where the images are; default: where the weights are.
    """
    if not teacher_family(teacher.config).context:
        return None
    like = next(teacher.parameters())
    size = (1, teacher.config.num_channels, *image_size)
    black = torch.zeros(size, dtype=like.dtype, device=device or like.device)
    _, args, kwargs = first_layer_call(teacher, black)
    return LayerContext.of_call(args, kwargs)


@contextlib.contextmanager
def full_products() -> Iterator[None]:
    """Multiply all bits of float32 numbers, where a GPU was told to leave some out (TF32)."""
    try:
        before, choose = torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision
        full = "highest"
    except RuntimeError:  # told in torch's newer way, which must not be mixed with the older one
        products, full = torch.backends.cuda.matmul, "ieee"
        before, choose = products.fp32_precision, partial(setattr, products, "fp32_precision")
    if before == full:
        yield
        return
    choose(full)
    try:
        yield
    finally:
        choose(before)


class _ReachedError(Exception):
    """A model's forward has reached its first layer."""


def first_layer_call(model: PreTrainedModel, pixel_values: torch.Tensor) -> tuple:
    """Return the states, arguments and keyword arguments that a teacher's first layer is given.

    Of a teacher that masks patches (MAE) they are those of the whole image.
    """
    call = []

    def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        call.extend((args[0], args[1:], kwargs))
        raise _ReachedError

    layer = model.get_submodule(teacher_family(model.config).layers)[0]
    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        call_whole(model, pixel_values)
    except _ReachedError:
        return tuple(call)
    finally:
        hook.remove()
    raise ValueError(f"The forward of {type(model).__name__} does not call its first layer.")


def last_states(
    teacher: PreTrainedModel, pixel_values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the state after a teacher's last layer, and its `last_hidden_state` after the norm.

    None where it gives no such thing: CLIP norms its pooled output alone, a backbone tells maps.
    """
    family, states = teacher_family(teacher.config), []
    if not family.output_normed:
        return None
    layer = teacher.get_submodule(family.layers)[-1]
    hook = layer.register_forward_hook(lambda _module, _args, output: states.append(output))
    try:
        normed = getattr(call_whole(teacher, pixel_values), "last_hidden_state", None)
    finally:
        hook.remove()
    if normed is None:
        return None
    return states[0][0] if isinstance(states[0], tuple) else states[0], normed


def call_whole(model: PreTrainedModel, pixel_values: torch.Tensor) -> ModelOutput:
    """Call a teacher on images; one that masks patches (MAE) leaves them whole."""
    mask_ratio = getattr(model.config, "mask_ratio", None)
    try:
        if mask_ratio:
            model.config.mask_ratio = 0.0
        return model(pixel_values, **image_arguments(model.config, pixel_values))
    finally:
        if mask_ratio:
            model.config.mask_ratio = mask_ratio


def copied_layer(
    config: RaptorConfig, teacher: PreTrainedModel, states: torch.Tensor, args: tuple, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a block that is a copy of a teacher's first layer makes of states, and the layer
    itself.

    Args:
        config: of the block.
        states, args, kwargs: what the layer is called with, see `first_layer_call`.
    """
    family = teacher_family(teacher.config)
    layer = teacher.get_submodule(family.layers)[0]
    config = copy.deepcopy(config)  # at one depth nothing changes with depth
    config.depth_scaling, config.correction_rank, config.ffn_experts = False, 0, 1
    with torch.device("meta"):
        block = RaptorBlock(config).eval()
    block.load_state_dict(teacher_layer_weights(layer, family.layer), assign=True)
    output = layer(states, *args, **kwargs)
    copied = block(states, 1, context=LayerContext.of_call(args, kwargs))
    return copied, output[0] if isinstance(output, tuple) else output


def make_shell(teacher_config: PreTrainedConfig, num_layers: int = 0) -> PreTrainedModel:
    """Make a teacher with few layers or none: its embeddings, its final norm, and what rotates."""
    family = teacher_family(teacher_config)
    config = copy.deepcopy(teacher_config)
    for name, value in ({"num_hidden_layers": num_layers} | family.shell).items():
        setattr(config, name, value)
    if family.described:
        config.model_args = (config.model_args or {}) | {"depth": num_layers}
    if family.model_class:
        shell = getattr(transformers, family.model_class)._from_config(config)
    else:
        shell = AutoModel.from_config(config)
    shell.eval()  # in training DINOv3 draws other positions, and a new model is in that mode
    shell.config = teacher_config  # where transformers looks for it
    for head in ("pooler", "head"):  # no state needs them
        if getattr(shell, head, None) is not None:
            setattr(shell, head, None)
    return shell


def describe(model: PreTrainedModel) -> None:
    """Note in the configuration of a model of timm how large it is, which it does not say itself.

    Raises:
        ValueError: another model of timm than a VisionTransformer, or one of another activation.
    """
    config = model.config
    if not teacher_family(config).described or hasattr(config, "hidden_size"):
        return
    timm_model = model.timm_model
    if type(timm_model).__name__ != "VisionTransformer":
        raise ValueError(
            "Of the models of timm a VisionTransformer can teach; this is a "
            f"{type(timm_model).__name__} ({config.architecture})."
        )
    block, patches = timm_model.blocks[0], timm_model.patch_embed
    names = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}
    activation = type(block.mlp.act).__name__
    if activation not in names:
        raise ValueError(f"Blocks don't know the activation {activation} of {config.architecture}.")
    num_cls = int(timm_model.cls_token is not None)
    facts = {
        "hidden_size": timm_model.embed_dim,
        "num_hidden_layers": len(timm_model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": list(pair(patches.img_size)),
        "patch_size": list(pair(patches.patch_size)),
        "num_channels": patches.proj.in_channels,
        "hidden_act": names[activation],
        "layer_norm_eps": block.norm1.eps,
        "num_cls_tokens": num_cls,
        "num_registers": timm_model.num_prefix_tokens - num_cls,
    }
    for name, value in facts.items():
        setattr(config, name, value)


def check_weights(teacher: PreTrainedModel) -> None:
    """Refuse weights that can't be taken over, offloaded or quantised; a ValueError says which."""
    name = type(teacher).__name__
    if (offloaded := first_offloaded(teacher)) is not None:
        raise ValueError(
            f"The weights of a teacher must lie in memory; those of this {name} are offloaded (on "
            f"the meta device), {offloaded} first. Load it onto one device."
        )
    others = {
        path: weight.dtype if type(weight.data) is torch.Tensor else type(weight.data).__name__
        for path, weight in teacher.named_parameters()
        if type(weight.data) is not torch.Tensor or weight.dtype not in _FLOATS
    }
    if others or getattr(teacher, "hf_quantizer", None) is not None:
        of_kind = [f", {path} is {kind}" for path, kind in others.items()][:1]
        raise ValueError(
            f"The weights of a teacher must be plain floating-point numbers; this {name} is "
            f"quantised{''.join(of_kind)}. Load it without quantization_config; the Raptor may be "
            "quantised instead."
        )


def check_teacher(teacher: PreTrainedModel) -> None:
    """Refuse what no Raptor can be made of; a ValueError says why."""
    config = teacher.config
    if config.model_type == "raptor":
        raise ValueError(f"{type(teacher).__name__} is a Raptor already; give its teacher.")
    family = teacher_family(config)
    describe(teacher)
    if find_part(teacher, family.layers) is None:
        raise ValueError(
            f"A Raptor is made of a bare {config.model_type!r}; this {type(teacher).__name__} is "
            "a model around one. Give the backbone within it, or use raptor_hf.raptorize."
        )
    check_weights(teacher)
    if teacher.training:
        drops = [
            name
            for name, module in teacher.named_modules()
            if getattr(module, "p", 0) > 0 or getattr(module, "drop_prob", 0)
        ]
        if drops:
            raise ValueError(
                f"The teacher is in training mode, and {drops[0]} makes its states random: call "
                "teacher.eval() first."
            )


def first_offloaded(model: nn.Module) -> str | None:
    """Return the name of the first weight that is not in memory but on the meta device, if any."""
    return next((name for name, weight in model.named_parameters() if weight.is_meta), None)


def find_towers(model: nn.Module) -> dict[str, PreTrainedModel]:
    """Return the vision towers within a model whose layers a trunk can stand for, by their path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        and module.config.model_type in TEACHER_FAMILIES
        and find_part(module, TEACHER_FAMILIES[module.config.model_type].layers)  # no empty shell
    }


def image_arguments(teacher_config: PreTrainedConfig, pixel_values: torch.Tensor) -> dict:
    """Return what a teacher's forward, and its embeddings, want beside images (B, C, H, W).

    Raises:
        ValueError: images of another size than the teacher was made for, and a family that takes no
            other.
    """
    family, arguments = teacher_family(teacher_config), {}
    native = pair(getattr(teacher_config, "image_size", None) or pixel_values.shape[-2:])
    if family.resizing != "always" and tuple(pixel_values.shape[-2:]) != native:
        if family.resizing == "never":
            raise ValueError(
                f"A {teacher_config.model_type!r} takes images of {native[0]}×{native[1]} pixels "
                f"alone: it can't interpolate its positions; got {tuple(pixel_values.shape[-2:])}."
            )
        arguments["interpolate_pos_encoding"] = True
    if family.masks:  # what it keeps of the patches it shuffles by this noise, unless in order
        number = math.prod(patch_grid(tuple(pixel_values.shape[-2:]), teacher_config))
        order = torch.arange(number, device=pixel_values.device)
        arguments["noise"] = order.expand(len(pixel_values), number)
    return arguments


def pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return height and width of what may be given as one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def patch_grid(size: tuple[int, int], config: PreTrainedConfig) -> tuple[int, int]:
    """Return how many patches an image of `size` (height, width) has below and beside each other.

    What is left over at the edges, where its own size is no multiple of the patch (SigLIP), the
    teacher does not look at.
    """
    return tuple(pixels // side for pixels, side in zip(size, patch_sides(config), strict=True))


def patch_sides(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the height and width of a patch in pixels."""
    return pair(config.patch_size)


def feature_size(config: PreTrainedConfig) -> int:
    """Return the width of `pool_tokens`: 2·D, or D where there is no cls token."""
    return (2 if token_layout(config).num_cls else 1) * config.hidden_size


def pool_tokens(last_hidden_state: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Return DINOv2's image feature: [cls, mean of patches], (B, N, D) to (B, 2·D).

    Of a family without a cls token it is the mean of the patches alone, (B, D).
    """
    layout = token_layout(config)
    patches = last_hidden_state[:, layout.groups()["patches"]].mean(dim=1)
    return torch.cat([last_hidden_state[:, 0], patches], -1) if layout.num_cls else patches


class RaptorForImageClassification(RaptorPreTrainedModel):
    """A Raptor with DINOv2's classification head: [cls, mean of patches] to one linear layer."""

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        self.raptor = RaptorModel(config)
        self.classifier = nn.Linear(feature_size(config), config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput:
        """Return images (B, C, H, W) to `logits` (B, labels), and `loss` where `labels` (B,) are
        given.
        """
        outputs = self.raptor(pixel_values, output_hidden_states, output_attentions)
        logits = self.classifier(pool_tokens(outputs.last_hidden_state, self.config))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class PatchFrame(NamedTuple):
    """How images of one size lie on the patch grid: padded evenly on all sides to whole patches.

    480×640 pixels at patch 14 become 490×644 with 5 more rows above and below, 2 more columns left
    and right, and a grid of 35×46; where the padding is odd, right and bottom get one pixel more.
    """

    padded: tuple[int, int]  # pixels, height and width
    padding: tuple[int, int, int, int]  # pixels: left, right, top, bottom
    grid: tuple[int, int]  # patches, height and width

    @classmethod
    def of(cls, size: tuple[int, int], config: PreTrainedConfig) -> "PatchFrame":
        """Return the frame of images of `size` = (height, width) pixels."""
        patch = patch_sides(config)
        rows, columns = (-size[axis] % patch[axis] for axis in (0, 1))
        padded = (size[0] + rows, size[1] + columns)
        grid = (padded[0] // patch[0], padded[1] // patch[1])
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return cls(padded, padding, grid)

    def pad(self, maps: torch.Tensor) -> torch.Tensor:
        """Pad maps (…, H, W) of an image's pixels with zeros."""
        return nn.functional.pad(maps, self.padding)

    def interpolate(self, maps: torch.Tensor) -> torch.Tensor:
        """Interpolate maps (B, C, h, w) over the padded image, at each pixel of the image
        itself.
        """
        maps = resize_maps(maps, self.padded)
        left, right, top, bottom = self.padding
        return maps[..., top : self.padded[0] - bottom, left : self.padded[1] - right]


def resize_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Interpolate maps (B, C, h, w) bilinearly to (B, C, H, W)."""
    return nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def drop_registers(states: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Return what dense heads look at, cls and then the patches: (B, N, D) to (B, 1 + h·w, D).

    Of a family without a cls token it is the patches alone.
    """
    layout = token_layout(config)
    patches = states[:, layout.groups()["patches"]]
    return torch.cat([states[:, :1], patches], dim=1) if layout.num_cls else patches


def segmentation_logits(
    classifier: nn.Linear, tokens: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Apply a linear layer to every patch: (B, 1 + h·w, D) to logits (B, labels, h, w)."""
    patches = tokens[:, -grid[0] * grid[1] :]
    return classifier(patches).transpose(1, 2).unflatten(2, grid)


def depth_logits(
    classifier: nn.Linear, tokens: torch.Tensor, grid: tuple[int, int], *, upsampling: int = 4
) -> torch.Tensor:
    """Apply a linear layer to [patch, cls], four times as fine as the patches.

    DINOv2 upsamples the 2·D features and then applies the layer. Bilinear weights sum to one, so
    the layer can come first, on a sixteenth of the positions; and cls is the same at all of them,
    so its share is worked out once an image. The result is the same.

    Args:
        tokens: (B, 1 + h·w, D), cls and the patches.

    Returns:
        (B, bins, 4·h, 4·w).
    """
    size, cls, patches = tokens.shape[-1], tokens[:, :1], tokens[:, 1:]
    if classifier.weight.is_meta:  # offloaded: it fetches its weights when it is called
        logits = classifier(torch.cat([patches, cls.expand_as(patches)], dim=-1))
    else:
        logits = nn.functional.linear(patches, classifier.weight[:, :size], classifier.bias)
        logits = logits + nn.functional.linear(cls, classifier.weight[:, size:])
    logits = logits.transpose(1, 2).unflatten(2, grid)
    return resize_maps(logits, (upsampling * grid[0], upsampling * grid[1]))


def expected_depth(
    logits: torch.Tensor, frame: PatchFrame, *, min_depth: float, max_depth: float
) -> torch.Tensor:
    """Return the bins' centres averaged by the softmax: (B, bins, h, w) to metres (B, H, W)."""
    edges = torch.linspace(
        min_depth, max_depth, logits.shape[1] + 1, dtype=logits.dtype, device=logits.device
    )
    centres = (edges[:-1] + edges[1:]) / 2
    depth = torch.einsum("bkhw,k->bhw", logits.softmax(dim=1), centres)
    return frame.interpolate(depth[:, None])[:, 0]


def depth_loss(
    logits: torch.Tensor,
    predicted_depth: torch.Tensor,
    target: torch.Tensor,
    frame: PatchFrame,
    *,
    min_depth: float,
    max_depth: float,
) -> torch.Tensor:
    """Return 10 × scale-invariant log loss (λ = 0.85) + cross-entropy, over valid pixels.

    With d = log(prediction + 1 mm) − log(target + 1 mm): mean(d²) − 0.85·mean(d)². A pixel is valid
    if its depth lies in [min_depth, max_depth]; the others count in neither part.

    Args:
        logits: (B, bins, h, w) over the padded images.
        predicted_depth, target: (B, H, W) in metres.

    Returns:
        A scalar; 0 where no pixel is valid.
    """
    bins = logits.shape[1]
    valid = (target >= min_depth) & (target <= max_depth)
    if not valid.any():
        return 0.0 * (predicted_depth.sum() + logits.sum())
    difference = torch.log(predicted_depth[valid] + 1e-3) - torch.log(target[valid] + 1e-3)
    scale_invariant = difference.square().mean() - 0.85 * difference.mean().square()
    # in the padding depth is 0, unknown
    padded = frame.pad(target)[:, None]
    coarse = nn.functional.interpolate(padded, size=logits.shape[-2:], mode="nearest")[:, 0]
    labels = ((coarse - min_depth) / (max_depth - min_depth) * bins).long().clamp(0, bins - 1)
    counted = (coarse >= min_depth) & (coarse <= max_depth)
    labels = labels.masked_fill(~counted, -100)
    cross_entropy = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return 10 * scale_invariant + cross_entropy / counted.sum().clamp(min=1)


class RaptorForSemanticSegmentation(RaptorPreTrainedModel):
    """A Raptor with a linear layer on every patch token after the final norm."""

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        self.raptor = RaptorModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> SemanticSegmenterOutput:
        """Return images (B, C, H, W) of any size to the logits of every patch.

        Args:
            labels: classes (B, H, W); `semantic_loss_ignore_index` is not counted.

        Returns:
            `logits` (B, labels, h, w) on the patch grid, to be interpolated bilinearly; where the
            image had to be padded to whole patches they come at its own size (B, labels, H, W), so
            that nobody stretches the padding. `loss` where `labels` are given.

        Raises:
            ValueError: labels of another size than the images.
        """
        frame = frame_of_images(pixel_values, labels, self.config)
        outputs = self.raptor(frame.pad(pixel_values), output_hidden_states, output_attentions)
        tokens = drop_registers(outputs.last_hidden_state, self.config)
        logits = segmentation_logits(self.classifier, tokens, frame.grid)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                frame.interpolate(logits),
                labels,
                ignore_index=self.config.semantic_loss_ignore_index,
            )
        if any(frame.padding):
            logits = frame.interpolate(logits)
        return SemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RaptorForDepthEstimation(RaptorPreTrainedModel):
    """A Raptor that tells depth: [patch, cls] to a linear layer on bins of depth (DINOv2)."""

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        if not token_layout(config).num_cls:
            raise ValueError(
                "DINOv2's depth head looks at [patch, cls], and a "
                f"{config.teacher_config.model_type!r} has no cls token."
            )
        self.raptor = RaptorModel(config)
        self.classifier = nn.Linear(2 * config.hidden_size, config.depth_bins)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> DepthEstimatorOutput:
        """Return images (B, C, H, W) of any size to `predicted_depth` (B, H, W) in metres.

        Args:
            labels: depth (B, H, W) in metres, 0 where it is unknown; gives `loss` (`depth_loss`).

        Raises:
            ValueError: labels of another size than the images.
        """
        frame = frame_of_images(pixel_values, labels, self.config)
        limits = {"min_depth": self.config.min_depth, "max_depth": self.config.max_depth}
        outputs = self.raptor(frame.pad(pixel_values), output_hidden_states, output_attentions)
        tokens = drop_registers(outputs.last_hidden_state, self.config)
        logits = depth_logits(self.classifier, tokens, frame.grid)
        depth = expected_depth(logits, frame, **limits)
        loss = None if labels is None else depth_loss(logits, depth, labels, frame, **limits)
        return DepthEstimatorOutput(
            loss=loss,
            predicted_depth=depth,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def frame_of_images(
    pixel_values: torch.Tensor, labels: torch.Tensor | None, config: PreTrainedConfig
) -> PatchFrame:
    """Return the frame of images (B, C, H, W), whose labels, if there are any, must be as large."""
    expected = (pixel_values.shape[0], *pixel_values.shape[-2:])
    if labels is not None and tuple(labels.shape) != expected:
        raise ValueError(
            f"labels must have the shape (batch, height, width) of the images, {expected}; "
            f"got {tuple(labels.shape)}."
        )
    return PatchFrame.of(expected[1:], config)


class RaptorBackbone(BackboneMixin, RaptorPreTrainedModel):
    """A Raptor whose states are feature maps for a dense model: UperNet, DPT, Mask2Former, ….

    `out_features` ("stem", "stage1", … "stageL") or `out_indices` (0 … L) say after which layers,
    as in `Dinov2WithRegistersBackbone`.
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        self.raptor = RaptorModel(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> BackboneOutput:
        """Return images (B, C, H, W) to `feature_maps`, one for each of `out_features`.

        With `config.apply_layernorm` they are after the final norm. With
        `config.reshape_hidden_states` they are (B, D, h, w) on the patch grid; else cls and then
        the patches (B, 1 + h·w, D), without registers: models that take tokens drop the cls only.
        """
        wanted = self.wanted_states(output_hidden_states)
        layers = sorted({*wanted, *self.out_indices})
        outputs = self.raptor(pixel_values, layers, output_attentions)
        hidden_states = tuple(
            states if layer in wanted else None
            for layer, states in enumerate(outputs.hidden_states)
        )
        grid = patch_grid(tuple(pixel_values.shape[-2:]), self.config)
        feature_maps = []
        for index in self.out_indices:
            states = outputs.hidden_states[index]
            states = self.raptor.norm(states) if self.config.apply_layernorm else states
            tokens = drop_registers(states, self.config)
            if self.config.reshape_hidden_states:
                patches = tokens[:, -grid[0] * grid[1] :]
                tokens = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            feature_maps.append(tokens)
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=hidden_states if wanted else None,
            attentions=outputs.attentions,
        )


AUTO_CLASSES = {
    "AutoModel": RaptorModel,
    "AutoModelForImageClassification": RaptorForImageClassification,
    "AutoModelForSemanticSegmentation": RaptorForSemanticSegmentation,
    "AutoModelForDepthEstimation": RaptorForDepthEstimation,
    "AutoBackbone": RaptorBackbone,
}
for auto_class, model_class in AUTO_CLASSES.items():
    model_class.register_for_auto_class(auto_class)  # its code is saved with it

__all__ = [
    "AUTO_CLASSES",
    "RaptorBackbone",
    "RaptorBlock",
    "RaptorForDepthEstimation",
    "RaptorForImageClassification",
    "RaptorForSemanticSegmentation",
    "RaptorModel",
    "pool_tokens",
]
