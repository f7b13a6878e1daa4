import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from torch import nn

from raptor_hf import make_raptor
from raptor_hf.activations.online import OnlineActivations
from raptor_hf.distillation.fidelity import trajectory_r2
from raptor_hf.distillation.provenance import model_facts
from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.probes.arguments import ProbeArguments
from raptor_hf.probes.features import Features, to_arrow
from raptor_hf.probes.heads import Candidate, ProbeHeads, head_grid, train_heads
from raptor_hf.probes.scores import (
    predict_by_head,
    predict_by_neighbours,
    predict_constant,
    score,
)
from raptor_hf.tasks.task import Classification, Depth, Segmentation
from tests.helpers import build_arguments, randomised


def stored(features, targets):
    """Features as `compute_features` returns them."""
    columns = {"features": features, "target": targets, "image_id": torch.arange(len(targets))}
    table = pa.table({name: to_arrow(values.numpy()) for name, values in columns.items()})
    return Features(Dataset(table))


@pytest.fixture
def linear_task(teacher):
    """Three classes that are linear in the first half of 48 features: task, train, selection,
    validation.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 48, generator=generator)
    labels = (features[:, :24] @ torch.randn(24, 3, generator=generator)).argmax(1)
    parts = (slice(0, 320), slice(320, 400), slice(400, 500))
    sets = [stored(features[part], labels[part]) for part in parts]
    return Classification(teacher.config, 3), *sets


def probe_arguments(tmp_path, **values):
    defaults = {"epochs": 20, "batch_size": 100, "learning_rate": 0.05, "warmup_steps": 2}
    defaults |= {"output_dir": str(tmp_path / "run"), "report_to": "none", "steps": None}
    return build_arguments(defaults | values, ProbeArguments, LoopArguments)


def test_the_best_head_of_a_grid_is_selected_apart_from_validation(linear_task, tmp_path):
    poolings = ["cls_patches", "cls", "patches"]
    arguments = probe_arguments(tmp_path, learning_rate_grid=[0.001, 1], poolings=poolings)
    task, train, selection, validation = linear_task
    head, selected = train_heads(task, train, selection, *arguments)
    # the second half of the features says nothing, and a rate of 5e-5 learns nothing
    assert selected["learning_rate"] == 0.05 and selected["pooling"] != "patches"
    assert 0 < selected["selection_loss"] < 0.4
    metrics = score(task, validation, predict_by_head(task, head))
    assert metrics["accuracy"] > 0.85
    batch = validation.__getitems__(list(range(100)))
    right = head(batch["features"]).argmax(1) == batch["target"]
    assert right.float().mean().item() == pytest.approx(metrics["accuracy"])


def test_heads_of_a_grid_learn_as_if_each_were_alone(linear_task, tmp_path):
    alone, _ = train_heads(*linear_task[:3], *probe_arguments(tmp_path / "a", epochs=3))
    grid = probe_arguments(tmp_path / "b", epochs=3, learning_rate_grid=[1, 0.3])
    among, selected = train_heads(*linear_task[:3], *grid)
    assert selected["learning_rate"] == 0.05
    torch.testing.assert_close(among.weight, alone.weight)


def test_a_batch_is_never_larger_than_the_images(linear_task, tmp_path):
    arguments = probe_arguments(tmp_path, batch_size=512, epochs=3)
    train_heads(*linear_task[:3], *arguments)
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"step": 3,' in text and '"step": 4,' not in text


def test_a_head_on_cls_alone_is_zero_elsewhere_and_stays_so(linear_task, tmp_path):
    head, _ = train_heads(*linear_task[:3], *probe_arguments(tmp_path, poolings=["cls"]))
    assert (head.weight[:, 24:] == 0).all() and (head.weight[:, :24] != 0).all()
    start = nn.Linear(48, 3)
    (head,) = ProbeHeads(linear_task[0], [Candidate(1.0, "patches")], start).heads
    assert torch.equal(head.weight[:, 24:], start.weight[:, 24:])
    assert (head.weight[:, :24] == 0).all()


def test_a_head_is_judged_without_training(linear_task, tmp_path):
    head = nn.Linear(48, 3)
    arguments = probe_arguments(tmp_path, steps=0, learning_rate_grid=[0.1, 1])
    assert head_grid(*arguments, Classification) == [Candidate(0.05, "cls_patches")]
    judged, _ = train_heads(*linear_task[:3], *arguments, start=head)
    assert torch.equal(judged.weight, head.weight)


def test_nearest_neighbours_vote_by_the_cosine_of_cls(teacher):
    task = Classification(teacher.config, 2)
    features = torch.zeros(5, 48)
    features[:4, 0] = torch.tensor([1.0, 5.0, -1.0, -2.0])  # length makes no difference
    features[:, 1] = 0.1
    features[4] = features[1] + 0.01
    labels = torch.tensor([0, 1, 1, 0, 0])
    train, test = stored(features[:4], labels[:4]), stored(features[4:], labels[4:])
    one = score(task, test, predict_by_neighbours(train, task, neighbours=1))
    assert one["accuracy"] == 0  # the nearest one, 5, has class 1
    assert score(task, test, predict_by_neighbours(train, task, neighbours=4))["top5"] == 1


def test_the_constant_answer_by_hand(teacher):
    def constant(task, train, targets):
        features = torch.zeros(len(targets), 1)
        return score(task, stored(features, targets), predict_constant(task.constant(train)))

    result = constant(Classification(teacher.config, 3), [1, 1, 2], torch.tensor([1, 0]))
    assert result == {"accuracy": 0.5, "top5": 1.0}
    masks = torch.tensor([[[0, 1], [1, 255]], [[1, 1], [2, 2]]]).to(torch.uint8)
    task = Segmentation(teacher.config, 3)
    result = constant(task, [np.array([[1, 1], [0, 255]])], masks)
    assert result["pixel_accuracy"] == pytest.approx(4 / 7)
    assert result["miou"] == pytest.approx(4 / 7 / 3)
    with pytest.raises(ValueError, match="No pixel of 1 masks has a class"):
        task.constant([np.array([[255, 255]])])
    depth, task = torch.tensor([[[2.0, 0.0]], [[4.0, 20.0]]]), Depth(teacher.config, 8)
    # known within 10 m: 3 and 5
    result = constant(task, [np.array([[3.0, 0.0, 50.0, 5.0]])], depth)
    assert result["rmse_m"] == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="within 10 m. Check --depth_unit_m"):
        task.constant([np.array([[0.0, 50.0]])])


def test_depth_is_judged_on_the_crop_alone(teacher):
    task = Depth(teacher.config, 8, eval_crop=[1, 3, 0, 2])
    target = torch.full((1, 4, 4), 2.0)
    prediction = target.clone()
    prediction[:, 0] = prediction[:, :, 2:] = 9.0
    statistics = task.statistics(prediction, target)
    assert (statistics["squared_error"], statistics["count"]) == ([0.0], [4])
    with pytest.raises(ValueError, match="judges rows 1–3 and columns 0–2, but .* 2×4 pixels"):
        task.statistics(prediction[:, :2], target[:, :2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_crop": [0, 1]}, "4 numbers"),
        ({"eval_crop": [0, 1, 0, 1]}, "depth"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"poolings": ["cls"]}, r"poolings of segmentation are patches; got \['cls'\]"),
        ({"optimizer": "muon"}, "linear heads learn by adamw"),
    ],
)
def test_contradictions_of_a_recipe_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        head_grid(*probe_arguments(tmp_path, **values), Segmentation)


def test_r2_is_one_for_a_perfect_student_and_falls_for_a_worse_one(teacher, images):
    student = make_raptor(teacher, [1] * 6, init="teacher").eval()
    for block in student.blocks:
        block.depth_scaling = None
    perfect = trajectory_r2(student, OnlineActivations(teacher, images))
    assert min(perfect["layers"]["all"]) > 1 - 1e-6
    assert len(perfect["layers"]["cls"]) == 6
    worse = randomised(make_raptor(teacher, [6]))
    assert trajectory_r2(worse, OnlineActivations(teacher, images))["mean"]["all"] < 0.9


def test_parameters_are_counted_per_block_or_layer(teacher):
    raptor = make_raptor(teacher, [4, 2])
    d = 24
    # attention, FFN, norms, LayerScales
    layer = 4 * d * d + 4 * d + 8 * d * d + 5 * d + 4 * d + 2 * d
    scaling = 2 * 16 + 16 * 3 * d + 3 * d
    assert model_facts(teacher) == {"phases": None, "block_parameters": 6 * layer}
    assert model_facts(raptor) == {"phases": [4, 2], "block_parameters": 2 * (layer + scaling)}
