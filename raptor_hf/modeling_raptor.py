"""A Raptor: a Vision Transformer made of a few blocks, each applied several times in a row.

Method: "Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941). Read downwards, this
file is the whole network; it is one long file because it travels to the Hub beside the weights.
Shapes: B images, N tokens (cls, registers, patches), D channels, L layers.
"""
# `from_teacher` is over 40 lines: half of it is signature and docstring.

import copy
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
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
from transformers.utils import can_return_tuple

from .configuration_raptor import RaptorConfig, teacher_family, token_layout


def eager_attention(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
    """Compute plain softmax attention in the form of transformers' attention interface."""
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class RaptorAttention(nn.Module):
    """Multi-head self-attention with one fused projection for query, key and value."""

    def __init__(self, config: RaptorConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attentions: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return (…, N, D) to (…, N, D); the weights (…, heads, N, N) are appended to
        `attentions`.
        """
        projected = self.qkv(hidden_states)
        tokens, sizes = projected.shape[-2], (3, self.num_heads, self.head_dim)
        # (3, batch, heads, tokens, D / heads): leading axes are made one
        stacked = projected.view(-1, tokens, *sizes).permute(2, 0, 3, 1, 4)
        query, key, value = stacked.unbind()
        # of all implementations the eager one alone tells its weights
        name = "eager" if attentions is not None else self.config._attn_implementation or "sdpa"
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        mixed, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        if attentions is not None:
            attentions.append(weights)
        return self.proj(mixed.reshape(hidden_states.shape))


class RaptorFFN(nn.Module):
    """Feed-forward branch: W₂·GELU(W₁x), or W₂·(SiLU(gate)·up) with gate and up stacked in W₁."""

    def __init__(self, config: RaptorConfig):
        super().__init__()
        self.gated = config.ffn == "swiglu"
        self.fc1 = nn.Linear(config.hidden_size, (2 if self.gated else 1) * config.ffn_size)
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return (…, N, D) to (…, N, D)."""
        hidden = self.fc1(hidden_states)
        in_place = not hidden.requires_grad  # the largest tensor of all: no second one of it
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            gate = nn.functional.silu(gate, inplace=in_place)
            return self.fc2(gate.mul_(up) if in_place else gate * up)
        gelu = torch.ops.aten.gelu_ if in_place else nn.functional.gelu
        return self.fc2(gelu(hidden))


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


class RaptorBlock(GradientCheckpointingLayer):
    """One shared block. An application makes a state one layer deeper:

    x ← x + s₁·γ₁·attention(LN₁ x);  x ← x + s₂·γ₂·ffn(LN₂ x);  x ← s₃·x

    with LayerScales γ and depth scales s(depth), which are worked out once for the whole batch.
    """

    def __init__(self, config: RaptorConfig):
        super().__init__()
        size = config.hidden_size
        self.norm1 = nn.LayerNorm(size, eps=config.block_norm_eps)
        self.attention = RaptorAttention(config)
        self.layer_scale1 = nn.Parameter(torch.full((size,), config.layerscale_value))
        self.norm2 = nn.LayerNorm(size, eps=config.block_norm_eps)
        self.ffn = RaptorFFN(config)
        self.layer_scale2 = nn.Parameter(torch.full((size,), config.layerscale_value))
        self.depth_scaling = RaptorDepthScaling(config) if config.depth_scaling else None
        self.register_buffer("folded_scales", None, persistent=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        depth: int | torch.Tensor,
        attentions: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Apply the block once.

        Args:
            hidden_states: (B, N, D), or (B, P, N, D) for P independent layers at once.
            depth: the layer that is asked for (1 … L), or a tensor (P,) of them. A tensor (1,)
                spares a compiled block from being compiled anew for another number.
            attentions: a list that the attention weights (B, heads, N, N) are appended to.

        Returns:
            The state(s) one layer deeper, in the shape of `hidden_states`.
        """
        states = hidden_states
        if isinstance(depth, int):
            depth = torch.full((1,), depth, device=states.device)
        attention_scale, ffn_scale, state_scale = self.scales(depth, states)
        mixed = self.attention(self.norm1(states), attentions)
        states = torch.addcmul(states, mixed, attention_scale)
        added = self.ffn(self.norm2(states))
        # s₃·(x + s₂·γ₂·f), with s₃·s₂·γ₂ at once: one tensor less is kept for the backward pass
        states = states if state_scale is None else states * state_scale
        return torch.addcmul(states, added, ffn_scale)

    def scales(
        self, depth: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return s₁·γ₁, s₃·s₂·γ₂ and s₃ for depths (P,), (P, 1, D) each; of the kind of `like`."""
        if self.folded_scales is not None:
            return self.folded_scales[depth][:, :, None].unbind(1)
        if self.depth_scaling is None:
            return self.layer_scale1, self.layer_scale2, None
        # where the states are, not where the weights are: these may be offloaded
        s1, s2, s3 = self.depth_scaling(depth.to(like)[:, None, None])
        return s1 * self.layer_scale1, s3 * s2 * self.layer_scale2, s3

    @torch.no_grad()
    def fold_scales(self, num_layers: int) -> None:
        """Work out the scales of all depths 0 … L once: (L + 1, 3, D), as the weights are now."""
        self.folded_scales = None
        depths = torch.arange(num_layers + 1, device=self.layer_scale1.device)
        if self.depth_scaling is not None:
            scales = [scale[:, 0] for scale in self.scales(depths, self.layer_scale1)]
            self.folded_scales = torch.stack(scales, dim=1)

    def train(self, mode: bool = True) -> "RaptorBlock":
        """Set the mode as everywhere in PyTorch; drop folded scales, as the weights will change."""
        if mode:
            self.folded_scales = None
        return super().train(mode)

    def copy_teacher_layers(self, layers: list[nn.Module]) -> None:
        """Take over the mean of the weights of some of the teacher's layers; of one: be that layer.

        Raises:
            ValueError: the layers' FFN is not of the block's kind or width, or has another
                activation.
        """
        copies = [teacher_layer_weights(layer) for layer in layers]
        gated = hasattr(layers[0].mlp, "gate_proj")
        width = copies[0]["ffn.fc2.weight"].shape[1]
        if gated != self.ffn.gated or width != self.ffn.fc2.in_features:
            raise ValueError(
                "init='teacher' needs the teacher's own FFN: expected "
                f"ffn={'swiglu' if gated else 'gelu'!r} with intermediate_size={width}, got "
                f"{'swiglu' if self.ffn.gated else 'gelu'!r} with {self.ffn.fc2.in_features}. "
                "Change ffn and intermediate_size, or start with init='random'."
            )
        _check_activation(layers[0].mlp, nn.functional.silu if gated else nn.functional.gelu)
        means = {name: torch.stack([c[name] for c in copies]).mean(0) for name in copies[0]}
        self.load_state_dict(means, strict=False)  # the depth scaling is the block's own


def _check_activation(mlp: nn.Module, own: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Refuse a teacher's FFN whose activation has other values than the block's own."""
    inputs = torch.linspace(-4, 4, 33)
    for name in ("activation_fn", "act_fn", "activation"):
        activation = getattr(mlp, name, None)
        if activation and not torch.allclose(activation(inputs), own(inputs), atol=1e-6):
            raise ValueError(
                f"init='teacher' needs the block's own activation, {own.__name__}; the teacher has "
                f"{type(activation).__name__} (hidden_act), which blocks can't compute. Start with "
                "init='random'."
            )


def teacher_layer_weights(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of one of the teacher's layers under the names of a `RaptorBlock`."""
    attention, mlp = layer.attention, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    gated = hasattr(mlp, "gate_proj")
    fc1 = [mlp.gate_proj, mlp.up_proj] if gated else [mlp.fc1]
    weights = {
        "attention.qkv.weight": torch.cat([part.weight for part in qkv]),
        "attention.qkv.bias": torch.cat(
            [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in qkv]
        ),
        "ffn.fc1.weight": torch.cat([part.weight for part in fc1]),
        "ffn.fc1.bias": torch.cat([part.bias for part in fc1]),
        "layer_scale1": layer.layer_scale1.lambda1,
        "layer_scale2": layer.layer_scale2.lambda1,
    }
    same = {
        "norm1": layer.norm1,
        "norm2": layer.norm2,
        "attention.proj": attention.o_proj,
        "ffn.fc2": mlp.down_proj if gated else mlp.fc2,
    }
    for name, part in same.items():
        weights |= {f"{name}.{key}": weight for key, weight in part.state_dict().items()}
    return weights


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

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """One black image of the teacher's size."""
        size = self.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(1, self.config.num_channels, height, width)}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw linear weights from N(0, initializer_range²); a depth scaling starts as 1 ± 1e-4."""
        if isinstance(module, RaptorDepthLinear):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RaptorBlock):
            init.constant_(module.layer_scale1, self.config.layerscale_value)
            init.constant_(module.layer_scale2, self.config.layerscale_value)


class RaptorModel(RaptorPreTrainedModel):
    """The teacher's embeddings, k shared blocks, the teacher's final norm.

    `embed`, `advance` and `norm` are the three seams; `forward` is those three in a row.
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]  # any model with a head has a backbone

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        config.check_phases()
        self.family = teacher_family(config.teacher_config)
        shell_config = copy.deepcopy(config.teacher_config)
        shell_config.num_hidden_layers = 0
        # the teacher without its layers: just its embeddings and its final norm
        self.shell = AutoModel.from_config(shell_config)
        self.shell.config = config.teacher_config  # where transformers looks for it
        self.blocks = nn.ModuleList(RaptorBlock(config) for _ in config.phases)
        self.post_init()

    @classmethod
    def from_teacher(
        cls,
        teacher: PreTrainedModel,
        phases: list[int],
        *,
        init: str = "random",
        ffn: str = "gelu",
        intermediate_size: int | None = None,
        depth_scaling: bool = True,
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
            ffn, intermediate_size, depth_scaling: see `RaptorConfig`.
            layerscale_value: where random blocks start; None takes 1e-5.
            block_norm_eps: None takes the eps of the teacher's layers.

        Raises:
            ValueError: phases that do not sum to the teacher's depth, a teacher of an unknown
                family, or `init="teacher"` with a LayerScale or another FFN than the teacher's.
        """
        if init not in ("random", "teacher"):
            raise ValueError(f"init must be 'random' or 'teacher'; got {init!r}.")
        if init == "teacher" and layerscale_value is not None:
            raise ValueError(
                f"layerscale_value={layerscale_value} contradicts init='teacher', which takes over "
                "the teacher's LayerScales. Leave it out, or start with init='random'."
            )
        if block_norm_eps is None:
            block_norm_eps = teacher.config.layer_norm_eps
        config = RaptorConfig(
            teacher_config=teacher.config,
            phases=phases,
            ffn=ffn,
            intermediate_size=intermediate_size,
            depth_scaling=depth_scaling,
            layerscale_value=1e-5 if layerscale_value is None else layerscale_value,
            block_norm_eps=block_norm_eps,
        )
        if os.path.isdir(teacher.name_or_path):  # a folder of this machine is nobody's business
            config.teacher_config.name_or_path = ""
        model = cls(config).to(teacher.dtype)
        for part in (model.family.embeddings, model.family.final_norm):
            weights = teacher.get_submodule(part).state_dict()
            model.shell.get_submodule(part).load_state_dict(weights)
        model.shell.requires_grad_(False)
        if init == "teacher":
            layers = teacher.get_submodule(model.family.layers)
            for block, (start, stop) in zip(model.blocks, config.spans(), strict=True):
                block.copy_teacher_layers(layers[start:stop])
        return model

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed images: (B, C, H, W) to the states of layer 0, (B, N, D).

        Raises:
            ValueError: not four axes, another number of channels than the teacher's, or a height or
                width that is not a multiple of the patch.
        """
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values must have the shape (batch, {channels}, height, width); "
                f"got {tuple(pixel_values.shape)}."
            )
        patch_height, patch_width = patch_sides(self.config)
        height, width = pixel_values.shape[2:]
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"Image height and width must be multiples of the patch "
                f"({patch_height}×{patch_width} pixels); got {height}×{width}. "
                "Resize or pad the images first."
            )
        return self.shell.get_submodule(self.family.embeddings)(pixel_values)

    def advance(
        self, states: torch.Tensor, depth: int, attentions: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Apply one block: (B, N, D) after layer depth − 1 to (B, N, D) after layer depth.

        The attention weights (B, heads, N, N) are appended to `attentions`, if it is given.
        """
        block = self.blocks[self.config.phase_of(depth)]
        return block(states, torch.full((1,), depth, device=states.device), attentions)

    def advance_moving(
        self, states: torch.Tensor, depth: int, moving: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply one block to the images that have not settled, the rows `moving` of (B, N, D).

        Returns:
            The states (B, N, D), and the rows that go on: all before the last phase, and in it
            those whose cls token turned by `exit_angle` or more.
        """
        before = states[moving]
        after = self.advance(before, depth)
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
            options: of `torch.compile`, such as `mode`.

        Returns:
            The model itself, in evaluation mode.
        """
        self.eval()
        for block in self.blocks:
            block.fold_scales(self.config.num_hidden_layers)
            if compile:
                block.compile(**{"fullgraph": True, **options})
        return self

    def norm(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the teacher's final norm: (B, N, D) to (B, N, D)."""
        return self.shell.get_submodule(self.family.final_norm)(states)

    def rollout(
        self, states: torch.Tensor, *, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Return the trajectory from layer `start` to layer `stop` (default L).

        Args:
            states: (B, N, D), the states after layer `start`.

        Returns:
            (B, stop − start + 1, N, D): `states` and every state after it.
        """
        stop = self.config.num_hidden_layers if stop is None else stop
        if not 0 <= start <= stop <= self.config.num_hidden_layers:
            raise ValueError(
                f"rollout needs 0 ≤ start ≤ stop ≤ {self.config.num_hidden_layers}; "
                f"got start={start}, stop={stop}."
            )
        trajectory = [states]
        for depth in range(start + 1, stop + 1):
            trajectory.append(self.advance(trajectory[-1], depth))
        return torch.stack(trajectory, dim=1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Return images (B, C, H, W) to the states of all layers.

        Returns:
            `last_hidden_state` (B, N, D) after the final norm, `pooler_output` (B, D), its cls
            token, `hidden_states`: L + 1 states (B, N, D) before the final norm, and, where they
            are asked for, `attentions`: L times (B, heads, N, N), worked out by the eager
            attention whatever the model's own is. With `config.num_applications` or
            `config.exit_angle` the states of some layers are those of the layer before.

        Raises:
            ValueError: attentions of a model with `exit_angle`, or see `embed`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        attentions = [] if output_attentions else None
        exits = self.config.exit_angle is not None
        if exits and output_attentions:
            raise ValueError("With exit_angle set, images stop early: attentions can't be told.")
        states = self.embed(pixel_values)
        hidden_states = (states,) if output_hidden_states else None
        depths = self.config.depths()
        moving = torch.arange(len(states), device=states.device) if exits else None
        for depth in range(1, self.config.num_hidden_layers + 1):
            if depth in depths and not exits:
                states = self.advance(states, depth, attentions)
            elif depth in depths and len(moving):
                states, moving = self.advance_moving(states, depth, moving)
            if output_hidden_states:
                hidden_states += (states,)
        last_hidden_state = self.norm(states)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[:, 0],
            hidden_states=hidden_states,
            attentions=tuple(attentions) if output_attentions else None,
        )


def patch_sides(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the height and width of a patch in pixels."""
    patch = config.patch_size
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def pool_tokens(last_hidden_state: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Return DINOv2's image feature: [cls, mean of patches], (B, N, D) to (B, 2·D)."""
    groups = token_layout(config).groups()
    cls, patches = last_hidden_state[:, 0], last_hidden_state[:, groups["patches"]]
    return torch.cat([cls, patches.mean(dim=1)], dim=-1)


class RaptorForImageClassification(RaptorPreTrainedModel):
    """A Raptor with DINOv2's classification head: [cls, mean of patches] to one linear layer."""

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        self.raptor = RaptorModel(config)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
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
    """Return what dense heads look at, cls and then the patches: (B, N, D) to (B, 1 + h·w, D)."""
    patches = states[:, token_layout(config).groups()["patches"]]
    return torch.cat([states[:, :1], patches], dim=1)


def segmentation_logits(
    classifier: nn.Linear, tokens: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Apply a linear layer to every patch: (B, 1 + h·w, D) to logits (B, labels, h, w)."""
    return classifier(tokens[:, 1:]).transpose(1, 2).unflatten(2, grid)


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
    size = tokens.shape[-1]
    of_patches = nn.functional.linear(tokens[:, 1:], classifier.weight[:, :size], classifier.bias)
    of_cls = nn.functional.linear(tokens[:, :1], classifier.weight[:, size:])
    logits = (of_patches + of_cls).transpose(1, 2).unflatten(2, grid)
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
        output_hidden_states: bool | None = None,
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
        self.raptor = RaptorModel(config)
        self.classifier = nn.Linear(2 * config.hidden_size, config.depth_bins)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BackboneOutput:
        """Return images (B, C, H, W) to `feature_maps`, one for each of `out_features`.

        With `config.apply_layernorm` they are after the final norm. With
        `config.reshape_hidden_states` they are (B, D, h, w) on the patch grid; else cls and then
        the patches (B, 1 + h·w, D), without registers: models that take tokens drop the cls only.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.raptor(pixel_values, True, output_attentions)
        grid = PatchFrame.of(tuple(pixel_values.shape[-2:]), self.config).grid
        feature_maps = []
        for index in self.out_indices:
            states = outputs.hidden_states[index]
            states = self.raptor.norm(states) if self.config.apply_layernorm else states
            tokens = drop_registers(states, self.config)
            if self.config.reshape_hidden_states:
                tokens = tokens[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous()
            feature_maps.append(tokens)
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
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
