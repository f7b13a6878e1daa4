"""A tiny random model of every family that can teach, and of models around them."""

import copy
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raptor_hf import make_raptor, raptorize
from raptor_hf.configuration_raptor import TEACHER_FAMILIES
from raptor_hf.runs.files import write_json
from raptor_hf.teachers import trajectory

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
# what makes a tiny model of a family show what it has: registers, tables, norms
CHANGES = {
    "dinov2": {"layerscale_value": 0.5},
    "dinov2_with_registers": {"num_register_tokens": 2, "layerscale_value": 0.5},
    "dinov3_vit": {"num_register_tokens": 2, "intermediate_size": 32},
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
    make = transformers.AutoModel.from_config
    if name:
        make = getattr(transformers, name)._from_config
    return shaken(make(config, attn_implementation="eager"))


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


TEXT = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32,
    "vocab_size": 20, "max_position_embeddings": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = SIZES | {"intermediate_size": 32}
BACKBONE = transformers.Dinov2Config(
    **SIZES, out_features=["stage1", "stage3"], apply_layernorm=True, reshape_hidden_states=False,
    layerscale_value=0.5,
)  # fmt: skip
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
WORDS = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])


def classifier(name, family):
    """An image classifier of transformers around a tiny tower."""
    config = tiny_model(family).config
    config.num_labels = 4
    return shaken(getattr(transformers, name)(config)), {"pixel_values": PIXELS}


def zero_shot(name):
    """A model of images and text around a tiny tower."""
    config = getattr(transformers, f"{name}Config")(text_config=TEXT, vision_config=VISION)
    inputs = {"input_ids": WORDS, "pixel_values": PIXELS}
    return shaken(getattr(transformers, f"{name}Model")(config)), inputs


def mae():
    config = tiny_model("vit_mae", mask_ratio=0.5).config
    config.decoder_num_hidden_layers, config.decoder_num_attention_heads = 1, 2
    config.decoder_hidden_size, config.decoder_intermediate_size = 16, 32
    noise = torch.arange(16.0).expand(2, 16)
    inputs = {"pixel_values": PIXELS, "noise": noise}
    return shaken(transformers.ViTMAEForPreTraining(config)), inputs


def depth_anything():
    config = transformers.DepthAnythingConfig(
        backbone_config=copy.deepcopy(BACKBONE), patch_size=4, reassemble_hidden_size=24,
        reassemble_factors=[2, 1], neck_hidden_sizes=[8, 8], fusion_hidden_size=8,
    )  # fmt: skip
    return shaken(transformers.DepthAnythingForDepthEstimation(config)), {"pixel_values": PIXELS}


def upernet():
    backbone = copy.deepcopy(BACKBONE)
    backbone.reshape_hidden_states = True
    config = transformers.UperNetConfig(
        backbone_config=backbone, num_labels=3, hidden_size=8, use_auxiliary_head=False
    )
    return shaken(transformers.UperNetForSemanticSegmentation(config)), {"pixel_values": PIXELS}


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT, num_key_value_heads=3),
        image_token_index=19, vision_feature_layer=-1,
    )  # fmt: skip
    words = torch.tensor([[1] + [19] * 16 + [5, 6]])
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    inputs["pixel_values"] = PIXELS[:1]
    return shaken(transformers.LlavaForConditionalGeneration(config)), inputs


HOSTS = {
    "Dinov2ForImageClassification": lambda: classifier("Dinov2ForImageClassification", "dinov2"),
    "ViTForImageClassification": lambda: classifier("ViTForImageClassification", "vit"),
    "DeiTForImageClassification": lambda: classifier("DeiTForImageClassification", "deit"),
    "DINOv3ViTBackbone": lambda: classifier("DINOv3ViTBackbone", "dinov3_vit"),
    "CLIPModel": lambda: zero_shot("CLIP"),
    "SiglipModel": lambda: zero_shot("Siglip"),
    "ViTMAEForPreTraining": mae,
    "DepthAnything": depth_anything,
    "UperNet": upernet,
    "Llava": llava,
}


def tensors_of(outputs):
    """All tensors of an output with nested outputs."""
    found = {}
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, tuple):
            found |= {f"{name}.{i}": v for i, v in enumerate(value) if isinstance(v, torch.Tensor)}
        elif hasattr(value, "items"):
            found |= {f"{name}.{key}": v for key, v in tensors_of(value).items()}
    return {name: value for name, value in found.items() if "past_key_values" not in name}


# what transformers' own image processors need, where tests have no network: read off transformers
PROCESSORS = {
    "dinov3_vit": "torchvision", "tipsv2_vision_model": "torchvision",
    "dinov2_with_registers": "none", "radio": "none", "clip_vision_model": "CLIP's",
    "metaclip_2_vision_model": "CLIP's", "chinese_clip_vision_model": "ChineseCLIP's",
    "mlcd_vision_model": "CLIP's", "siglip_vision_model": "SigLIP's",
    "aimv2_vision_model": "CLIP's", "internvl_vision": "InternVL's",
}  # fmt: skip
_TABLE = Path(__file__).parents[1] / "evaluation" / "results" / "families.json"


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def facts(family: str) -> dict:
    """What the table in docs/families.md says of a family."""
    teacher, row = tiny_model(family), TEACHER_FAMILIES[family]
    phases = [1] * teacher.config.num_hidden_layers
    raptor = make_raptor(teacher, phases, init="teacher", depth_scaling=False).eval()
    raptor.set_attn_implementation("eager")
    expected, found = trajectory(teacher, PIXELS), raptor.trajectory(PIXELS)
    swapped = raptorize(tiny_model(family), blocks=raptor)
    return {
        "class": type(teacher).__name__,
        "cls": row.cls if isinstance(row.cls, int) else "any",
        "registers": row.registers if isinstance(row.registers, int) else "any",
        "state_0": difference(found[:, 0], expected[:, 0]),
        "copied": difference(found, expected),
        "trunk": difference(trajectory(swapped, PIXELS), expected),
        "sizes": row.resizing != "never",
        "processor": PROCESSORS.get(family, "its own"),
    }


if __name__ == "__main__":
    write_json(_TABLE, {family: facts(family) for family in TEACHER_FAMILIES})
