import torch
from torch import nn

from raptor_hf import RaptorModel
from raptor_hf.heads import attach_head
from raptor_hf.loop import LoopArguments
from raptor_hf.probes import (
    FeatureDataset,
    extract_features,
    model_facts,
    probe_accuracy,
    train_linear_probe,
    trajectory_r2,
)
from tests.test_modeling_raptor import randomised


def test_features_are_cls_and_mean_patch_for_teacher_and_raptor(teacher, images):
    features = extract_features(teacher, images, batch_size=3)
    batch = images.__getitems__(list(range(10)))
    states = teacher(batch["pixel_values"]).last_hidden_state
    expected = torch.cat([states[:, 0], states[:, 3:].mean(1)], 1)
    torch.testing.assert_close(features.features, expected)
    assert torch.equal(features.labels, batch["label"])
    raptor = RaptorModel.from_teacher(teacher, [1] * 6, init="teacher").eval()
    for block in raptor.blocks:
        block.depth_scaling = None
    torch.testing.assert_close(extract_features(raptor, images).features, expected)


def test_a_probe_learns_what_is_linear(tmp_path):
    torch.manual_seed(0)
    features = torch.randn(400, 6)
    labels = (features @ torch.randn(6, 3)).argmax(1)
    data = FeatureDataset(features[:300], labels[:300])
    arguments = LoopArguments(
        output_dir=str(tmp_path), steps=200, batch_size=100, learning_rate=0.05, report_to="none"
    )
    probe = train_linear_probe(data, 3, arguments)
    assert probe_accuracy(probe, FeatureDataset(features[300:], labels[300:])) > 0.9


def test_r2_is_one_for_a_perfect_student_and_falls_for_a_worse_one(teacher, images):
    student = RaptorModel.from_teacher(teacher, [1] * 6, init="teacher").eval()
    for block in student.blocks:
        block.depth_scaling = None
    perfect = trajectory_r2(student, teacher, images, batch_size=4)
    assert min(perfect["layers"]["all"]) > 1 - 1e-6
    assert len(perfect["layers"]["cls"]) == 6
    worse = trajectory_r2(randomised(RaptorModel.from_teacher(teacher, [6])), teacher, images)
    assert worse["mean"]["all"] < 0.9


def test_classifier_is_backbone_and_probe(teacher, pixel_values):
    raptor = randomised(RaptorModel.from_teacher(teacher, [4, 2]))
    probe = nn.Linear(48, 2)
    classifier = attach_head(raptor, probe, ["even", "odd"])
    states = raptor(pixel_values).last_hidden_state
    expected = probe(torch.cat([states[:, 0], states[:, 3:].mean(1)], 1))
    torch.testing.assert_close(classifier(pixel_values).logits, expected)
    assert classifier.config.id2label == {0: "even", 1: "odd"}


def test_parameters_are_counted_per_block_or_layer(teacher):
    raptor = RaptorModel.from_teacher(teacher, [4, 2])
    d = 24
    layer = (
        4 * d * d + 4 * d + 8 * d * d + 5 * d + 4 * d + 2 * d
    )  # attention, FFN, norms, LayerScales
    scaling = 2 * 16 + 16 * 3 * d + 3 * d
    assert model_facts(teacher) == {"phases": None, "block_parameters": 6 * layer}
    assert model_facts(raptor) == {"phases": [4, 2], "block_parameters": 2 * (layer + scaling)}
