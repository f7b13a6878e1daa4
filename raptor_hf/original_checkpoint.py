"""Checkpoints of the reference code, read without running anything of them.

The published files are whole pickled modules of the classes `raptor.Raptor` and `block.Block`, and
a pickle can run anything when it is loaded. Here it is read with stand-ins for the few classes that
a checkpoint of the reference names, fixed below; a file that names any other class is refused.
"""

import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch

from .weights import BROKEN, load_tensors

_ORIGINAL_EPS = 1e-5  # of the blocks' LayerNorms where a file does not say

# the classes that a pickled model of the reference may name; any other one is refused
_MODULE_CLASSES = (
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

# prefixes of a block's weights: the reference's, and ours
_NAMES = {
    "norm1.": "norm1.",
    "attn.in_proj_": "attention.qkv.",
    "attn.out_proj.": "attention.proj.",
    "ls1.gamma": "layer_scale1",
    "norm2.": "norm2.",
    "mlp.0.": "ffn.fc1.",
    "mlp.2.": "ffn.fc2.",
    "ls2.gamma": "layer_scale2",
    "t_proj.0.": "depth_scaling.fc1.",
    "t_proj.2.": "depth_scaling.fc2.",
}


class _PickledModule:
    """Stands in for a module of a pickle: an object with attributes and no behaviour."""


STAND_INS = [(type(name, (_PickledModule,), {}), name) for name in _MODULE_CLASSES]


class _OriginalCheckpoint(NamedTuple):
    """What a file of the reference holds: weights by our names, and what it says about itself."""

    blocks: list[dict[str, torch.Tensor]]
    thresholds: list[int] | None  # None: a block of stage 1, or a plain state dict
    is_block: bool
    num_heads: int | None
    block_norm_eps: float

    @property
    def architecture(self) -> dict:
        """Options of `make_raptor`, read off the shapes; the same for all blocks."""
        options = []
        for weights in self.blocks:
            inner, width = weights["ffn.fc1.weight"].shape[0], weights["ffn.fc2.weight"].shape[1]
            if inner not in (width, 2 * width):
                raise ValueError(
                    f"A block's FFN must be D→H→D (GELU) or D→2·H→D (SwiGLU); got {inner}, {width}."
                )
            options.append(
                {
                    "ffn": "gelu" if inner == width else "swiglu",
                    "intermediate_size": width,
                    "depth_scaling": "depth_scaling.fc1.weight" in weights,
                    "block_norm_eps": self.block_norm_eps,
                }
            )
        if any(option != options[0] for option in options):
            raise ValueError(f"The blocks of one Raptor must be built alike; got {options}.")
        return options[0]


def read_checkpoint(path: str | Path) -> _OriginalCheckpoint:
    """Read a file of the reference without running anything of it; errors as the converters."""
    path = Path(path)
    content = load_tensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    if isinstance(content, dict):
        weights, facts = content, {}
    elif isinstance(content, _PickledModule):
        try:
            weights, facts = _module_weights(content), _module_facts(content)
        except (AttributeError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} holds a {type(content).__name__} that is not built like a raptor.Raptor "
                f"or block.Block of the reference: {type(error).__name__}, {error}."
            ) from error
    else:
        raise ValueError(
            f"{path} must hold a model of the reference or its state dict; it holds a "
            f"{type(content).__name__}."
        )
    strange = [k for k, v in weights.items() if not (isinstance(k, str) and torch.is_tensor(v))]
    if strange:
        raise ValueError(f"{path} must hold tensors by name; {strange[:5]} are none.")
    is_block = "norm1.weight" in weights
    numbers = sorted({int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d+)\.", name))})
    if not is_block and numbers != list(range(len(numbers))) or not (is_block or numbers):
        raise ValueError(
            f"{path} must hold weights like blocks.0.norm1.weight (a whole model) or norm1.weight "
            f"(one block); it holds {sorted(map(str, weights))[:4]} …"
        )
    prefixes = [""] if is_block else [f"blocks.{number}." for number in numbers]
    blocks = [rename(weights, prefix) for prefix in prefixes]
    left = [k for k in weights if not any(k.startswith(prefix) for prefix in prefixes)]
    if left:
        raise ValueError(f"{path} holds weights that belong to no block: {left[:5]}.")
    return _OriginalCheckpoint(
        blocks,
        facts.get("thresholds"),
        is_block,
        facts.get("num_heads"),
        facts.get("block_norm_eps", _ORIGINAL_EPS),
    )


def _load_pickle(path: Path):
    """Unpickle with stand-ins for the reference's classes and refuse every other class."""
    allowed = torch.serialization.safe_globals(STAND_INS)
    try:
        with allowed:
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise ValueError(
                f"{path} names {named[1]}, which no checkpoint of the reference needs. It was "
                "refused, and nothing in it was run. Don't load it by other means if you don't "
                "trust its source."
            ) from None
        # not torch's own words: they advise to load it unsafely
        raise ValueError(
            f"{path} is no pickle of tensors and plain modules, and so no checkpoint that can be "
            "read safely. It was refused, and nothing in it was run."
        ) from error
    except BROKEN as error:
        raise ValueError(f"{path} is not a whole torch file: {error}") from error


def _module_weights(module: _PickledModule, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return parameters and buffers of a stand-in; the reference has no buffers."""
    weights = {}
    for kind in ("_parameters", "_buffers"):
        for name, weight in vars(module).get(kind, {}).items():
            if weight is not None:
                weights[prefix + name] = weight.detach()
    for name, part in vars(module).get("_modules", {}).items():
        if part is not None:
            weights |= _module_weights(part, f"{prefix}{name}.")
    return weights


def _module_facts(module: _PickledModule) -> dict:
    """Return the thresholds, number of heads and eps of a stand-in for a model or a block.

    Raises:
        ValueError: blocks that differ in them, or thresholds that are no growing layers.
    """
    parts, facts = module._modules, {}
    blocks = list(parts["blocks"]._modules.values()) if "blocks" in parts else [module]
    if "blocks" in parts:
        stops = list(module.thresholds)
        if not all(type(stop) is int for stop in stops) or sorted({0, *stops}) != [0, *stops]:
            raise ValueError(f"thresholds must be growing layers, like [7, 10]; got {stops}.")
        facts["thresholds"] = stops
    for block in blocks:
        _check_block_facts(block._modules, bool(block.t_scale))
    counts = [
        (block._modules["attn"].num_heads, block._modules[norm].eps)
        for block in blocks
        for norm in ("norm1", "norm2")
    ]
    if len(set(counts)) > 1:
        raise ValueError(f"Blocks must share heads and LayerNorm eps; got (heads, eps) {counts}.")
    return {**facts, "num_heads": counts[0][0], "block_norm_eps": counts[0][1]}


def _check_block_facts(parts: dict[str, _PickledModule], t_scale: bool) -> None:
    """Refuse a block that says other things of itself than its weights do."""
    if t_scale != ("t_proj" in parts):
        raise ValueError(f"A block with t_scale={t_scale} {'lacks' if t_scale else 'has'} t_proj.")
    activation = parts["mlp"]._modules["1"]
    kind = type(activation).__name__
    if kind == "torch.nn.modules.activation.GELU":
        known = getattr(activation, "approximate", "none") == "none"
    else:
        known = kind == "block.SwiGLU"
    first, last = (parts["mlp"]._modules[i]._parameters["weight"] for i in ("0", "2"))
    gated = first.shape[0] == 2 * last.shape[1]
    if not known or gated != (kind == "block.SwiGLU"):
        raise ValueError(
            f"A block's FFN must be D→H→D with an exact GELU or D→2·H→D with SwiGLU; got "
            f"{tuple(first.shape)}, {kind}, {tuple(last.shape)}."
        )


def rename(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights of one block by our names; one without LayerScale gets LayerScales of
    1.
    """
    renamed, unknown = {}, []
    for name, weight in weights.items():
        if not name.startswith(prefix):
            continue
        own = name.removeprefix(prefix)
        match = next((original for original in _NAMES if own.startswith(original)), None)
        if match is None:
            unknown.append(name)
        else:
            renamed[_NAMES[match] + own.removeprefix(match)] = weight.float()
    required = {"norm1.weight", "attention.qkv.weight", "ffn.fc1.weight", "ffn.fc2.weight"}
    if unknown or not required <= set(renamed):
        raise ValueError(
            f"A block of the reference has the weights {', '.join(_NAMES)}…; unknown here: "
            f"{unknown[:5]}, missing: {sorted(required - set(renamed))}."
        )
    for name in ("layer_scale1", "layer_scale2"):
        renamed.setdefault(name, torch.ones_like(renamed["norm1.weight"]))
    return renamed
