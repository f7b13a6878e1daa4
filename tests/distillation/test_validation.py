import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from raptor_hf import make_raptor
from raptor_hf.data import ReadingArguments
from raptor_hf.data.loading import Classes
from raptor_hf.distillation.blocks import Chain, Span
from raptor_hf.distillation.fidelity import (
    TrajectoryValidation,
    ValidationArguments,
    open_validation,
    teacher_head,
)
from raptor_hf.distillation.rollout import rollout
from raptor_hf.metrics import RSquared, state_statistics
from raptor_hf.modeling_raptor_heads import pool_tokens
from raptor_hf.teachers import load_backbone, trajectory
from tests.helpers import randomised


@pytest.fixture
def head():
    torch.manual_seed(3)
    return nn.Linear(48, 2)


def layer_chains(teacher, edges):
    """Chains of blocks that are the teacher's own layers, one block a layer."""
    raptor = make_raptor(teacher, [1] * 6, init="teacher").eval()
    for block in raptor.blocks:
        block.depth_scaling = None
    return [
        Chain([Span(raptor.blocks[i], i, i + 1) for i in range(start, stop)], None)
        for start, stop in zip(edges, edges[1:], strict=False)
    ]


@torch.no_grad()
def test_the_teachers_own_layers_score_what_the_teacher_scores(teacher, head, images):
    batch = images.__getitems__(list(range(10)))
    logits = head(pool_tokens(teacher(batch["pixel_values"]).last_hidden_state, teacher.config))
    accuracy = (logits.argmax(-1) == batch["label"]).float().mean().item()
    validate = TrajectoryValidation(teacher, head, images, layer_chains(teacher, [0, 2, 6]))
    scalars = validate()
    assert list(scalars) == ["0-2/accuracy", "0-2/r2", "2-6/accuracy", "2-6/r2"]
    for name in ("0-2", "2-6"):
        assert scalars[f"{name}/accuracy"] == pytest.approx(accuracy)
        assert scalars[f"{name}/r2"] == pytest.approx(1.0, abs=1e-6)


@torch.no_grad()
def test_unfinished_blocks_are_finished_by_the_teachers_layers(teacher, head, images):
    block = randomised(make_raptor(teacher, [4, 2])).blocks[0]
    validate = TrajectoryValidation(
        teacher, head, images, [Chain([Span(block, 1, 4)], None)], num_images=7, batch_size=3
    )
    assert len(validate.rows) == 7
    batch = images.__getitems__(validate.rows)
    target = trajectory(teacher, batch["pixel_values"])
    states = rollout([Span(block, 1, 4)], target[:, 1:5], resets={1})
    logits = states[:, -1]
    for layer in teacher.encoder.layer[4:]:
        logits = layer(logits)
    logits = head(pool_tokens(teacher.layernorm(logits), teacher.config))
    metric = RSquared(keep_in_memory=True)
    groups = {"cls": slice(0, 1), "registers": slice(1, 3), "patches": slice(3, None)}
    whole = torch.cat([target[:, 1:2], states], 1)
    metric.add_batch(**state_statistics(prediction=whole, target=target[:, 1:5], groups=groups))
    scalars = validate()
    expected = (logits.argmax(-1) == batch["label"]).float().mean().item()
    assert scalars["1-4/accuracy"] == pytest.approx(expected)
    assert scalars["1-4/r2"] == pytest.approx(metric.compute()["mean"]["all"])


def test_zero_images_are_all(teacher, images):
    chains = layer_chains(teacher, [0, 6])
    assert len(TrajectoryValidation(teacher, None, images, chains, num_images=0).rows) == 10


def test_without_a_head_there_is_r2_alone(teacher, images):
    with torch.no_grad():
        scalars = TrajectoryValidation(teacher, None, images, layer_chains(teacher, [0, 6]))()
    assert list(scalars) == ["0-6/r2"]


def test_an_interval_without_a_dataset_is_refused(teacher):
    options = {"reading": ReadingArguments(), "processor": None}
    assert open_validation(ValidationArguments(), teacher, [], **options) is None
    with pytest.raises(ValueError, match="validate_every=5 needs --validation_dataset"):
        open_validation(ValidationArguments(validate_every=5), teacher, [], **options)


def test_a_head_that_nobody_asked_for_is_left_out_where_it_does_not_fit(tmp_path, caplog):
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    classifier = load_backbone(str(tmp_path))
    assert teacher_head(classifier, None, Classes(None, 3)) is None
    assert "Validation without accuracy" in caplog.text
    with pytest.raises(ValueError, match="expected a model of classification"):
        teacher_head(classifier, str(tmp_path), Classes(None, 3))
