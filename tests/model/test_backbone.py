import pytest
import torch
from transformers import (
    AutoBackbone,
    DPTConfig,
    DPTForDepthEstimation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from raptor_hf import RaptorBackbone, RaptorConfig, RaptorModel
from tests.helpers import assert_same_outputs, make


def test_feature_maps_are_states_on_the_patch_grid(teacher, wide_images):
    backbone = make(RaptorBackbone, teacher, out_indices=[0, 3, 6])
    assert backbone.out_features == ["stem", "stage3", "stage6"]
    assert backbone.channels == [24, 24, 24]
    outputs = backbone(wide_images, output_hidden_states=[3])
    states = backbone.raptor(wide_images, output_hidden_states=True).hidden_states
    for layer, feature_map in zip([0, 3, 6], outputs.feature_maps, strict=True):
        assert feature_map.shape == (2, 24, 2, 3) and feature_map.is_contiguous()
        normed = backbone.raptor.norm(states[layer])
        for row in range(2):
            for column in range(3):  # after one cls and two registers
                expected = normed[:, 3 + 3 * row + column]
                assert_same_outputs(feature_map[:, :, row, column], expected)
    assert_same_outputs(outputs.hidden_states[3], states[3])
    assert [layer for layer, s in enumerate(outputs.hidden_states) if s is not None] == [3]
    assert backbone(wide_images).hidden_states is None


def test_plain_tokens_come_without_norm_and_registers(teacher, wide_images):
    backbone = make(
        RaptorBackbone, teacher, out_indices=[2], apply_layernorm=False, reshape_hidden_states=False
    )
    [tokens] = backbone(wide_images).feature_maps
    state = backbone.raptor(wide_images, output_hidden_states=True).hidden_states[2]
    assert_same_outputs(tokens, torch.cat([state[:, :1], state[:, 3:]], dim=1))


def test_loading_chooses_the_maps_anew(teacher, wide_images, tmp_path):
    model = make(RaptorModel, teacher)
    model.save_pretrained(tmp_path)
    backbone = RaptorBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage4"])
    assert list(backbone.out_indices) == [1, 4]
    expected = (
        model(wide_images, output_hidden_states=True)
        .hidden_states[4][:, 3:]
        .transpose(1, 2)
        .unflatten(2, (2, 3))
    )
    backbone.config.apply_layernorm = False
    assert_same_outputs(backbone(wide_images).feature_maps[1], expected)
    backbone.save_pretrained(tmp_path / "again")
    again = AutoBackbone.from_config(RaptorConfig.from_pretrained(tmp_path / "again"))
    assert type(again) is RaptorBackbone and again.out_features == ["stage1", "stage4"]
    with pytest.raises(ValueError, match="subset of stage_names"):
        RaptorBackbone.from_pretrained(tmp_path, out_features=["stage7"])


def test_dense_models_of_transformers_take_a_raptor(teacher):
    config = make(RaptorBackbone, teacher, out_indices=[1, 2, 4, 6]).config
    images = torch.randn(1, 3, 16, 16)
    upernet = UperNetConfig(
        backbone_config=config, num_labels=3, hidden_size=8, auxiliary_in_channels=24
    )
    logits = UperNetForSemanticSegmentation(upernet).eval()(images).logits
    assert logits.shape == (1, 3, 16, 16)
    config.reshape_hidden_states = False
    dpt = DPTConfig(
        backbone_config=config, hidden_size=24, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5], patch_size=4, image_size=16,
    )  # fmt: skip
    assert DPTForDepthEstimation(dpt).eval()(images).predicted_depth.shape[0] == 1
