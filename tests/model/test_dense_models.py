import pytest
import torch
from torch import nn

from raptor_hf import (
    RaptorConfig,
    RaptorForDepthEstimation,
    RaptorForSemanticSegmentation,
    make_raptor,
)
from raptor_hf.modeling_raptor_heads import (
    PatchFrame,
    depth_logits,
    depth_loss,
    drop_registers,
    expected_depth,
)
from tests.helpers import assert_same_outputs, randomised


def dense_model(model_class, teacher, **fields):
    config = make_raptor(teacher, [4, 2]).config
    config = RaptorConfig.from_dict({**config.to_dict(), **fields})
    torch.manual_seed(0)
    return randomised(model_class(config)).eval()


def test_segmentation_is_a_linear_layer_on_patches(teacher, wide_images):
    model = dense_model(RaptorForSemanticSegmentation, teacher, num_labels=5)
    labels = torch.randint(0, 5, (2, 8, 12), generator=torch.Generator().manual_seed(2))
    labels[:, :3] = 255
    outputs = model(wide_images, labels=labels)
    states = model.raptor(wide_images).last_hidden_state
    for row in range(2):
        for column in range(3):
            expected = model.classifier(states[:, 3 + 3 * row + column])
            torch.testing.assert_close(outputs.logits[:, :, row, column], expected)
    full = nn.functional.interpolate(outputs.logits, size=(8, 12), mode="bilinear")
    log_probabilities = full.log_softmax(1).gather(1, labels.clamp(max=4)[:, None])[:, 0]
    torch.testing.assert_close(outputs.loss, -log_probabilities[:, 3:].mean())


def test_depth_head_equals_upsampling_first(teacher, wide_images):
    model = dense_model(RaptorForDepthEstimation, teacher, depth_bins=7)
    states = model.raptor(wide_images).last_hidden_state
    patches = states[:, 3:]
    features = torch.cat([patches, states[:, :1].expand_as(patches)], dim=-1)
    features = features.transpose(1, 2).reshape(2, 48, 2, 3)
    fine = nn.functional.interpolate(features, scale_factor=4, mode="bilinear")
    expected = model.classifier(fine.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    logits = depth_logits(model.classifier, drop_registers(states, model.config), (2, 3))
    torch.testing.assert_close(logits, expected)
    depth = model(wide_images).predicted_depth
    assert depth.shape == (2, 8, 12)
    edges = torch.linspace(0.001, 10, 8)
    centres = (edges[1:] + edges[:-1]) / 2
    by_hand = (expected.softmax(1) * centres[:, None, None]).sum(1)
    torch.testing.assert_close(depth, by_hand)  # 4 × 2 × 3 is the image's own size here


def test_depth_loss_ignores_invalid_pixels_in_both_parts():
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 2, 2)
    target = torch.tensor([[[1.0, 0.0], [3.5, 20.0]]])  # two valid pixels of bins 1 and 3
    frame = PatchFrame((2, 2), (0, 0, 0, 0), (2, 2))
    limits = {"min_depth": 0.001, "max_depth": 4}
    depth = expected_depth(logits, frame, **limits)
    loss = depth_loss(logits, depth, target, frame, **limits)
    d = (depth[0, :, 0] + 1e-3).log() - (target[0, :, 0] + 1e-3).log()
    log_probabilities = logits.log_softmax(1)[0]
    # the first bin ends at 1.00075, so 1 m lies in bin 0
    entropy = -(log_probabilities[0, 0, 0] + log_probabilities[3, 1, 0]) / 2
    expected = 10 * ((d**2).mean() - 0.85 * d.mean() ** 2) + entropy
    torch.testing.assert_close(loss, expected)
    other = target.clone()
    other[0, 1, 1] = -5.0
    assert_same_outputs(depth_loss(logits, depth, other, frame, **limits), loss)
    assert depth_loss(logits, depth, torch.zeros_like(target), frame, **limits) == 0


def test_padding_keeps_the_image_in_the_middle(teacher):
    config = make_raptor(teacher, [6]).config
    config.teacher_config.patch_size = 14
    assert PatchFrame.of((480, 640), config) == ((490, 644), (2, 2, 5, 5), (35, 46))
    assert PatchFrame.of((518, 518), config) == ((518, 518), (0, 0, 0, 0), (37, 37))
    assert PatchFrame.of((13, 27), config) == ((14, 28), (0, 1, 0, 1), (1, 2))


def test_images_of_any_size(teacher):
    images = torch.randn(1, 3, 10, 12)
    depth = dense_model(RaptorForDepthEstimation, teacher)
    outputs = depth(images, labels=torch.full((1, 10, 12), 2.0))
    padded = depth(nn.functional.pad(images, (0, 0, 1, 1)))
    torch.testing.assert_close(outputs.predicted_depth, padded.predicted_depth[:, 1:-1])
    assert outputs.loss.isfinite()
    segmentation = dense_model(RaptorForSemanticSegmentation, teacher, num_labels=3)
    assert segmentation(images).logits.shape == (1, 3, 10, 12)


def test_segmentation_at_its_edges(teacher, wide_images):
    model = dense_model(RaptorForSemanticSegmentation, teacher, num_labels=3)
    nothing = model(wide_images, labels=torch.full((2, 8, 12), 255)).loss
    assert nothing == 0.0 and nothing.requires_grad
    with pytest.raises(ValueError, match="two labels or more"):
        one = dense_model(RaptorForSemanticSegmentation, teacher, num_labels=1)
        one(wide_images, labels=torch.zeros(2, 8, 12, dtype=torch.long))


def test_depth_in_whole_metres(teacher, wide_images):
    model = dense_model(RaptorForDepthEstimation, teacher)
    metres = torch.full((2, 8, 12), 2)
    found, expected = (model(wide_images, labels=m).loss for m in (metres, metres.float()))
    assert torch.equal(found, expected)
