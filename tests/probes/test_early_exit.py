import math
import sys

import pytest
import torch
from PIL import Image

from raptor_hf import RaptorForImageClassification, make_raptor
from raptor_hf.data import ImageViews, load_images, make_processor
from raptor_hf.probes.early_exit import (
    applications_after_exit,
    cheapest,
    evaluate_early_exit,
    exit_curves,
)
from raptor_hf.reports.report import early_exit_section
from raptor_hf.runs.files import read_json
from tests.helpers import randomised, result
from tests.programs import run


@pytest.fixture
def classifier(teacher):
    config = make_raptor(teacher, [2, 4]).config
    config.num_labels = 2
    model = randomised(RaptorForImageClassification(config))
    with torch.no_grad():
        for block in model.raptor.blocks:
            block.layer_scale1 *= 0.1
            block.layer_scale2 *= 0.1
    return model


def test_exits_by_hand():
    turns = [[30, 2, 20, 2, 8, 1], [30, 30, 30, 30, 30, 30]]  # degrees an application
    total = torch.cumsum(torch.tensor([[0, *row] for row in turns]).float(), dim=1)
    cls = torch.stack([torch.cos(torch.deg2rad(total)), torch.sin(torch.deg2rad(total))], dim=-1)
    assert applications_after_exit(cls, 5.0, start=0).tolist() == [2, 6]
    assert applications_after_exit(cls, 5.0, start=2).tolist() == [4, 6]
    assert applications_after_exit(cls, 1.5, start=2).tolist() == [6, 6]
    assert applications_after_exit(cls, 31.0, start=3).tolist() == [4, 4]


def test_curves_are_what_the_model_does(classifier, images):
    curves = exit_curves(classifier, images, batch_size=4)
    batch = images.__getitems__(list(range(len(images))))

    @torch.no_grad()
    def accuracy_and_applications():
        outputs = classifier(batch["pixel_values"], output_hidden_states=True)
        states = torch.stack(outputs.hidden_states, dim=1)
        moved = (states[:, 1:] != states[:, :-1]).any(dim=-1).any(dim=-1)
        correct = outputs.logits.argmax(-1) == batch["label"]
        return correct.float().mean().item(), moved.float().sum(1).mean().item()

    for point in curves["angle"][::9]:
        classifier.config.exit_angle = point["angle"]
        found = (point["accuracy"], point["applications"])
        assert found == pytest.approx(accuracy_and_applications())
    classifier.config.exit_angle = None
    assert len({point["applications"] for point in curves["angle"]}) > 2
    for number, point in enumerate(curves["spread"], start=1):
        classifier.config.num_applications = number
        found = (point["accuracy"], point["applications"])
        assert found == pytest.approx(accuracy_and_applications())
    classifier.config.num_applications = None
    full = accuracy_and_applications()
    for kind in ("spread", "first"):
        last = curves[kind][-1]
        assert (last["accuracy"], last["applications"]) == pytest.approx(full)


def test_the_cheapest_point_that_loses_little():
    points = [
        {"applications": a, "accuracy": b}
        for a, b in [(3, 0.9), (5, 0.975), (4, 0.98), (12, 0.981), (8, 0.99)]
    ]
    assert cheapest(points) == 2
    assert cheapest(points, tolerance=0) == 4
    assert cheapest(points, tolerance=1) == 0


def test_what_is_saved_is_told_in_the_report(classifier, images, tmp_path):
    metrics = evaluate_early_exit(classifier, images, images)
    for kind, point in metrics["chosen"].items():
        assert point["saved"] == pytest.approx(1 - point["applications"] / 6)
        assert point["lost"] <= 0.01 and not math.isnan(point["lost"])
        assert point in [{**p, "saved": point["saved"], "lost": point["lost"]}
                         for p in metrics["curves"][kind]]  # fmt: skip
    rows = [
        result("raptor_k2", "early_exit", 0, metrics, [2, 4], 300),
        result("teacher", "classification", 0, {"accuracy": 0.9}),
    ]
    text = "\n".join(early_exit_section(rows, tmp_path))
    saved = 100 * metrics["chosen"]["spread"]["saved"]
    assert f"| raptor_k2 | spread | {saved:.1f} |" in text
    assert (tmp_path / "early_exit.png").read_bytes().startswith(b"\x89PNG")
    assert early_exit_section(rows[1:], tmp_path) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog"], None),
        (["dog", "cat"], None),
        (["ant", "cat"], "knows no class 'ant' (1 of the 2 classes of the images)"),
        (["ant", "bee", "cat"], "knows no class 'ant', 'bee' (2 of the 3"),
        ([], "has no labels: accuracy needs some"),
    ],
)
def test_classes_are_those_of_the_head(classifier, names, message, tmp_path):
    """The same pictures in the same classes have the same accuracy, whatever their order."""
    folder = tmp_path / "model"
    classifier.config.id2label = {0: "dog", 1: "cat"}
    classifier.save_pretrained(folder)
    make_processor(8).save_pretrained(folder)
    for split in ("train", "test"):
        for n in range(6):
            name = names[n % len(names)] if names else "."
            file = tmp_path / "pets" / split / name / f"{n}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 40 * n).save(file)
    command = ["evaluation/early_exit.py", "--models", f"r={folder}", "--dataset"]
    command += [tmp_path / "pets", "--output_dir", tmp_path / "out"]
    done = run(sys.executable, *command, check=message is None)
    if message:
        assert done.returncode and message in done.stderr
        return
    curves = read_json(tmp_path / "out" / "results" / "r_early_exit.json")["metrics"]["curves"]
    views = ImageViews(load_images(str(tmp_path / "pets"), "test"), make_processor(8))
    batch = views.__getitems__(list(range(6)))
    outputs = classifier(batch["pixel_values"]).logits.argmax(-1).tolist()
    labels = batch["label"].tolist()
    right = [
        views.class_names[label] == classifier.config.id2label[output]
        for label, output in zip(labels, outputs, strict=True)
    ]
    assert curves["first"][-1]["accuracy"] == pytest.approx(sum(right) / 6)
