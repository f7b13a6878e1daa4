"""A Raptor: a Vision Transformer made of a few blocks, each applied several times in a row.

Method: "Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941). Read downwards, this
file is the whole network; it is one long file because it travels to the Hub beside the weights.
Shapes: B images, N tokens (cls, registers, patches), D channels, L layers.
"""

import copy
import math
import os
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_raptor import (
    RaptorConfig,
    teacher_family,
    token_layout,
)

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
        from .modeling_raptor_heads import AUTO_CLASSES  # which imports this file

        models = {
            name: f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
            for name, cls in AUTO_CLASSES.items()
        }
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


def first_offloaded(model: nn.Module) -> str | None:
    """Return the name of the first weight that is not in memory but on the meta device, if any."""
    return next((name for name, weight in model.named_parameters() if weight.is_meta), None)


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


__all__ = ["RaptorBlock", "RaptorModel", "RaptorPreTrainedModel"]
