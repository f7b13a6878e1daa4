"""A tiny random model of every family that can teach, and of models around them."""

import torch
import transformers
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raptor_hf.configuration_raptor import TEACHER_FAMILIES

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
# what makes a tiny model of a family show what it has: registers, tables, norms
CHANGES = {
    "dinov2": {"layerscale_value": 0.5},
    "dinov2_with_registers": {"num_register_tokens": 2, "layerscale_value": 0.5},
    "dinov3_vit": {"num_register_tokens": 2, "intermediate_size": 32},
    "beit": {"use_relative_position_bias": True, "layer_scale_init_value": 0.5},
    "data2vec-vision": {"use_relative_position_bias": True, "layer_scale_init_value": 0.5},
    "internvl_vision": {"image_size": [16, 16], "patch_size": [4, 4], "use_qk_norm": True},
    "radio": {"max_img_size": 32, "num_cls_tokens": 2, "num_registers": 3, "summary_idxs": [0, 1]},
    "tipsv2_vision_model": {},
    "vit_mae": {"mask_ratio": 0.0},
}
# in the same families: what other knobs of a block are for
VARIANTS = {
    "dinov2, gated": ("dinov2", {"use_swiglu_ffn": True, "qkv_bias": False}),
    "dinov3, gated": ("dinov3_vit", {
        "use_gated_mlp": True, "hidden_act": "silu", "key_bias": True, "intermediate_size": 32
    }),
    "beit, shared bias": ("beit", {
        "use_relative_position_bias": False, "use_shared_relative_position_bias": True,
        "layer_scale_init_value": 0.0, "use_mean_pooling": False,
    }),
    "vit, no biases": ("vit", {"qkv_bias": False}),
    "clip, gelu": ("clip_vision_model", {"hidden_act": "gelu"}),
    "internvl, rms": ("internvl_vision", {"norm_type": "rms_norm", "attention_bias": True}),
}  # fmt: skip
CASES = {family: (family, {}) for family in TEACHER_FAMILIES} | VARIANTS


def tiny_model(case: str, **changes):
    """The model of a case, frozen, in evaluation mode and eager attention."""
    family, variant = CASES[case]
    fields = SIZES | CHANGES.get(family, {"intermediate_size": 32}) | variant | changes
    config = CONFIG_MAPPING[family](**fields)
    torch.manual_seed(0)
    name = TEACHER_FAMILIES[family].model_class
    if name:
        model = getattr(transformers, name)._from_config(config, attn_implementation="eager")
    else:
        model = AutoModel.from_config(config, attn_implementation="eager")
    return shaken(model)


def shaken(model):
    """The model with every weight moved: no norm is the identity, no table of positions zero."""
    model = model.eval().requires_grad_(False)
    for weight in model.parameters():
        weight += 0.2 * torch.randn_like(weight)
    return model


def sizes_of(model) -> list[tuple[int, int]]:
    """Its own size and, where the family takes others, an oblong one."""
    family = TEACHER_FAMILIES[model.config.model_type]
    return [(16, 16)] if family.resizing == "never" else [(16, 16), (24, 20)]
