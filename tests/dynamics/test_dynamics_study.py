"""The study of depth as time: one pass over the images, claims, the program."""

import json
import sys

import numpy as np
import pytest
import torch

from evaluation.dynamics.claims import claims_page, figures_of_claims, judge_depth
from evaluation.dynamics.figures import draw_study
from evaluation.dynamics.study import study_models
from evaluation.verdicts import (
    verdict_word,
)
from raptor_hf import make_raptor
from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.runs.files import read_json
from tests.helpers import LAYOUT, randomised, save_models
from tests.programs import ACCELERATE_LAUNCH, ROOT, run

PARTITIONS = [[2, 4], [2, 2, 2]]


@pytest.fixture
def systems(teacher):
    torch.manual_seed(0)
    model = randomised(make_raptor(teacher, [2, 4])).eval().requires_grad_(False)
    return [DepthSystem("teacher", teacher, LAYOUT), DepthSystem("raptor_k2", model, LAYOUT)]


@pytest.fixture
def pictures():
    """20 images of two classes."""
    generator = torch.Generator().manual_seed(0)
    return Pictures(torch.rand(20, 3, 8, 8, generator=generator), torch.arange(20) % 2)


class Pictures:
    """Images in memory, as `ImageViews` gives them."""

    def __init__(self, pixel_values, labels):
        self.pixel_values, self.labels, self.image_ids = pixel_values, labels, np.arange(20)

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, rows):
        rows = torch.as_tensor(rows)
        batch = {"pixel_values": self.pixel_values[rows], "label": self.labels[rows]}
        return batch | {"image_id": rows, "view": torch.zeros_like(rows)}


class Recorded:
    """States in memory, (20, 5, N, D), of a model that can't be run on."""

    name, depth, phases, is_raptor, can_run_on = "recorded", 4, None, False, False

    def __init__(self, states, layout):
        self.states, self.layout = states, layout

    def trajectory(self, batch):
        return self.states[batch["image_id"]]


def numbers(result):
    """All numbers of a result, in order."""
    if isinstance(result, dict):
        result = result.values()
    elif not isinstance(result, list):
        return [result] if isinstance(result, float | int) else []
    return [number for part in result for number in numbers(part)]


def test_streamed_equals_all_at_once(systems, pictures):
    runs = []
    for batch_size in (20, 7):
        runs.append(study_models(systems, pictures, PARTITIONS, batch_size=batch_size))
    models, nulls = runs[0]
    teacher, raptor = models
    assert set(teacher) ^ set(raptor) == {"held"}
    assert raptor["partitions"] == [[2, 4]]
    assert [null["model"] for null in nulls[::5]] == ["untrained 1", "shuffled 1"]
    for null in nulls:  # its own max-cut, and a Raptor that is the mean of its layers
        assert [len(phases) for phases in null["partitions"]] == [2, 3]
        assert list(null["held"]) == ["update"] and null["num_images"] == 20
    np.testing.assert_allclose(*map(numbers, runs), rtol=1e-3, atol=2e-4)


def test_an_analysis_that_the_model_does_not_allow_is_skipped_with_the_reason(pictures):
    states = torch.randn(20, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    without_cls = Recorded(states, TokenLayout(0, 0))
    (result,), nulls = study_models([without_cls], pictures, [[2, 2]])
    assert not nulls and "not known" in result["skipped"]["push"]
    assert list(result["convergence"]) == ["patches"]
    study = {"models": [result], "nulls": []}
    words = {claim.sentence: verdict_word(found["recorded"]) for claim, found in judge_depth(study)}
    assert words["cls turns sharply late"] == "–" != words["Speed jumps where phases meet"]
    assert dict(draw_study(study))  # what there is can be drawn
    (result,), _ = study_models([without_cls], pictures, [])
    assert "give --phases_file" in result["skipped"]["jump"]


def test_bad_partitions_and_states_are_refused(systems, pictures):
    for partition in ([2, 3], [6, 0]):
        with pytest.raises(ValueError, match="sum to 6"):
            study_models(systems, pictures, [partition])
    with pytest.raises(ValueError, match="two images"):
        study_models(systems, pictures, PARTITIONS, num_images=1)
    systems[1].model.blocks[1].layer_scale2.fill_(float("nan"))
    with pytest.raises(ValueError, match="raptor_k2 must be finite; from layer 3 on"):
        study_models(systems, pictures, PARTITIONS)


def found(**changes):
    """Figures of 40 images and four layers: turns of 10°, a push that keeps its length."""
    rng = np.random.default_rng(0)
    around = np.ones((40, 1)) + 1e-3 * rng.random((40, 1))
    figures = {("speed", group): 10 * around * np.ones(4) for group in ("cls", "patches")}
    figures["convergence", "cls"] = np.cos(np.deg2rad([40, 30, 20, 10, 0])) * around
    figures["updates", "effective rank"] = 5 * around * np.ones(4)
    figures["updates", "coherence"] = 0.5 * around * np.ones(4)
    figures["push", "cls", "0", "angle"] = around * [1, 0.9, 0.8, 0.7, 0.5]
    figures["push", "cls", "0", "norms_alone"] = np.ones((40, 1)) * [1, 0.9, 0.8, 0.7, 0.5]
    return {
        **figures,
        **{tuple(key.split("__")): around * values for key, values in changes.items()},
    }


def means(figures, partitions=((2, 2),)):
    return {k: v.mean() for k, v in figures_of_claims(figures, partitions).items()}


def test_the_figures_of_claims_by_hand():
    figures = means(found())
    assert figures["rank"] == figures["cls, late"] == figures["align"] == pytest.approx(0)
    assert figures["jump"] == pytest.approx(0)
    assert figures["cls, push after 0"] == pytest.approx(0, abs=2e-3)
    # along one great circle cosines fall faster than those of independent turns
    turns = np.cos(np.deg2rad(10)) ** np.arange(4, 0, -1)
    expected = np.mean(np.cos(np.deg2rad([40, 30, 20, 10])) - turns)
    assert figures["cls, direction"] == pytest.approx(expected, abs=1e-3) and expected < 0
    figures = means(found(speed__cls=np.array([99, 10, 40, 20])))
    assert figures["cls, late"] == pytest.approx(20 - 25, abs=0.01)
    # at the boundary 40 against 15 inside, the first turn apart; patches do not jump
    assert figures["jump"] == pytest.approx(np.log(40 / 15) / 2, abs=1e-3)
    assert "jump" not in means(found(), [[4], [1, 1, 1, 1]])
    rank = {("updates", "effective rank"): np.ones((40, 1)) * [9, 4, 4, 2]}
    figures = means({**found(), **rank})
    assert figures["rank"] == pytest.approx(np.log(2), abs=1e-3)
    held = {("held", "update"): np.ones((40, 1)) * [3, 2, 0.1]}
    assert means({**found(), **held})["held"] == pytest.approx(np.log(3))


@pytest.mark.parametrize("name", ["digits", "dinov2_small"])
def test_what_was_seen_follows_from_the_figures_in_git(name):
    folder = ROOT / "evaluation" / "results" / name / "dynamics"
    study = read_json(folder / "dynamics.json")
    assert claims_page(study) == (folder / "what_we_see.md").read_text()


def test_the_program_writes_every_figure(tmp_path):
    folder, out = save_models(tmp_path), tmp_path / "out"
    command = [
        "-m", "evaluation.dynamics", "--model", folder / "teacher", f"k2={folder / 'raptor'}",
        "--dataset", "digits", "--num_images", "60", "--output_dir", out,
    ]  # fmt: skip
    printed = run(*ACCELERATE_LAUNCH, *command).stdout
    study = json.loads((out / "dynamics.json").read_text())
    assert (study["data"], study["split"], study["num_images"]) == ("digits", "test", 60)
    assert [result["model"] for result in study["models"]] == ["teacher", "k2"]
    teacher, raptor = study["models"]
    assert teacher["partitions"] == [[4, 2]]  # the Raptor's
    assert set(raptor["held"]) == {"update", "radius"}
    assert (study["nulls"][0]["num_images"], raptor["num_images"]) == (50, 60)
    assert "| claim | teacher | k2 | nulls, seen |" in printed
    assert "skipped for teacher: held: it is for Raptors" in printed
    assert {path.stem for path in out.glob("*.png")} == {"trajectories", "pushes", "held"}
    refused = run(sys.executable, *command, "--seed", "1", check=False)
    assert refused.returncode == 2 and "seed: made with 0, now asked for 1" in refused.stderr
