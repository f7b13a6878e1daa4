import json
from unittest import mock

import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    BitImageProcessorPil,
    Dinov2Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raptor_hf import make_raptor
from raptor_hf.configuration_raptor import TEACHER_FAMILIES, TokenLayout, token_layout
from raptor_hf.data import make_processor
from raptor_hf.phases.cuts import find_phases
from raptor_hf.phases.distance import layer_distance
from raptor_hf.teachers import (
    image_size,
    load_backbone,
    load_processor,
    load_vision_model,
    teacher_identity,
    trajectory,
)
from raptor_hf.teachers.loading import find_towers, hub_commit
from raptor_hf.teachers.states import infer_token_layout
from tests.families import HOSTS, PIXELS, tiny_model
from tests.helpers import assert_same_outputs

SIZES = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "patch_size": 4}
TEXT = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32,
    "vocab_size": 20, "max_position_embeddings": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# model type: (the list of its layers, its final norm over all tokens, cls tokens, registers)
FAMILIES = {
    "dinov2": ("encoder.layer", "layernorm", 1, 0),
    "dinov2_with_registers": ("encoder.layer", "layernorm", 1, 2),
    "vit": ("layers", "layernorm", 1, 0),
    "deit": ("layers", "layernorm", 1, 1),
    "clip_vision_model": ("encoder.layers", None, 1, 0),  # normed is the pooled cls alone
    "siglip_vision_model": ("encoder.layers", "post_layernorm", 0, 0),
    "dinov3_vit": ("model.layer", "norm", 1, 2),
    "beit": ("layers", None, 1, 0),  # normed is the mean over the patches alone
    "ijepa": ("layers", "layernorm", 0, 0),
}


def vision_model(model_type, **changes):
    """A tiny random model of a family, with norms that are not the identity."""
    config = CONFIG_MAPPING[model_type](**SIZES, image_size=16)
    if model_type not in ("dinov2", "dinov2_with_registers"):
        config.intermediate_size = 32
    if FAMILIES.get(model_type, ())[3:] == (2,):
        config.num_register_tokens = 2
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight += 0.3 * torch.randn_like(weight)
    return model


@pytest.mark.parametrize("tie", [None, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_its_trajectory_layout_and_phases(family, tie):
    layers, norm, num_cls, num_registers = FAMILIES[family]
    # of teachers of Raptors trajectory() trusts transformers' default, which the first case checks
    changes = {} if tie is None or family in TEACHER_FAMILIES else {"tie_last_hidden_states": tie}
    model = vision_model(family, **changes)
    pixel_values = torch.randn(3, 3, 16, 16)
    outputs = []
    hooks = [
        layer.register_forward_hook(
            lambda _module, _args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in model.get_submodule(layers)
    ]
    plain = model(pixel_values, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    states = trajectory(model, pixel_values)
    assert states.shape == (3, 5, 16 + num_cls + num_registers, 24)
    assert_same_outputs(states[:, 0], plain.hidden_states[0])
    assert_same_outputs(states[:, 1:], torch.stack(outputs, dim=1))
    if norm:  # the last state is not normed yet
        torch.testing.assert_close(
            model.get_submodule(norm)(states[:, -1]), plain.last_hidden_state
        )
        assert not torch.allclose(states[:, -1], plain.last_hidden_state)
    layout = infer_token_layout(model.config, num_tokens=states.shape[2], height=16, width=16)
    assert layout == TokenLayout(num_cls, num_registers)
    if "dinov2" in family:
        assert layout == token_layout(model.config)
    distance = layer_distance([states], layout)
    for method in ("recursive", "maxcut", "ncut"):
        assert sum(find_phases(distance, 2, method)) == 4


def test_a_last_state_that_transformers_ties_to_the_norm_is_untied():
    model = vision_model("beit", use_mean_pooling=False, tie_last_hidden_states=True)
    output = model(pixel_values := torch.randn(2, 3, 16, 16), output_hidden_states=True)
    assert output.hidden_states[-1] is output.last_hidden_state
    hooks = len(model.layers[-1]._forward_hooks)  # transformers leaves its own there
    last = trajectory(model, pixel_values)[:, -1]
    torch.testing.assert_close(model.layernorm(last), output.last_hidden_state)
    assert len(model.layers[-1]._forward_hooks) == hooks


def test_layouts_by_hand():
    wide = Dinov2Config(patch_size=14)
    assert infer_token_layout(wide, num_tokens=1 + 3 * 5, height=42, width=75) == TokenLayout(1, 0)
    oblong = ViTConfig(patch_size=(8, 4))
    assert infer_token_layout(oblong, num_tokens=8 + 5, height=16, width=16) == TokenLayout(1, 4)
    with pytest.raises(ValueError, match="has 4 patches; .* 'vit' has 3 tokens: it merges"):
        infer_token_layout(ViTConfig(patch_size=8), num_tokens=3, height=16, width=16)
    with pytest.raises(ValueError, match="a 'resnet' has no patch_size"):
        infer_token_layout(ResNetConfig(), num_tokens=3, height=16, width=16)


def test_models_without_a_trajectory_are_refused():
    pixel_values = torch.randn(1, 3, 16, 16)
    swin = AutoModel.from_config(
        SwinConfig(
            image_size=16, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 2],
            window_size=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"SwinModel has \(64, 12\), \(16, 24\) over its depth"):
        trajectory(swin, pixel_values)
    model = vision_model("vit")
    forward = model.forward
    model.forward = lambda x, output_hidden_states: forward(x)
    with pytest.raises(ValueError, match="ViTModel returns no hidden_states"):
        trajectory(model, pixel_values)
    mae = AutoModel.from_config(ViTMAEConfig(**SIZES, image_size=16, intermediate_size=32))
    assert trajectory(mae, pixel_values).shape == (1, 5, 17, 24)  # of the whole image
    assert mae.config.mask_ratio == 0.75


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "Aimv2", "MetaClip2", "ChineseCLIP"])
def test_of_images_and_text_the_vision_tower_is_taken(name, tmp_path):
    vision = {**SIZES, "intermediate_size": 32, "image_size": 16}
    config = getattr(transformers, f"{name}Config")(text_config=TEXT, vision_config=vision)
    model = getattr(transformers, f"{name}Model")(config).eval()
    check_tower(model, tmp_path)


@pytest.mark.parametrize("host", ["DepthAnything", "UperNet", "Llava", "ViTForImageClassification"])
def test_of_a_model_around_a_tower_the_tower_is_taken(host, tmp_path):
    check_tower(HOSTS[host]()[0], tmp_path)


@pytest.mark.parametrize("family", TEACHER_FAMILIES)
def test_every_family_loads_alone(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path))
    assert type(loaded) is type(model)
    assert_same_outputs(trajectory(loaded, PIXELS), trajectory(model, PIXELS), 1e-5)


def check_tower(model, folder):
    """Save a model and load its tower: the same states, bare, frozen."""
    model.save_pretrained(folder)
    loaded = load_backbone(str(folder))
    assert not loaded.training and loaded.name_or_path == str(folder)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    pixel_values = torch.randn(2, 3, 16, 16)
    [tower] = find_towers(model).values()
    with torch.no_grad():
        expected = tower(pixel_values, output_hidden_states=True).hidden_states
    assert_same_outputs(trajectory(loaded, pixel_values), torch.stack(expected, dim=1))
    make_raptor(loaded, [loaded.config.num_hidden_layers], init="teacher")


def test_what_a_processor_lacks_is_said(tmp_path):
    CONFIG_MAPPING["dinov3_vit"](**SIZES).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="must bring its image processor"):
        load_processor(str(tmp_path))
    processor = {"image_processor_type": "DINOv3ViTImageProcessorFast"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with mock.patch(
        "transformers.AutoImageProcessor.from_pretrained",
        side_effect=ImportError("X requires the Torchvision library"),
    ):
        with pytest.raises(
            ImportError, match="needs a library that is not installed: X requires the Torch"
        ):
            load_processor(str(tmp_path))


def test_a_classifier_gives_the_same_backbone_every_time(tmp_path):
    config = ViTConfig(**SIZES, image_size=16, intermediate_size=32)
    classifier = ViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path)  # without a pooler
    first, second = (load_vision_model(str(tmp_path)) for _ in range(2))
    assert teacher_identity(first) == teacher_identity(second)
    assert teacher_identity(first)["name"] == tmp_path.name  # no path of this machine
    pixel_values = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(
        first(pixel_values).last_hidden_state, classifier.vit(pixel_values).last_hidden_state
    )


def test_a_backbone_is_frozen_and_gives_its_trajectory(teacher, pixel_values, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    loaded = load_backbone(str(tmp_path / "teacher"))
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert not any(weight.data_ptr() % 64 for weight in loaded.parameters())  # not in the file
    states = trajectory(loaded, pixel_values)
    assert states.shape == (3, 7, 7, 24)
    torch.testing.assert_close(loaded.layernorm(states[:, -1]), loaded(pixel_values)[0])


def test_teacher_and_raptor_load_alike(teacher, pixel_values, tmp_path):
    raptor = make_raptor(teacher, [4, 2])
    raptor.save_pretrained(tmp_path)
    assert trajectory(load_backbone(str(tmp_path)), pixel_values).shape == (3, 7, 7, 24)


def test_identity_follows_the_weights(teacher):
    before = teacher_identity(teacher)["weights_sha256"]
    assert teacher_identity(teacher)["weights_sha256"] == before
    teacher.layernorm.bias[3] += 1e-6
    assert teacher_identity(teacher)["weights_sha256"] != before


def test_the_commit_of_a_hub_model_is_read_off_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    repo, commit = tmp_path / "models--someone--vit", "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub_commit("someone/vit") == commit
    assert hub_commit("someone/vit", commit) == commit
    assert hub_commit("someone/else") is None
    assert hub_commit(str(tmp_path)) is None


def test_foreign_families_and_missing_weights_are_refused(teacher, tmp_path):
    SwinConfig().save_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match="got a model of type 'swin': the width or the number"):
        load_backbone(str(tmp_path / "swin"))
    transformers.ViTConfig(num_channels=1).save_pretrained(tmp_path / "grey")
    with pytest.raises(ValueError, match="takes 1 channels; images have 3"):
        load_backbone(str(tmp_path / "grey"))
    weights = teacher.state_dict()
    del weights["layernorm.weight"]
    teacher.save_pretrained(tmp_path / "broken", state_dict=weights)
    with pytest.raises(ValueError, match="lacks weights of its own model: .'layernorm.weight'"):
        load_backbone(str(tmp_path / "broken"))


def test_a_teacher_is_read_from_safetensors_only(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(teacher.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("settings", "resolution", "resized"),
    [
        ({}, [28, 28], {"shortest_edge": 28}),
        # 32 of 28 pixels, as 48 of 42
        ({"size": {"shortest_edge": 32}}, [42, 42], {"shortest_edge": 48}),
        ({"size": {"height": 32, "width": 32}}, [42, 14], {"height": 48, "width": 16}),
        (
            {"size": {"height": 20, "width": 20}, "do_center_crop": False},
            [14, 28],
            {"height": 14, "width": 28},
        ),
    ],
)
def test_a_processor_at_another_resolution(settings, resolution, resized, tmp_path):
    """The crop keeps its share of the image."""
    Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=3).save_pretrained(
        tmp_path
    )
    settings = make_processor(28).to_dict() | {"crop_size": {"height": 28, "width": 28}} | settings
    BitImageProcessorPil(**settings).save_pretrained(tmp_path)
    before = load_processor(tmp_path)
    changed = load_processor(tmp_path, resolution=resolution)
    assert image_size(changed) == tuple(resolution)
    assert {name: length for name, length in dict(changed.size).items() if length} == resized
    assert load_processor(tmp_path).to_dict() == before.to_dict()
    with pytest.raises(ValueError, match="multiples of the patch, 14×14 pixels .*; got 30×28"):
        load_processor(tmp_path, resolution=[30, 28])


def test_a_processor_that_only_crops_has_its_own_resolution(tmp_path):
    Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=3).save_pretrained(
        tmp_path
    )
    settings = {**make_processor(28).to_dict(), "do_resize": False}
    BitImageProcessorPil(**settings).save_pretrained(tmp_path)
    assert image_size(load_processor(tmp_path, resolution=[28, 28])) == (28, 28)
    with pytest.raises(ValueError, match="needs an image processor that resizes"):
        load_processor(tmp_path, resolution=[42, 42])
