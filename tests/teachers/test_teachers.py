"""Teachers: loading, trajectories and token layouts of any vision model, image processors."""

import pytest
import torch
import transformers
from huggingface_hub import constants
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

from raptor_hf import make_raptor
from raptor_hf.configuration_raptor import TEACHER_FAMILIES, TokenLayout, token_layout
from raptor_hf.data import make_processor
from raptor_hf.teachers import (
    image_size,
    load_backbone,
    load_processor,
    load_vision_model,
    teacher_identity,
    trajectory,
)
from raptor_hf.teachers.loading import find_tower, hub_commit
from raptor_hf.teachers.states import infer_token_layout
from raptor_hf.weights import weights_digest
from tests.families import HOSTS, PIXELS, VISION, shaken, tiny_model, zero_shot
from tests.helpers import assert_same_outputs

SMALL_DINOV2 = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=3)


@pytest.mark.parametrize("changes", [{}, {"use_mean_pooling": False}])
@pytest.mark.parametrize("tie", [{}, {"tie_last_hidden_states": True}])
def test_the_last_state_of_any_model_is_its_last_layers(changes, tie):
    """transformers may put the normed state in its place."""
    config = transformers.BeitConfig(**VISION, **changes, **tie)
    model = shaken(AutoModel.from_config(config))
    outputs, layer = [], model.layers[-1]
    hook = layer.register_forward_hook(lambda _module, _args, out: outputs.append(out))
    plain = model(PIXELS, output_hidden_states=True)
    hook.remove()
    hooks = len(layer._forward_hooks)  # transformers leaves its own there
    states = trajectory(model, PIXELS)
    assert states.shape == (2, 4, 17, 24)
    assert_same_outputs(states[:, :3], torch.stack(plain.hidden_states[:3], dim=1))
    assert_same_outputs(states[:, 3], outputs[0])
    assert len(layer._forward_hooks) == hooks


@pytest.mark.parametrize("family", TEACHER_FAMILIES)
def test_every_family_loads_alone_and_its_layout_is_inferred(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path))
    assert type(loaded) is type(model)
    states = trajectory(loaded, PIXELS)
    assert_same_outputs(states, trajectory(model, PIXELS), 1e-5)
    layout = infer_token_layout(model.config, num_tokens=states.shape[2], height=16, width=16)
    assert layout.num_prefix_tokens == token_layout(model.config).num_prefix_tokens


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
    swin = SwinConfig(
        image_size=16, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    with pytest.raises(ValueError, match=r"SwinModel has \(64, 12\), \(16, 24\) over its depth"):
        trajectory(AutoModel.from_config(swin), PIXELS)
    model = tiny_model("vit")
    forward = model.forward
    model.forward = lambda x, output_hidden_states: forward(x)
    with pytest.raises(ValueError, match="ViTModel has 3 layers and returns 0 states"):
        trajectory(model, PIXELS)
    mae = AutoModel.from_config(ViTMAEConfig(**VISION))
    assert trajectory(mae, PIXELS).shape == (2, 4, 17, 24)  # of the whole image
    assert mae.config.mask_ratio == 0.75


@pytest.mark.parametrize(
    "name",
    ["CLIP", "Siglip", "Aimv2", "MetaClip2", "ChineseCLIP"]
    + ["DepthAnything", "UperNet", "Llava", "ViTForImageClassification"],
)
@torch.no_grad()
def test_of_a_model_around_a_tower_the_tower_is_taken(name, tmp_path):
    """The same states, bare, frozen, and not in the file: addresses may change last bits."""
    model, _ = HOSTS[name]() if name in HOSTS else zero_shot(name)
    model.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path))
    assert not loaded.training and loaded.name_or_path == str(tmp_path)
    for weight in loaded.parameters():
        assert not weight.requires_grad and not weight.data_ptr() % 64
    expected = find_tower(model)(PIXELS, output_hidden_states=True).hidden_states
    assert_same_outputs(trajectory(loaded, PIXELS), torch.stack(expected, dim=1))
    make_raptor(loaded, [loaded.config.num_hidden_layers], init="teacher")


def test_a_classifier_gives_the_same_backbone_every_time(tmp_path):
    classifier = ViTForImageClassification(ViTConfig(**VISION)).eval()
    classifier.save_pretrained(tmp_path)  # without a pooler
    first, second = (load_vision_model(str(tmp_path)) for _ in range(2))
    assert teacher_identity(first) == teacher_identity(second)
    assert teacher_identity(first)["name"] == tmp_path.name  # no path of this machine


def test_identity_follows_the_weights(teacher):
    before = teacher_identity(teacher)["weights_sha256"]
    assert teacher_identity(teacher)["weights_sha256"] == before
    teacher.layernorm.bias[3] += 1e-6
    assert teacher_identity(teacher)["weights_sha256"] != before
    assert weights_digest(torch.nn.BatchNorm1d(3))  # its counter is a single number


def test_the_commit_of_a_hub_model_is_read_off_the_cache(tmp_path, monkeypatch):
    repo, commit = tmp_path / "models--someone--vit", "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub_commit("someone/vit") == commit
    assert hub_commit("someone/else") is hub_commit(str(tmp_path)) is None


def test_foreign_families_pickles_and_missing_weights_are_refused(teacher, tmp_path):
    SwinConfig().save_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match="got a model of type 'swin'"):
        load_backbone(str(tmp_path / "swin"))
    transformers.ViTConfig(num_channels=1).save_pretrained(tmp_path / "grey")
    with pytest.raises(ValueError, match="takes 1 channels; images have 3"):
        load_backbone(str(tmp_path / "grey"))
    weights = teacher.state_dict()
    del weights["layernorm.weight"]
    teacher.save_pretrained(tmp_path / "broken", state_dict=weights)
    with pytest.raises(ValueError, match="lacks weights of its own model: .'layernorm.weight'"):
        load_backbone(str(tmp_path / "broken"))
    (tmp_path / "broken" / "model.safetensors").unlink()
    torch.save(teacher.state_dict(), tmp_path / "broken" / "pytorch_model.bin")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load_backbone(tmp_path / "broken")
    with pytest.raises(OSError, match="must bring its image processor"):
        load_processor(str(tmp_path / "broken"))


SQUARE = {"height": 28, "width": 28}


@pytest.mark.parametrize(
    ("settings", "resolution", "resized"),
    [
        ({}, [28, 28], {"shortest_edge": 28}),
        # 32 of 28 pixels, as 48 of 42: the crop keeps its share of the image
        ({"size": {"shortest_edge": 32}}, [42, 42], {"shortest_edge": 48}),
        ({"size": {"height": 32, "width": 32}}, [42, 14], {"height": 48, "width": 16}),
        ({"size": SQUARE, "do_center_crop": False}, [14, 42], {"height": 14, "width": 42}),
        ({"do_resize": False}, [28, 28], {"shortest_edge": 28}),
    ],
)
def test_a_processor_at_another_resolution(settings, resolution, resized, tmp_path):
    SMALL_DINOV2.save_pretrained(tmp_path)
    settings = make_processor(28).to_dict() | {"crop_size": SQUARE} | settings
    BitImageProcessorPil(**settings).save_pretrained(tmp_path)
    changed = load_processor(tmp_path, resolution=resolution)
    assert image_size(changed) == tuple(resolution)
    assert {name: length for name, length in dict(changed.size).items() if length} == resized
    with pytest.raises(ValueError, match="multiples of the patch, 14×14 pixels .*; got 30×28"):
        load_processor(tmp_path, resolution=[30, 28])
    if not settings["do_resize"]:
        with pytest.raises(ValueError, match="needs an image processor that resizes"):
            load_processor(tmp_path, resolution=[42, 42])
