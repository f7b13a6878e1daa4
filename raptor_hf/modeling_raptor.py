"""A Raptor: a Vision Transformer made of a few blocks, each applied several times in a row.

Method: "Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941). This file is the
network, `modeling_raptor_heads.py` its task heads; both travel to the Hub beside the weights.
Shapes: B images, N tokens (cls, registers, patches), D channels, L layers.
"""

import copy
import math
import os

import torch
import transformers
from torch import nn
from torch.nn.modules.module import _global_forward_hooks
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_raptor import RaptorConfig, teacher_family, token_layout

INITIALIZER_RANGE = 0.02  # standard deviation of the linear weights of a new block


def eager_attention(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
    """Compute plain softmax attention in the form of transformers' attention interface."""
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the last N' tokens of (B, heads, N, d) by angles whose cosine is (N', d).

    The angles may be of a higher precision (MLCD); the result has the precision of the states.
    """
    prefix = states.shape[-2] - cos.shape[-2]
    tokens = states[..., prefix:, :]
    first, second = tokens.chunk(2, dim=-1)
    tokens = (tokens * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)
    if prefix == 0:
        return tokens
    return torch.cat([states[..., :prefix, :], tokens], dim=-2)


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
        self.proj = nn.Linear(size, size, bias=config.has_bias("output"))
        # DINOv3 has biases for query and value only: a row for each of them
        self.some_bias = None
        if any(self.biased) and not all(self.biased):
            self.some_bias = nn.Parameter(torch.zeros(sum(self.biased), size))
        # InternVL has norms of query and key over all channels
        self.q_norm = self.k_norm = None
        if getattr(config.teacher_config, "use_qk_norm", False):
            self.q_norm = nn.RMSNorm(size, eps=1e-6)
            self.k_norm = nn.RMSNorm(size, eps=1e-6)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return query, key and value, (…, N, D) to (…, N, 3·D)."""
        projected = self.qkv(hidden_states)
        if self.some_bias is not None:
            # added afterwards, so that hooks and adapters see a plain call of `qkv`
            rows, zeros = iter(self.some_bias), torch.zeros_like(self.some_bias[0])
            bias = torch.cat([next(rows) if biased else zeros for biased in self.biased])
            projected = projected + bias.to(projected.dtype)
        if self.q_norm is not None:
            query, key, value = projected.chunk(3, dim=-1)
            projected = torch.cat([self.q_norm(query), self.k_norm(key), value], dim=-1)
        return projected

    def forward(
        self,
        hidden_states: torch.Tensor,
        attentions: list[torch.Tensor] | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return (…, N, D) to (…, N, D).

        Args:
            attentions: a list that the weights (…, heads, N, N) are appended to.
            position_embeddings: cosine and sine (N', D / heads) of rotary angles.
        """
        # leading axes are made one: (3, batch, heads, N, D / heads)
        projected = self.project(hidden_states)
        sizes = (projected.shape[-2], 3, self.num_heads, self.head_dim)
        query, key, value = projected.view(-1, *sizes).permute(2, 0, 3, 1, 4).unbind()
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)

        # only the eager implementation returns its weights
        name = self.config._attn_implementation or "sdpa"
        if attentions is not None:
            name = "eager"
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        mixed, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        if attentions is not None:
            attentions.append(weights)
        return self.proj(mixed.reshape(hidden_states.shape))


class RaptorFFN(nn.Module):
    """Feed-forward branch: W₂·φ(W₁x), or W₂·(SiLU(gate)·up) with gate and up stacked in W₁."""

    def __init__(self, config: RaptorConfig):
        super().__init__()
        sizes = config.linear_sizes()
        self.gated = config.ffn == "swiglu"
        self.fc1 = nn.Linear(*sizes["fc1"], bias=config.has_bias("fc1"))
        self.activation = None
        if config.ffn not in ("swiglu", "gelu"):
            self.activation = ACT2FN[config.ffn]
        self.fc2 = nn.Linear(*sizes["fc2"], bias=config.has_bias("fc2"))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return (…, N, D) to (…, N, D)."""
        hidden = self.fc1(hidden_states)
        # the largest tensor of all: written over where nobody else sees it, 10 % faster on a CPU
        seen = self.fc1._forward_hooks or _global_forward_hooks or "forward" in vars(self.fc1)
        private = type(self.fc1) is nn.Linear and not seen
        in_place = private and not hidden.requires_grad and not torch.compiler.is_compiling()
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            gate = nn.functional.silu(gate, inplace=in_place)
            hidden = gate.mul_(up) if in_place else gate * up
        elif self.activation is not None:
            hidden = self.activation(hidden)
        else:
            gelu = torch.ops.aten.gelu_ if in_place else nn.functional.gelu
            hidden = gelu(hidden)
        return self.fc2(hidden)


class RaptorDepthLinear(nn.Module):
    """A linear layer of the depth scaling.

    It is no `nn.Linear`, so that tools that quantise or adapt those leave factors of 1 ± 1e-4
    alone.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw U(-1, 1) for the layer that takes the depth, N(0, 1e-4²) for the other."""
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
        """Return factors of attention, FFN and output, for depths (…, 1): (…, D) each."""
        device_type = depth.device.type
        if torch.is_autocast_enabled(device_type):
            # in the precision of the weights: bfloat16 has no number between 1 and 1.0078
            with torch.autocast(device_type, enabled=False):
                return self(depth.to(self.fc1.weight.dtype))
        factors = self.fc2(nn.functional.silu(self.fc1(depth))) + 1
        return factors.unflatten(-1, (3, -1)).unbind(-2)  # unlike `chunk` a constant in ONNX


def make_norm(config: RaptorConfig) -> nn.Module:
    """Return a norm of a block."""
    norm = nn.RMSNorm if config.block_norm == "rmsnorm" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.block_norm_eps)


class RaptorBlock(GradientCheckpointingLayer):
    """One shared block. An application makes a state one layer deeper:

    x ← x + s₁·γ₁·attention(LN₁ x);  x ← x + s₂·γ₂·ffn(LN₂ x);  x ← s₃·x

    with LayerScales γ and depth scales s(depth), which are the same for the whole batch.
    """

    def __init__(self, config: RaptorConfig):
        super().__init__()
        size = config.hidden_size
        self.norm1 = make_norm(config)
        self.attention = RaptorAttention(config)
        self.layer_scale1 = nn.Parameter(torch.full((size,), config.layerscale_value))
        self.norm2 = make_norm(config)
        self.ffn = RaptorFFN(config)
        self.layer_scale2 = nn.Parameter(torch.full((size,), config.layerscale_value))
        self.depth_scaling = RaptorDepthScaling(config) if config.depth_scaling else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        depth: torch.Tensor,
        attentions: list[torch.Tensor] | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Apply the block once.

        Args:
            hidden_states: (B, N, D), or (B, P, N, D) for P layers at once.
            depth: numbers (P,) of the layers that are computed, 1 … L. It is a tensor, as a
                compiled block would be compiled anew for another number.
            attentions: a list that the attention weights (B, heads, N, N) are appended to.
            position_embeddings: cosine and sine of rotary angles, in families that have them.

        Returns:
            The state(s) one layer deeper, in the shape of `hidden_states`.
        """
        s_attention, s_ffn, s_state = self.scales(depth, hidden_states)
        mixed = self.attention(self.norm1(hidden_states), attentions, position_embeddings)
        states = torch.addcmul(hidden_states, mixed, s_attention)
        added = self.ffn(self.norm2(states))
        # s₃·(x + s₂·γ₂·f), with s₃·s₂·γ₂ at once: one tensor less is kept for the backward pass
        if s_state is not None:
            states = states * s_state
        return torch.addcmul(states, added, s_ffn)

    def scales(
        self, depth: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return s₁·γ₁, s₃·s₂·γ₂ and s₃ at depths (P,), in the device and dtype of `like`.

        They are (P, 1, D); without depth scaling they are γ₁, γ₂ and None.
        """
        if self.depth_scaling is None:
            return self.layer_scale1, self.layer_scale2, None
        s1, s2, s3 = self.depth_scaling(depth.to(like)[:, None, None])
        return s1 * self.layer_scale1, s3 * s2 * self.layer_scale2, s3


class RaptorPreTrainedModel(PreTrainedModel):
    """Settings, initial weights, loading and saving of every Raptor."""

    config_class = RaptorConfig
    base_model_prefix = "raptor"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the Trainer: losses are means over a batch
    _no_split_modules = ["RaptorBlock"]  # transformers adds the embeddings of the shell
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load as everywhere in transformers, but from safetensors only, never from a pickle."""
        return super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})

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
        """Save as everywhere in transformers, with the code of all Raptors for the Auto classes.

        transformers itself would only write down the Auto class of the model that is saved, and
        `AutoModel` would not find the backbone of a classifier.
        """
        # imported here, as it imports this file; so transformers copies both files
        from .modeling_raptor_heads import AUTO_CLASSES

        auto_map = {"AutoConfig": "configuration_raptor.RaptorConfig"}
        for name, model_class in AUTO_CLASSES.items():
            module = model_class.__module__.split(".")[-1]
            auto_map[name] = f"{module}.{model_class.__name__}"
        self.config.auto_map = auto_map
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the teacher's patch embedding."""
        shell = self.base_model.shell
        if shell.config.model_type == "radio":  # transformers does not find it there
            return shell.embeddings.patch_projection
        return shell.get_input_embeddings()

    def wanted_states(self, output_hidden_states: bool | int | list[int] | None) -> set[int]:
        """Return the layers (0 … L) whose states are asked for; None: as the configuration says."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        number = self.config.num_hidden_layers + 1
        if output_hidden_states is None or output_hidden_states is False:
            return set()
        if output_hidden_states is True:
            return set(range(number))
        layers = output_hidden_states
        if isinstance(layers, int):
            layers = [layers]
        return {layer % number for layer in layers if -number <= layer < number}

    def trajectory(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return images (B, C, H, W) to the states of all layers, (B, L + 1, N, D)."""
        outputs = self.base_model(pixel_values, output_hidden_states=True)
        return torch.stack(outputs.hidden_states, dim=1)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw linear weights from N(0, 0.02²); a depth scaling starts as 1 ± 1e-4."""
        if isinstance(module, RaptorDepthLinear):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=INITIALIZER_RANGE)
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


class RaptorModel(RaptorPreTrainedModel):
    """The teacher's embeddings, k shared blocks, the teacher's final norm.

    `embed`, `advance` and `norm` are the three seams; `forward` is those three in a row.
    `raptor_hf.make_raptor` makes one of a teacher.
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]  # any model with a head has a backbone

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        config.check_values()  # `from_pretrained` sets its overrides after the constructor
        self.family = teacher_family(config.teacher_config)
        self.shell = make_shell(config.teacher_config)
        self.phases = list(config.phases)
        self.blocks = nn.ModuleList(RaptorBlock(config) for _ in config.phases)
        self._cuda_graphs = False  # whether a forward overwrites the states of the one before
        self.post_init()

    def train(self, mode: bool = True) -> "RaptorModel":
        """Set the mode of the blocks; the teacher's embeddings stay in evaluation mode."""
        super().train(mode)
        self.shell.eval()  # in training DINOv3 draws other positions, and others drop tokens
        return self

    def embed(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed images: (B, C, H, W) to the states of layer 0, (B, N, D).

        Images are converted to the dtype of the weights.

        Args:
            bool_masked_pos: (B, patches), true where the teacher's mask token replaces a patch, in
                families that have one.

        Raises:
            ValueError: a height or width that is not a multiple of the patch, or another size than
                the teacher's where its family takes no other.
        """
        # sizes that the teacher does not take
        patch_height, patch_width = pair(self.config.patch_size)
        height, width = pixel_values.shape[2:]
        native = (height, width) == pair(self.config.image_size)  # SigLIP: 384 with patches of 14
        if not native and (height % patch_height or width % patch_width):
            raise ValueError(
                f"Image height and width must be multiples of the patch "
                f"({patch_height}×{patch_width} pixels); got {height}×{width}. "
                "Resize or pad the images first."
            )

        # the teacher's embeddings
        arguments = image_arguments(self.config.teacher_config, pixel_values)
        if bool_masked_pos is not None:
            arguments["bool_masked_pos"] = bool_masked_pos
        states = pixel_values.to(next(self.shell.parameters()).dtype)
        for path in self.family.embeddings:
            options = arguments if path == "embeddings" else {}  # others are norms
            states = self.shell.get_submodule(path)(states, **options)
        if isinstance(states, tuple):  # MAE's mask comes with them
            return states[0]
        return states

    def position_embeddings(
        self, states: torch.Tensor, image_size: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return cosine and sine (N', D / heads) of the rotary angles of states (B, N, D).

        None for families without rotary angles.

        Args:
            image_size: height and width of the images in pixels; default: the teacher's own.

        Raises:
            ValueError: images of that size have another number of tokens.
        """
        if self.config.teacher_config.model_type not in ROTARY_ANGLES:
            return None
        size = tuple(image_size or pair(self.config.image_size))
        rows, columns = patch_grid(size, self.config)
        expected = token_layout(self.config).num_prefix_tokens + rows * columns
        if states.shape[-2] != expected:
            raise ValueError(
                f"Images of {size[0]}×{size[1]} pixels have {expected} tokens; the states have "
                f"{states.shape[-2]}. Give the height and width of their images (image_size)."
            )
        return rotary_angles(self.shell, size, states)

    def advance(
        self,
        states: torch.Tensor,
        depth: int,
        attentions: list[torch.Tensor] | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Apply one block: (B, N, D) after layer depth − 1 to (B, N, D) after layer depth.

        Arguments as of a block; rotary angles are those of the teacher's own size by default.
        """
        block = self.blocks[self.config.phase_of(depth)]
        if position_embeddings is None:
            position_embeddings = self.position_embeddings(states)
        depth = torch.full((1,), depth, device=states.device)
        return block(states, depth, attentions, position_embeddings)

    def norm(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the teacher's final norm, if it has one: (B, N, D) to (B, N, D)."""
        if self.family.final_norm is None:
            return states
        return self.shell.get_submodule(self.family.final_norm)(states)

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
            states: (B, N, D), the states after layer `start`; they come first in the result.
            image_size: height and width of the images in pixels, see `position_embeddings`.
        """
        if stop is None:
            stop = self.config.num_hidden_layers
        if not 0 <= start <= stop <= self.config.num_hidden_layers:
            raise ValueError(
                f"rollout needs 0 ≤ start ≤ stop ≤ {self.config.num_hidden_layers}; "
                f"got start={start}, stop={stop}."
            )
        # the angles are those of all layers
        self._begin_rollout()
        angles = self.position_embeddings(states, image_size)
        trajectory = [states]
        for depth in range(start + 1, stop + 1):
            states = self.advance(states, depth, position_embeddings=angles)
            trajectory.append(self._kept(states))
        return torch.stack(trajectory, dim=1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool = True,
        bool_masked_pos: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Return images (B, C, H, W) to the state after the last layer.

        Args:
            output_hidden_states: as everywhere in transformers; with numbers of layers (0 … L,
                negative ones count from the end) the states of the others are None.
            interpolate_pos_encoding: accepted as in teachers; positions are always interpolated.
            bool_masked_pos: as of `embed`.

        Returns:
            `last_hidden_state` (B, N, D) after the final norm; `pooler_output` (B, D), its cls
            token, if there is one; on request `hidden_states`, L + 1 states (B, N, D) before the
            final norm, and `attentions`, one (B, heads, N, N) for each application, computed by
            the eager attention whatever the model's own is. With `config.num_applications` all
            states after that layer are the state of that layer.

        Raises:
            ValueError: see `embed`; or wrong values that were set in the configuration.
        """
        self.config.check_values()
        if self.config.phases != self.phases:
            raise ValueError(
                f"The blocks were made for phases={self.phases}; the configuration has "
                f"{self.config.phases}."
            )
        wanted = self.wanted_states(output_hidden_states)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        attentions = [] if output_attentions else None

        # embed
        self._begin_rollout()
        states = self.embed(pixel_values, bool_masked_pos)
        angles = self.position_embeddings(states, tuple(pixel_values.shape[-2:]))
        hidden_states = [states if 0 in wanted else None]

        # advance, layer by layer
        last = self.config.num_applications or self.config.num_hidden_layers
        for depth in range(1, self.config.num_hidden_layers + 1):
            if depth <= last:
                states = self.advance(states, depth, attentions, angles)
            hidden_states.append(self._kept(states) if depth in wanted else None)

        # norm
        last_hidden_state = self.norm(self._kept(states))
        has_cls = token_layout(self.config).num_cls > 0
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[:, 0] if has_cls else None,
            hidden_states=tuple(hidden_states) if wanted else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def compile_blocks(self, **options) -> "RaptorModel":
        """Compile a block once for all its applications; return the model in evaluation mode.

        That takes a fraction of the time that the unrolled model takes to compile.

        Args:
            options: of `torch.compile`. `mode="reduce-overhead"` replays CUDA graphs, which is
                faster for few images; `"max-autotune"` also tries kernels, for minutes.
        """
        graphs = options.get("options", {}).get("triton.cudagraphs", False)
        self._cuda_graphs = graphs or options.get("mode") in ("reduce-overhead", "max-autotune")
        for block in self.blocks:
            block.compile(**{"fullgraph": True, **options})
        return self.eval()

    def _begin_rollout(self) -> None:
        """Let CUDA graphs, if there are any, overwrite the states of the rollout before."""
        if self._cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def _kept(self, states: torch.Tensor) -> torch.Tensor:
        """Return states of a rollout that the next one leaves alone."""
        return states.clone() if self._cuda_graphs else states


def make_shell(teacher_config: PreTrainedConfig) -> PreTrainedModel:
    """Make a teacher without layers: its embeddings, its final norm, its rotary angles."""
    shell = bare_teacher(teacher_config, num_layers=0)
    # an encoder without weights has no device, which some tools ask every module for
    encoder = teacher_family(teacher_config).layers.rpartition(".")[0]
    if encoder:
        setattr(shell, encoder, None)
    return shell


def bare_teacher(teacher_config: PreTrainedConfig, num_layers: int) -> PreTrainedModel:
    """Make a teacher with so many layers, without the heads that no state needs.

    Its weights are random, in torch's default dtype, whatever the configuration says.
    """
    family = teacher_family(teacher_config)
    config = copy.deepcopy(teacher_config)
    for name, value in ({"num_hidden_layers": num_layers} | family.shell).items():
        setattr(config, name, value)
    if num_layers == 0:
        config._attn_implementation = "eager"  # no attention, so that no other is asked for
    # `AutoModel` does not know every family
    dtype = torch.get_default_dtype()
    if family.model_class:
        model = getattr(transformers, family.model_class)._from_config(config, dtype=dtype)
    else:
        model = AutoModel.from_config(config, dtype=dtype)
    model.eval()  # a new model is in training mode
    model.config = teacher_config  # where transformers looks for it
    # no state needs these
    for head in ("pooler", "head"):
        if getattr(model, head, None) is not None:
            setattr(model, head, None)
    return model


def _dinov3_angles(
    model: PreTrainedModel, image_size: tuple[int, int], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the angles of the patches; it reads size, dtype and device off an empty image."""
    return model.rope_embeddings(like.new_empty(1, 1, *image_size))


def _mlcd_angles(
    model: PreTrainedModel, image_size: tuple[int, int], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the angles of the cls token, which are learned, and of the patches."""
    rows, columns = patch_grid(image_size, model.config)
    positions = torch.cartesian_prod(
        torch.arange(rows, device=like.device), torch.arange(columns, device=like.device)
    )
    cos, sin = model.vision_rotary_embedding(like, positions)
    of_cls = model.class_pos_emb.repeat(1, 2)
    return torch.cat([of_cls.cos(), cos]), torch.cat([of_cls.sin(), sin])


# by `model_type`; all other families add their positions to the embeddings
ROTARY_ANGLES = {"dinov3_vit": _dinov3_angles, "mlcd_vision_model": _mlcd_angles}


def rotary_angles(
    model: PreTrainedModel, image_size: tuple[int, int], like: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return cosine and sine (N', D / heads) of a teacher's rotary angles; None: it has none.

    They have the device and dtype of `like`, states, or of the weights.
    """
    angles = ROTARY_ANGLES.get(model.config.model_type)
    if angles is None:
        return None
    if like is None:
        like = next(model.parameters())
    return angles(model, image_size, like)


def image_arguments(teacher_config: PreTrainedConfig, pixel_values: torch.Tensor) -> dict:
    """Return the extra keyword arguments of a teacher's forward, and of its embeddings.

    A ValueError refuses images of another size, in a family that takes no other.
    """
    family, arguments = teacher_family(teacher_config), {}
    # another size than the teacher's own
    native = pair(getattr(teacher_config, "image_size", None) or pixel_values.shape[-2:])
    if family.resizing != "always" and tuple(pixel_values.shape[-2:]) != native:
        if family.resizing == "never":
            raise ValueError(
                f"A {teacher_config.model_type!r} takes images of {native[0]}×{native[1]} pixels "
                f"alone: it can't interpolate its positions; got {tuple(pixel_values.shape[-2:])}."
            )
        arguments["interpolate_pos_encoding"] = True

    # MAE sorts the patches by this noise: in order, it leaves them where they are
    if family.masks:
        number = math.prod(patch_grid(tuple(pixel_values.shape[-2:]), teacher_config))
        order = torch.arange(number, device=pixel_values.device)
        arguments["noise"] = order.expand(len(pixel_values), number)
    return arguments


def pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a size that may be given as one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def patch_grid(size: tuple[int, int], config: PreTrainedConfig) -> tuple[int, int]:
    """Return how many rows and columns of patches an image of `size` (height, width) has.

    Pixels that are left over at the edges, where the teacher's own size is no multiple of the
    patch (SigLIP), are not looked at.
    """
    sides = pair(config.patch_size)
    return size[0] // sides[0], size[1] // sides[1]
