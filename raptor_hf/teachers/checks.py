"""Checks of a teacher: what no Raptor can be made of is refused, and what was made is compared."""

import contextlib
import copy
import math
from collections.abc import Iterator
from functools import partial

import torch
from transformers import PreTrainedModel

from ..configuration_raptor import RaptorConfig, teacher_family, token_layout
from ..modeling_raptor import (
    LayerContext,
    RaptorBlock,
    RaptorModel,
    call_whole,
    find_part,
    first_layer_call,
    first_offloaded,
    pair,
    patch_grid,
)
from .layers import layer_parts, teacher_layer_weights

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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


@torch.no_grad()
def check_against(model: RaptorModel, teacher: PreTrainedModel, *, blocks: bool) -> None:
    """Compare with what the teacher's own forward makes of an image of its size.

    That is state 0, how many tokens it has, and the final norm where the teacher's last state
    is given after it.

    Args:
        blocks: compare a copy of the first layer with it, too.

    Raises:
        ValueError: they differ: the teacher is not what its family is in `TEACHER_FAMILIES`.
    """
    config = model.config
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
    home = model.shell.device
    model.shell.to(like.device)  # a GPU's convolutions (TF32) differ from another device's
    try:
        pairs = {"the embeddings": (model.embed(image), expected)}
        if blocks:
            pairs["a copy of the first layer"] = copied_layer(config, teacher, *call)
        if (last := last_states(teacher, image)) is not None:
            pairs["the final norm"] = (model.norm(last[0].to(like.device)), last[1])
    finally:
        model.shell.to(home)
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
    block.load_state_dict(teacher_layer_weights(layer, layer_parts(teacher.config)), assign=True)
    output = layer(states, *args, **kwargs)
    copied = block(states, 1, context=LayerContext.of_call(args, kwargs))
    return copied, output[0] if isinstance(output, tuple) else output


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
