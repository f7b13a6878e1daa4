import json

import numpy as np
import pytest
import torch
from torch import nn

from raptor_hf import make_raptor
from raptor_hf.activations.online import OnlineActivations
from raptor_hf.distillation.fidelity import trajectory_r2
from raptor_hf.distillation.provenance import model_facts
from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.probes.arguments import ProbeArguments
from raptor_hf.probes.baselines import constant_metrics, nearest_neighbours
from raptor_hf.probes.datasets import Candidate, ProbeData, head_grid
from raptor_hf.probes.features import StoredFeatures
from raptor_hf.probes.training import PooledLinear, ProbeHeads, best_epoch, train_probe
from raptor_hf.runs.arguments import build_arguments
from raptor_hf.tasks.heads import attach_head
from raptor_hf.tasks.labelled_images import LabelledImages
from raptor_hf.tasks.task import Classification, Depth, Segmentation
from tests.helpers import randomised


def stored(folder, features, targets, image_ids=None):
    """Features in files, as `store_features` leaves them."""
    folder.mkdir(parents=True)
    np.save(folder / "features.npy", features.numpy())
    np.save(folder / "targets.npy", targets.numpy())
    ids = list(range(len(targets))) if image_ids is None else image_ids
    (folder / "complete.json").write_text(json.dumps({"image_ids": ids}))
    return StoredFeatures(folder)


@pytest.fixture
def linear_task(tmp_path, teacher):
    """Three classes that are linear in the first half of 48 features: (task, data)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 48, generator=generator)
    labels = (features[:, :24] @ torch.randn(24, 3, generator=generator)).argmax(1)
    train = stored(tmp_path / "train", features[:400], labels[:400])
    validation = stored(tmp_path / "validation", features[400:], labels[400:])
    selection = train.subset(np.arange(0, 400, 5))
    return Classification(teacher.config, 3), ProbeData(train, selection, validation, train)


def probe_arguments(tmp_path, **values):
    defaults = {"epochs": 20, "batch_size": 100, "learning_rate": 0.05, "warmup_steps": 2}
    defaults |= {"output_dir": str(tmp_path / "run"), "report_to": "none", "steps": None}
    return build_arguments(defaults | values, ProbeArguments, LoopArguments)


def test_the_best_head_of_a_grid_is_selected_apart_from_validation(linear_task, tmp_path, teacher):
    task, data = linear_task
    poolings = ["cls_patches", "cls", "patches"]
    arguments = probe_arguments(tmp_path, learning_rate_grid=[0.001, 1], poolings=poolings)
    probe = train_probe(task, data, *arguments, teacher)
    # the second half of the features says nothing, and a rate of 5e-5 learns nothing
    assert probe.selected["learning_rate"] == 0.05 and probe.selected["pooling"] != "patches"
    assert probe.metrics["accuracy"] > 0.85
    assert 0 < probe.selected["selection_loss"] < 0.4
    best = probe.best_on_validation
    assert best["metrics"]["accuracy"] >= probe.metrics["accuracy"]
    assert 1 <= best["epoch"] <= 20
    with torch.no_grad():
        batch = data.validation.__getitems__(list(range(100)))
        right = probe.head(batch["features"]).argmax(1) == batch["target"]
    assert right.float().mean().item() == pytest.approx(probe.metrics["accuracy"])


def test_heads_of_a_grid_learn_as_if_each_were_alone(linear_task, tmp_path, teacher):
    task, data = linear_task
    alone = train_probe(task, data, *probe_arguments(tmp_path / "a", epochs=3), teacher)
    grid = probe_arguments(tmp_path / "b", epochs=3, learning_rate_grid=[1, 0.3])
    among = train_probe(task, data, *grid, teacher)
    assert among.selected["learning_rate"] == 0.05
    torch.testing.assert_close(among.head.weight, alone.head.weight)


def test_twins_never_see_the_images_that_select(linear_task, teacher):
    task, data = linear_task
    batch = data.train.__getitems__([0, 1, 2, 3])
    held_out = torch.tensor([True, False, True, False])
    heads = ProbeHeads(task, [Candidate(1.0, "cls_patches")], None, twins=True)
    heads.heads[0].start_from(nn.Linear(48, 3))
    heads.twins[0].start_from(heads.heads[0])
    head, twin = heads(batch["features"], batch["target"], held_out)
    rows = [nn.functional.cross_entropy(heads.heads[0](x), y)
            for x, y in zip(batch["features"], batch["target"], strict=True)]  # fmt: skip
    torch.testing.assert_close(head, torch.stack(rows).mean())
    torch.testing.assert_close(twin, (rows[1] + rows[3]) / 2)
    _, empty = heads(batch["features"], batch["target"], torch.ones(4, dtype=torch.bool))
    assert empty == 0 and empty.requires_grad


def test_a_head_on_cls_alone_is_zero_elsewhere_and_stays_so(linear_task, tmp_path, teacher):
    task, data = linear_task
    probe = train_probe(task, data, *probe_arguments(tmp_path, poolings=["cls"]), teacher)
    assert (probe.head.weight[:, 24:] == 0).all() and (probe.head.weight[:, :24] != 0).all()
    given = nn.Linear(48, 3)
    pooled = PooledLinear(task, "patches")
    pooled.start_from(given)
    assert torch.equal(pooled.weight[:, 24:], given.weight[:, 24:])
    assert (pooled.weight[:, :24] == 0).all()


def test_a_given_head_is_judged_as_it_is(linear_task, tmp_path, teacher):
    task, data = linear_task
    head = nn.Linear(48, 3)
    arguments = probe_arguments(tmp_path, steps=0, learning_rate_grid=[0.1, 1])
    assert head_grid(*arguments, Classification) == [Candidate(0.05, "cls_patches")]
    probe = train_probe(task, data, *arguments, teacher, head)
    assert torch.equal(probe.head.weight, head.weight)
    with pytest.raises(ValueError, match="The head has 4 classes, but 3 are asked for"):
        train_probe(task, data, *arguments, teacher, nn.Linear(48, 4))
    with pytest.raises(ValueError, match="The head has 8 bins of depth, but 16 are asked for"):
        train_probe(Depth(teacher.config, 16), data, *arguments, teacher, nn.Linear(48, 8))


def test_the_best_epoch_is_read_off_the_log(teacher):
    log = [{"step": 5, "a/rmse_m": 0.7, "b/rmse_m": 0.1}, {"step": 7, "loss": 1.0}]
    log += [{"step": 10, "a/rmse_m": 0.5, "b/rmse_m": 0.2}, {"step": 12, "a/rmse_m": 0.6}]
    found = best_epoch(Depth(teacher.config, 4), log, "a", 5)
    assert found == {"epoch": 2, "metrics": {"rmse_m": 0.5}}
    assert best_epoch(Depth(teacher.config, 4), log, "b", 5)["epoch"] == 1


def test_nearest_neighbours_vote_by_the_cosine_of_cls(tmp_path, teacher):
    task = Classification(teacher.config, 2)
    features = torch.zeros(5, 48)
    features[:4, 0] = torch.tensor([1.0, 5.0, -1.0, -2.0])  # length makes no difference
    features[:, 1] = 0.1
    features[4] = features[1] + 0.01
    labels = torch.tensor([0, 1, 1, 0, 0])
    train, test = stored(tmp_path / "a", features[:4], labels[:4]), tmp_path / "b"
    one = nearest_neighbours(train, stored(test, features[4:], labels[4:]), task, neighbours=1)
    assert one["accuracy"] == 0  # the nearest one, 5, has class 1
    both = nearest_neighbours(train, StoredFeatures(test), task, neighbours=4)
    assert both["top5"] == 1


def test_the_constant_answer_by_hand(tmp_path, teacher):
    class Rows(list):
        column_names = ("x", "target")

    def of(targets):
        return LabelledImages(
            "", Rows({"x": 0, "target": t} for t in targets), lambda cell, _: cell
        )

    features = torch.zeros(2, 1)
    labels = stored(tmp_path / "a", features, torch.tensor([1, 0]))
    result = constant_metrics(Classification(teacher.config, 3), of([1, 1, 2]), labels)
    assert result == {"accuracy": 0.5, "top5": 1.0}
    masks = torch.tensor([[[0, 1], [1, 255]], [[1, 1], [2, 2]]]).to(torch.uint8)
    train = of([np.array([[1, 1], [0, 255]])])
    result = constant_metrics(
        Segmentation(teacher.config, 3), train, stored(tmp_path / "b", features, masks)
    )
    assert result["pixel_accuracy"] == pytest.approx(4 / 7)
    assert result["miou"] == pytest.approx(4 / 7 / 3)
    depth = torch.tensor([[[2.0, 0.0]], [[4.0, 20.0]]])
    train = of([np.array([[3.0, 0.0, 50.0, 5.0]])])  # known within 10 m: 3 and 5
    result = constant_metrics(
        Depth(teacher.config, 8), train, stored(tmp_path / "c", features, depth)
    )
    assert result["rmse_m"] == pytest.approx(2**0.5)


def test_depth_is_judged_on_the_crop_alone(teacher):
    task = Depth(teacher.config, 8, eval_crop=[1, 3, 0, 2])
    target = torch.full((1, 4, 4), 2.0)
    prediction = target.clone()
    prediction[:, 0] = prediction[:, :, 2:] = 9.0
    assert task.statistics(prediction, target)["squared_error"] == [0.0]
    assert task.statistics(prediction, target)["count"] == [4]
    with pytest.raises(ValueError, match="judges rows 1–3 and columns 0–2, but .* 2×4 pixels"):
        task.statistics(prediction[:, :2], target[:, :2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_crop": [0, 1]}, "eval_crop takes 4 numbers"),
        ({"eval_crop": [0, 1, 0, 1]}, "eval_crop is for depth alone"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1"),
    ],
)
def test_contradictions_of_a_recipe_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        probe_arguments(tmp_path, **values)


def test_poolings_are_those_of_the_task(tmp_path):
    arguments = probe_arguments(tmp_path, poolings=["cls"])
    with pytest.raises(ValueError, match=r"poolings of segmentation are patches; got \['cls'\]"):
        head_grid(*arguments, Segmentation)


def test_r2_is_one_for_a_perfect_student_and_falls_for_a_worse_one(teacher, images):
    student = make_raptor(teacher, [1] * 6, init="teacher").eval()
    for block in student.blocks:
        block.depth_scaling = None
    perfect = trajectory_r2(student, OnlineActivations(teacher, images), batch_size=4)
    assert min(perfect["layers"]["all"]) > 1 - 1e-6
    assert len(perfect["layers"]["cls"]) == 6
    worse = trajectory_r2(randomised(make_raptor(teacher, [6])), OnlineActivations(teacher, images))
    assert worse["mean"]["all"] < 0.9


def test_classifier_is_backbone_and_probe(teacher, pixel_values):
    raptor = randomised(make_raptor(teacher, [4, 2]))
    probe = nn.Linear(48, 2)
    classifier = attach_head(raptor, probe, ["even", "odd"])
    states = raptor(pixel_values).last_hidden_state
    expected = probe(torch.cat([states[:, 0], states[:, 3:].mean(1)], 1))
    torch.testing.assert_close(classifier(pixel_values).logits, expected)
    assert classifier.config.id2label == {0: "even", 1: "odd"}


def test_parameters_are_counted_per_block_or_layer(teacher):
    raptor = make_raptor(teacher, [4, 2])
    d = 24
    layer = (
        4 * d * d + 4 * d + 8 * d * d + 5 * d + 4 * d + 2 * d
    )  # attention, FFN, norms, LayerScales
    scaling = 2 * 16 + 16 * 3 * d + 3 * d
    assert model_facts(teacher) == {"phases": None, "block_parameters": 6 * layer}
    assert model_facts(raptor) == {"phases": [4, 2], "block_parameters": 2 * (layer + scaling)}
