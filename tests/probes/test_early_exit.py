import math

import pytest
import torch

from raptor_hf import RaptorForImageClassification, RaptorModel
from raptor_hf.probes.early_exit import (
    applications_after_exit,
    cheapest,
    evaluate_early_exit,
    exit_curves,
)
from raptor_hf.reports.report import early_exit_section
from tests.helpers import randomised, result


@pytest.fixture
def classifier(teacher):
    config = RaptorModel.from_teacher(teacher, [2, 4]).config
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
        outputs = classifier(batch["pixel_values"])
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
