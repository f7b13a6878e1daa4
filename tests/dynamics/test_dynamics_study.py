"""The study of depth as time: one pass over the images, claims, the program."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.claims import judge, verdict_word
from evaluation.dynamics.__main__ import claims_page
from evaluation.dynamics.claims import CLAIMS
from evaluation.dynamics.figures import draw_study
from evaluation.dynamics.study import study_models
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
    heads = [nn.Linear(48, 2).requires_grad_(False) for _ in range(2)]
    return [
        DepthSystem("teacher", teacher, LAYOUT, heads[0]),
        DepthSystem("raptor_k2", model, LAYOUT, heads[1]),
    ]


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

    name, depth, phases, head, is_raptor, can_run_on = "recorded", 4, None, None, False, False

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
    teacher, raptor = runs[0]
    assert set(teacher) ^ set(raptor) == {"more_time", "layer_swap"}
    assert list(teacher["phase_contrast"]) == ["2-4", "2-2-2"]
    assert list(raptor["phase_contrast"]) == ["2-4"]
    assert list(teacher["layer_swap"]) == ["untouched", "2-4", "2-2-2", "swaps"]
    np.testing.assert_allclose(*map(numbers, runs), rtol=1e-3, atol=2e-4)


def test_an_analysis_that_the_model_does_not_allow_is_skipped_with_the_reason(pictures):
    states = torch.randn(20, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    without_cls = Recorded(states, TokenLayout(0, 0))
    (result,) = study_models([without_cls], pictures, [[2, 2]])
    for name in ("self_correction", "layer_swap"):
        assert "not known" in result["skipped"][name]
    assert list(result["convergence"]) == ["patches"]
    judged = judge(CLAIMS, {"recorded": result})
    words = {claim.sentence: verdict_word(found["recorded"]) for claim, found in judged}
    assert words["cls turns sharply late"] == "–" != words["Speed jumps where phases meet"]
    assert dict(draw_study([result]))  # what there is can be drawn
    (result,) = study_models([without_cls], pictures, [])
    assert "give --phases_file" in result["skipped"]["phase_contrast"]


def test_bad_partitions_and_states_are_refused(systems, pictures):
    for partition in ([2, 3], [6, 0]):
        with pytest.raises(ValueError, match="sum to 6"):
            study_models(systems, pictures, [partition])
    with pytest.raises(ValueError, match="two images"):
        study_models(systems, pictures, PARTITIONS, num_images=1)
    systems[1].model.blocks[1].layer_scale2.fill_(float("nan"))
    with pytest.raises(ValueError, match="raptor_k2 must be finite; from layer 3 on"):
        study_models(systems, pictures, PARTITIONS)


def curve(*values):
    return {"mean": list(values), "std": [0.0] * len(values)}


def test_claims_are_judged_by_their_figures():
    claims = {claim.sentence: claim.decide for claim in CLAIMS}
    result = {"depth": 6, "partitions": [[2, 4], [2, 2, 2]]}
    # a push that keeps its length while the norm doubles: half of the angle, growth 1
    push = claims["Layers correct a pushed cls token"]
    result["norm"] = {"cls": curve(1, 1, 1, 1.6, 1.6, 2, 2)}
    result["self_correction"] = {
        "cls": {"0.5": {"0": curve(30, 60)}, "0.1": {"0": curve(6, 3), "3": curve(5, 6)}}
    }
    seen, figures = push(result)
    assert not seen
    assert "left at the end: 50 %, 120 % of the angle; norms alone leave 50 %, 80 %" in figures
    assert figures.endswith("in length it grows × 1.00, 1.50")
    result["norm"] = {"cls": curve(1, 1, 1, 2.5, 1.6, 2, 2)}
    result["self_correction"]["cls"]["0.1"] = {"3": curve(5, 6)}  # 1.2 of the angle, 1.25 by norms
    assert push(result).seen
    swap = claims["Layers of one phase stand in for each other"]
    assert swap(result) is None
    kinds = {"same_phase": {"3": {"accuracy": curve(0.9, 0.92)}}}
    kinds["other_phase_near"] = {"3": {"accuracy": curve(0.5, 0.52)}}
    result["layer_swap"] = {"2-4": kinds, "2-2-2": {}}
    seen, figures = swap(result)
    assert seen and "2-4: 0.910 against 0.510 (± 0.014)" in figures
    kinds["other_phase_near"] = {"3": {"accuracy": curve(0.9, 0.88)}}  # .91 and .89 ± .02
    assert swap(result).seen is None
    kinds["other_phase_near"] = {"3": {"accuracy": curve(0.95, 0.96)}}
    assert swap(result).seen is False
    contrast = claims["Phases are tighter than random ones"]
    result["phase_contrast"] = {"2-4": {"contrast": 0.5, "random": [0.1, 0.6], "shuffled": [0.0]}}
    seen, figures = contrast(result)
    assert not seen and "beats 50 % of random runs, 100 % of shuffled" in figures


def test_what_was_seen_on_the_digits_follows_from_the_figures_in_git():
    folder = ROOT / "evaluation" / "results" / "digits" / "dynamics"
    results = read_json(folder / "dynamics.json")["models"]
    assert claims_page(results) == (folder / "what_we_see.md").read_text()


def test_one_phase_and_phases_of_one_layer(systems, pictures):
    whole = [[6], [1, 1, 1, 1, 1, 1], [5, 1]]
    (result,) = study_models(systems[:1], pictures, whole)
    assert result["speed"]["cls"]["at_boundaries"]["6"] is None
    assert result["speed"]["cls"]["at_boundaries"]["5-1"]["ratio"] > 0
    assert list(result["layer_swap"]["6"]) == ["same_phase"]
    assert "1-1-1-1-1-1" not in result["layer_swap"]
    assert result["phase_contrast"]["6"]["contrast"] is None
    judge(CLAIMS, {"teacher": result})
    assert len(dict(draw_study([result]))) == 2


def test_the_program_writes_every_figure(tmp_path):
    folder, out = save_models(tmp_path), tmp_path / "out"
    command = [
        "-m", "evaluation.dynamics", "--model", folder / "teacher", f"k2={folder / 'raptor'}",
        "--dataset", "digits", "--num_images", "110", "--output_dir", out,
    ]  # fmt: skip
    printed = run(*ACCELERATE_LAUNCH, *command).stdout
    study = json.loads((out / "dynamics.json").read_text())
    assert (study["data"], study["split"], study["num_images"]) == ("digits", "test", 110)
    assert [result["model"] for result in study["models"]] == ["teacher", "k2"]
    teacher, raptor = study["models"]
    assert teacher["partitions"] == [[4, 2]]  # the Raptor's
    assert len(teacher["layer_swap"]["4-2"]["same_phase"]["3"]["cosine"]["mean"]) == 20
    assert len(raptor["more_time"]["held"]["accuracy"]["mean"]) == 13
    assert "| claim | source | teacher | k2 |" in printed
    assert "skipped for k2: layer swap: it is for teachers" in printed
    assert {path.stem for path in out.glob("*.png")} == {"trajectories", "self_correction"}
    refused = run(sys.executable, *command, "--seed", "1", check=False)
    assert refused.returncode == 2 and "seed: made with 0, now asked for 1" in refused.stderr
