"""Read checkpoints of the reference code without running anything in them.

The published files are pickled modules of the class `raptor.Raptor`, and loading a pickle can run
any code. Here the few classes that a checkpoint of the reference needs are replaced by stubs, and a
file that names any other class is refused.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from ..weights import load_weights

_CLASSES = (
    "raptor.Raptor",
    "block.Block",
    "block.LayerScale",
    "block.SwiGLU",
    "torch.nn.modules.activation.GELU",
    "torch.nn.modules.activation.MultiheadAttention",
    "torch.nn.modules.activation.SiLU",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
    "torch.nn.modules.normalization.LayerNorm",
)
# names of a block's weights in the reference, and in `RaptorBlock`; each is a weight and a bias
_NAMES = {"ls1.gamma": "layer_scale1", "ls2.gamma": "layer_scale2"}
for theirs, ours in {
    "norm1.": "norm1.",
    "attn.in_proj_": "attention.qkv.",
    "attn.out_proj.": "attention.proj.",
    "norm2.": "norm2.",
    "mlp.0.": "ffn.fc1.",
    "mlp.2.": "ffn.fc2.",
    "t_proj.0.": "depth_scaling.fc1.",
    "t_proj.2.": "depth_scaling.fc2.",
}.items():
    _NAMES |= {theirs + kind: ours + kind for kind in ("weight", "bias")}


class _Stub:
    """An object with attributes and no behaviour, in place of a pickled module."""


STUBS = [(type(name, (_Stub,), {}), name) for name in _CLASSES]


class ReferenceModel(NamedTuple):
    """A whole model of the reference; a plain state dict tells no thresholds and no heads."""

    blocks: list[dict[str, torch.Tensor]]  # by the names of `RaptorBlock`
    options: dict  # of `make_raptor`, shared by all blocks
    thresholds: list[int] | None  # layers after which the next block begins
    num_heads: int | None


def read_checkpoint(path: str | Path) -> ReferenceModel:
    """Read a pickled model or a state dict (`.pt`, `.pth`, `.safetensors`) of the reference.

    Raises:
        ValueError: a broken file, a pickle that names another class (it is not run), or contents
            other than a whole model of the reference.
    """
    # a pickled model says more of itself than a state dict
    content = load_weights(path, STUBS)
    weights, facts = content, {}
    if isinstance(content, _Stub):
        try:
            weights, facts = _stub_weights(content), _stub_facts(content)
        except (AttributeError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not built like a raptor.Raptor: {error!r}.") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{path} must hold a model or its state dict; got {type(content)}.")

    # sort the weights by block
    blocks: dict[int, dict] = {}
    for name, weight in weights.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", str(name))
        if match is None or not torch.is_tensor(weight):
            raise ValueError(
                f"{path} must hold tensors with names like blocks.0.norm1.weight; got {name!r}. "
                "Single blocks of stage 1 can't be converted, only whole models."
            )
        blocks.setdefault(int(match[1]), {})[match[2]] = weight
    if not blocks or sorted(blocks) != list(range(len(blocks))):
        raise ValueError(f"{path} must hold the blocks 0, 1, …; got {sorted(blocks)}.")
    renamed = [_rename(blocks[number]) for number in sorted(blocks)]

    # one configuration serves all blocks
    options = _block_options(renamed[0])
    claimed = {name: facts.get(name, value) for name, value in options.items()}
    found = [_block_options(block) for block in renamed]
    if any(other != options for other in [*found, claimed]):
        raise ValueError(
            f"All blocks of {path} must be built alike; got {found}, and of the model {claimed}."
        )
    options["block_norm_eps"] = facts.get("eps", 1e-5)
    return ReferenceModel(renamed, options, facts.get("thresholds"), facts.get("num_heads"))


def _stub_weights(stub: _Stub, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the state dict of a pickled module."""
    weights = {}
    for kind in ("_parameters", "_buffers"):
        for name, weight in vars(stub).get(kind, {}).items():
            if weight is not None:
                weights[prefix + name] = weight.detach()
    for name, part in vars(stub).get("_modules", {}).items():
        if part is not None:
            weights |= _stub_weights(part, f"{prefix}{name}.")
    return weights


def _stub_facts(stub: _Stub) -> dict:
    """Return what a pickled model says besides its weights: thresholds, options of its blocks."""
    # where the next block begins
    thresholds = list(stub.thresholds)
    whole = all(type(layer) is int for layer in thresholds)
    if not whole or sorted({0, *thresholds}) != [0, *thresholds]:
        raise ValueError(f"thresholds must be growing layers, like [7, 10]; got {thresholds}.")
    # one entry for each LayerNorm of each block
    facts = []
    for block in stub._modules["blocks"]._modules.values():
        parts = block._modules
        activation = parts["mlp"]._modules["1"]
        kind = type(activation).__name__.rpartition(".")[2]
        if kind not in ("GELU", "SwiGLU") or getattr(activation, "approximate", "none") != "none":
            raise ValueError(f"The FFN of a block must be an exact GELU or SwiGLU; got {kind}.")
        same = {"ffn": kind.lower(), "depth_scaling": bool(block.t_scale)}
        same["num_heads"] = parts["attn"].num_heads
        facts += [{**same, "eps": parts[norm].eps} for norm in ("norm1", "norm2")]
    if any(other != facts[0] for other in facts):
        raise ValueError(f"All blocks must share heads, FFN and LayerNorm eps; got {facts}.")
    return {"thresholds": thresholds, **facts[0]}


def _rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a block's weights by our names; LayerScales that it lacks are 1."""
    unknown = sorted(set(weights) - set(_NAMES))
    optional = {name for name in _NAMES if name.startswith(("ls", "t_proj"))}
    missing = sorted(set(_NAMES) - optional - set(weights))
    if unknown or missing:
        raise ValueError(
            f"A block of the reference has the weights {', '.join(_NAMES)}; unknown: "
            f"{unknown[:5]}, missing: {missing}."
        )
    renamed = {_NAMES[name]: weight.float() for name, weight in weights.items()}
    for name in ("layer_scale1", "layer_scale2"):
        renamed.setdefault(name, torch.ones_like(renamed["norm1.weight"]))
    return renamed


def _block_options(weights: dict[str, torch.Tensor]) -> dict:
    """Read options of `make_raptor` off the shapes of a block's weights."""
    inner, width = weights["ffn.fc1.weight"].shape[0], weights["ffn.fc2.weight"].shape[1]
    if inner not in (width, 2 * width):
        raise ValueError(f"An FFN must be D→H→D (GELU) or D→2·H→D (SwiGLU); got {inner}, {width}.")
    return {
        "ffn": "gelu" if inner == width else "swiglu",
        "intermediate_size": width,
        "depth_scaling": "depth_scaling.fc1.weight" in weights,
    }
