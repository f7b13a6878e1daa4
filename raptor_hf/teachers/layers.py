"""Where the layers of every family of teachers keep their weights, and how blocks copy them."""

import itertools
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_raptor import RaptorConfig, teacher_family
from ..modeling_raptor import RaptorBlock, expert_runs, find_part


class LayerParts(NamedTuple):
    """Where a layer of a teacher keeps its parts: paths from the layer on.

    Args:
        norms: of the attention and of the FFN.
        attention: what projects to query, key and value (one path where it is one layer), and the
            output.
        ffn: the two linear layers of an FFN without a gate.
        gated_ffn: gate, up and down of one with a gate; a layer has either.
        scales: LayerScales of the attention and of the FFN; a layer without them counts as ones.
        position_bias: a table of relative positions, added to the attention; a layer may have none.
        qk_norms: norms of query and key over all channels; a layer may have none.
        eps: name of the norms' eps in the configuration.
    """

    norms: tuple[str, str] = ("norm1", "norm2")
    attention: tuple[str, ...] = tuple(f"attention.{name}_proj" for name in "qkvo")
    ffn: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    gated_ffn: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    scales: tuple[str, str] = ("layer_scale1.lambda1", "layer_scale2.lambda1")
    position_bias: str = "relative_position_bias"
    qk_norms: tuple[str, str] = ("attention.q_norm", "attention.k_norm")
    eps: str = "layer_norm_eps"


_VIT = LayerParts(norms=("layernorm_before", "layernorm_after"))
_CLIP = LayerParts(
    norms=("layer_norm1", "layer_norm2"),
    attention=tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
)
_BEIT = _VIT._replace(scales=("lambda_1", "lambda_2"))
# by `model_type` of the configuration, where they are not those of a DINOv2
LAYER_PARTS = {
    "dinov3_vit": LayerParts(ffn=("mlp.up_proj", "mlp.down_proj")),
    **dict.fromkeys(("vit", "deit", "vit_msn", "vit_mae", "ijepa"), _VIT),
    "beit": _BEIT,
    "data2vec-vision": _BEIT._replace(
        attention=(
            *(f"attention.attention.{name}" for name in ("query", "key", "value")),
            "attention.output.dense",
        ),
        ffn=("intermediate.dense", "output.dense"),
        position_bias="attention.attention.relative_position_bias",
    ),
    **dict.fromkeys(
        (
            "clip_vision_model",
            "metaclip_2_vision_model",
            "chinese_clip_vision_model",
            "mlcd_vision_model",
            "siglip_vision_model",
        ),
        _CLIP,
    ),
    "aimv2_vision_model": LayerParts(
        norms=("rms_norm1", "rms_norm2"),
        attention=tuple(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),
        gated_ffn=("ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"),
        eps="rms_norm_eps",
    ),
    "internvl_vision": _VIT._replace(
        attention=(*(f"attention.{name}_proj" for name in "qkv"), "attention.projection_layer"),
        scales=("lambda_1", "lambda_2"),
    ),
    "timm_wrapper": LayerParts(
        attention=("attn.qkv", "attn.proj"),
        scales=("ls1.gamma", "ls2.gamma"),
        qk_norms=("attn.q_norm", "attn.k_norm"),
    ),
}


def layer_parts(teacher_config: PreTrainedConfig) -> LayerParts:
    """Return where the layers of a teacher keep their weights."""
    return LAYER_PARTS.get(teacher_config.model_type, LayerParts())


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
    parts, layer = layer_parts(teacher.config), teacher.get_submodule(family.layers)[0]
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
        "block_norm_eps": getattr(teacher.config, parts.eps),
        "biases": None if len(biases) == len(linear) else biases,
        # a norm of each head, as in models of timm, is narrower: blocks have none of that kind
        "qk_norm": len(weights.get("attention.q_norm.weight", ())) == teacher.config.hidden_size,
        "position_bias": any(name.startswith("position_bias.") for name in weights),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes.get("ffn", fields["ffn"]) != fields["ffn"]:
        fields["intermediate_size"] = None  # the width that suits the other kind
    return RaptorConfig(teacher_config=teacher.config, phases=phases, **(fields | changes))


def copy_teacher_layers(block: RaptorBlock, layers: list[nn.Module], parts: LayerParts) -> None:
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
        name: weight.shape[1:] if block.has_experts and name.startswith("ffn.") else weight.shape
        for name, weight in block.state_dict().items()
        if not name.startswith(("depth_scaling.", "corrections.", "expert_shares"))
    }
    if own != theirs:
        gated, width = is_gated(layers[0], parts), theirs["ffn.fc2.weight"][1]
        missing = sorted(own.keys() ^ theirs.keys())
        raise ValueError(
            "init='teacher' needs blocks like the teacher's layers, whose FFN is "
            f"{'gated (swiglu)' if gated else 'not gated'} and has "
            f"intermediate_size={width}; these have {'swiglu' if block.ffn.gated else 'no gate'}"
            f" and {block.ffn.fc2.in_features}"
            f"{f', and only one of the two has {missing[:4]}' if missing else ''}. "
            "Leave ffn and intermediate_size out, or start with init='random'."
        )
    start_from(block, copies)


def start_from(block: RaptorBlock, copies: list[dict[str, torch.Tensor]]) -> None:
    """Take over the mean of layers; an expert takes the mean of the layers whose own it is.

    Args:
        copies: of `teacher_layer_weights`, a layer of the block's span each.
    """

    def mean(layers: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
        return torch.stack([layer[name] for layer in layers]).mean(0)

    means = {name: mean(copies, name) for name in copies[0]}
    if block.has_experts:
        own = expert_runs(len(copies), block.expert_shares.shape[1]).T.tolist()
        runs = [list(itertools.compress(copies, expert)) for expert in own]
        for name in (name for name in means if name.startswith("ffn.")):
            means[name] = torch.stack([mean(run, name) for run in runs])
    # the depth scaling, and what a layer changes, are the block's own
    block.load_state_dict(means, strict=False)
