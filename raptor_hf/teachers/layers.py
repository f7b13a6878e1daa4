"""Where the layers of each family of teachers keep their weights, and blocks that copy them."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_raptor import RaptorConfig, teacher_family
from ..modeling_raptor import RaptorBlock


class LayerParts(NamedTuple):
    """Paths of the parts of a teacher's layer, from the layer on."""

    # norms of the attention and of the FFN
    norms: tuple[str, str] = ("norm1", "norm2")
    # projections to query, key and value, and the output projection
    attention: tuple[str, str, str, str] = tuple(f"attention.{name}_proj" for name in "qkvo")
    # a layer has an FFN without a gate, or gate, up and down
    ffn: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    gated_ffn: tuple[str, str, str] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    # LayerScales of the attention and of the FFN; a layer without them counts as ones
    scales: tuple[str, str] = ("layer_scale1.lambda1", "layer_scale2.lambda1")
    # norms of query and key over all channels; a layer may have none
    qk_norms: tuple[str, str] = ("attention.q_norm", "attention.k_norm")
    # name of the norms' eps in the configuration
    eps: str = "layer_norm_eps"


_VIT = LayerParts(norms=("layernorm_before", "layernorm_after"))
_CLIP = LayerParts(
    norms=("layer_norm1", "layer_norm2"),
    attention=tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
)
# by `model_type` of the configuration, where they differ from those of a DINOv2
LAYER_PARTS = {
    "dinov3_vit": LayerParts(ffn=("mlp.up_proj", "mlp.down_proj")),
    "vit": _VIT,
    "deit": _VIT,
    "vit_msn": _VIT,
    "vit_mae": _VIT,
    "ijepa": _VIT,
    "clip_vision_model": _CLIP,
    "metaclip_2_vision_model": _CLIP,
    "chinese_clip_vision_model": _CLIP,
    "mlcd_vision_model": _CLIP,
    "siglip_vision_model": _CLIP,
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
}


def layer_parts(teacher_config: PreTrainedConfig) -> LayerParts:
    """Return where the layers of a teacher keep their weights."""
    return LAYER_PARTS.get(teacher_config.model_type, LayerParts())


def find_part(module: nn.Module, path: str) -> object | None:
    """Return the attribute at a path below a module, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def linear_layers(layer: nn.Module, parts: LayerParts) -> dict[str, nn.Module]:
    """Return the linear layers of a teacher's layer, by the names in `RaptorConfig.biases`."""
    paths = dict(zip(("query", "key", "value", "output"), parts.attention, strict=True))
    if find_part(layer, parts.gated_ffn[0]) is not None:
        paths |= dict(zip(("gate", "fc1", "fc2"), parts.gated_ffn, strict=True))
    else:
        paths |= dict(zip(("fc1", "fc2"), parts.ffn, strict=True))
    return {name: layer.get_submodule(path) for name, path in paths.items()}


def teacher_layer_weights(layer: nn.Module, parts: LayerParts) -> dict[str, torch.Tensor]:
    """Return the weights of one of the teacher's layers under the names of a `RaptorBlock`."""
    linear = linear_layers(layer, parts)
    attention = [linear[name] for name in ("query", "key", "value")]
    first = [linear[name] for name in ("gate", "fc1") if name in linear]
    weights = {
        "attention.qkv.weight": torch.cat([part.weight for part in attention]),
        "ffn.fc1.weight": torch.cat([part.weight for part in first]),
    }

    # biases: a block keeps those of query, key and value together where all of them have one
    biases = [part.bias for part in attention if part.bias is not None]
    if len(biases) == 3:
        weights["attention.qkv.bias"] = torch.cat(biases)
    elif biases:
        weights["attention.some_bias"] = torch.stack(biases)
    if first[0].bias is not None:
        weights["ffn.fc1.bias"] = torch.cat([part.bias for part in first])

    # LayerScales: ones where the teacher has none
    for number, path in enumerate(parts.scales, start=1):
        scale = find_part(layer, path)
        if scale is None:
            scale = torch.ones_like(linear["output"].weight[0])
        weights[f"layer_scale{number}"] = scale

    # parts that a block has just so
    same = {
        "norm1": layer.get_submodule(parts.norms[0]),
        "norm2": layer.get_submodule(parts.norms[1]),
        "attention.proj": linear["output"],
        "attention.q_norm": find_part(layer, parts.qk_norms[0]),
        "attention.k_norm": find_part(layer, parts.qk_norms[1]),
        "ffn.fc2": linear["fc2"],
    }
    for name, part in same.items():
        if part is not None:
            weights |= {f"{name}.{key}": weight for key, weight in part.state_dict().items()}
    return weights


def config_for_teacher(teacher: PreTrainedModel, phases: list[int], **changes) -> RaptorConfig:
    """Return the configuration of blocks like the layers of a teacher.

    Args:
        changes: fields of `RaptorConfig` that differ; None keeps the teacher's own.
    """
    parts = layer_parts(teacher.config)
    layer = teacher.get_submodule(teacher_family(teacher.config).layers)[0]
    # off the first layer: they are all alike
    linear = linear_layers(layer, parts)
    biases = [name for name, part in linear.items() if part.bias is not None and name != "gate"]
    fields = {
        "ffn": "swiglu" if "gate" in linear else teacher.config.hidden_act,
        "intermediate_size": linear["fc2"].weight.shape[1],
        "block_norm": "rmsnorm",
        "block_norm_eps": getattr(teacher.config, parts.eps),
        "biases": biases,
    }
    if getattr(layer.get_submodule(parts.norms[0]), "bias", None) is not None:
        fields["block_norm"] = "layernorm"
    if len(biases) == 6:
        fields["biases"] = None  # all

    # of a backbone: its feature maps
    for name in ("out_indices", "apply_layernorm", "reshape_hidden_states"):
        if hasattr(teacher.config, name):
            fields[name] = getattr(teacher.config, name)
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes.get("ffn", fields["ffn"]) != fields["ffn"]:
        fields["intermediate_size"] = None  # the width that suits the other kind
    return RaptorConfig(teacher_config=teacher.config, phases=phases, **(fields | changes))


def copy_mean_of_layers(block: RaptorBlock, layers: list[nn.Module], parts: LayerParts) -> None:
    """Set the weights of a block to the mean of some of the teacher's layers.

    The depth scaling stays as it is: a teacher has none.

    Raises:
        ValueError: the layers are not of the block's kind or width.
    """
    copies = [teacher_layer_weights(layer, parts) for layer in layers]
    means = {name: torch.stack([copy[name] for copy in copies]).mean(0) for name in copies[0]}
    # the block must have the same weights
    unlike = []
    for name, weight in block.state_dict().items():
        scaling = name.startswith("depth_scaling.")
        if not scaling and (name not in means or means[name].shape != weight.shape):
            unlike.append(name)
    if unlike:
        raise ValueError(
            "init='teacher' needs blocks like the teacher's layers, with an FFN of width "
            f"{means['ffn.fc2.weight'].shape[1]}; these differ in {unlike[:4]}. Leave ffn and "
            "intermediate_size out, or start with init='random'."
        )
    block.load_state_dict(means, strict=False)
