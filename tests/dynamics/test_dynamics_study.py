"""The study of depth as time: structure by hand, one pass over the images, claims, the program."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.claims import judge
from evaluation.dynamics.__main__ import claims_page
from evaluation.dynamics.claims import CLAIMS
from evaluation.dynamics.figures import draw_study
from evaluation.dynamics.structure import ClassBasins, LinearModes, fit_linear_map
from evaluation.dynamics.study import ANALYSES, StudyArguments, study_models
from raptor_hf import make_raptor
from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.runs.files import read_json
from tests.helpers import LAYOUT, randomised, save_models
from tests.programs import ACCELERATE_LAUNCH, ROOT, run

PARTITIONS = [[2, 4], [2, 2, 2]]


def test_basins_by_hand():
    """Three classes: at layer 0 all alike, at layer 1 apart, one image alone in its class."""
    degrees = torch.tensor([0.0, 20, 90, 90, 200])
    labels = torch.tensor([4, 4, 7, 7, 9])
    last = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)
    states = torch.stack([torch.ones(5, 2), 3 * last], dim=1)
    basins = ClassBasins()
    basins.add(states[:2], labels[:2])
    basins.add(states[2:], labels[2:])
    result = basins.result()
    assert (result["num_images"], result["num_classes"]) == (4, 3)
    assert result["silhouette"]["mean"][0] == result["nearest_mean"]["mean"][0] == 0
    # own: to the other image of the class. Other: 0° and 20° to 90°; 90° to 10°, the mean of both
    assert result["own_angle"]["mean"][1] == pytest.approx((20 + 20 + 0 + 0) / 4, abs=1e-4)
    assert result["other_angle"]["mean"][1] == pytest.approx((90 + 70 + 80 + 80) / 4, abs=1e-4)
    silhouette = (70 / 90 + 50 / 70 + 1 + 1) / 4
    assert result["silhouette"]["mean"][1] == pytest.approx(silhouette, abs=1e-5)
    assert result["nearest_mean"]["mean"][1] == 1


def test_a_linear_map_recovers_a_planted_one():
    rng = np.random.default_rng(0)
    planted = 0.5 * rng.normal(size=(6, 6)) / np.sqrt(6) + 0.5 * np.eye(6)
    states = torch.from_numpy(rng.normal(size=(50, 6)))
    after = states @ torch.from_numpy(planted).T
    fitted = fit_linear_map(states.T @ states, after.T @ states, energy=1, ridge=0)
    eigenvalues = np.sort_complex(np.round(np.linalg.eigvals(planted), 9))
    np.testing.assert_allclose(
        np.sort_complex(np.round(fitted.eigenvalues, 9)), eigenvalues, atol=1e-8
    )
    cubed = torch.from_numpy(np.linalg.matrix_power(planted, 3))
    torch.testing.assert_close(fitted.power(states, 3), states @ cubed.T)
    # states in a plane: rank 2, whatever the number of channels
    flat = states[:, :2] @ torch.from_numpy(rng.normal(size=(2, 6)))
    assert len(fit_linear_map(flat.T @ flat, flat.T @ flat).eigenvalues) == 2
    with pytest.raises(ValueError, match="zero"):
        fit_linear_map(torch.zeros(3, 3), torch.zeros(3, 3))


def test_modes_of_a_rotation_predict_it_and_the_identity_does_not():
    turn = torch.tensor(0.3)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()]).reshape(2, 2)
    matrix = torch.block_diag(rotation, torch.eye(1))
    states = torch.zeros(40, 5, 2, 3)
    states[:, 0, :, :2] = torch.randn(40, 2, 2, generator=torch.Generator().manual_seed(0))
    for layer in range(4):
        states[:, layer + 1] = states[:, layer] @ matrix.T
    modes = LinearModes([(0, 4), (1, 3)], 40)
    for part in states.split(7):
        modes.add(part)
    result = modes.result()
    assert list(result) == ["1-4", "2-3"] and modes.num_evaluated == 20
    whole = result["1-4"]
    assert whole["rank"] == 2  # the third channel is always 0
    moduli = [abs(complex(*value)) for value in whole["eigenvalues"]]
    assert moduli == pytest.approx([1, 1], abs=1e-3)
    assert whole["map"] == pytest.approx([1] * 4, abs=1e-4)
    assert whole["identity"] == pytest.approx([np.cos(0.3 * p) for p in (1, 2, 3, 4)], abs=1e-5)


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


def options(**changed):
    return StudyArguments(**{"swap_draws": 3, "random_partitions": 5, **changed})


def same(first, second, path=""):
    """Compare all numbers of two results up to rounding."""
    if isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list) and not all(isinstance(x, float) for x in first):
        assert len(first) == len(second), path
        for n, pair in enumerate(zip(first, second, strict=True)):
            same(*pair, f"{path}/{n}")
    elif isinstance(first, float | list):
        np.testing.assert_allclose(first, second, rtol=1e-3, atol=2e-4, err_msg=path)
    else:
        assert first == second, path


def test_streamed_equals_all_at_once(systems, pictures):
    runs = []
    for batch_size in (20, 7):
        runs.append(study_models(systems, pictures, PARTITIONS, options(), batch_size=batch_size))
    teacher, raptor = runs[0]
    for name in ("convergence", "norm", "speed", "coherence", "update_rank"):
        assert name in teacher and name in raptor
    assert set(ANALYSES) - set(teacher) == {"more_time"}
    assert set(ANALYSES) - set(raptor) == {"layer_swap"}
    assert list(teacher["phase_contrast"]) == ["2-4", "2-2-2"]
    assert list(raptor["phase_contrast"]) == ["2-4"]
    assert list(teacher["linear_modes"]["cls"]) == ["1-2", "3-4", "3-6", "5-6"]
    assert teacher["class_basins"]["num_images"] == teacher["num_images"] == 20
    for both in zip(*runs, strict=True):
        for result in both:  # eigenvalues near 0 are arbitrary
            for group in result["linear_modes"].values():
                for modes in group.values():
                    del modes["eigenvalues"]
        same(*both)


def test_an_analysis_that_the_data_does_not_allow_is_skipped_with_the_reason(pictures):
    states = torch.randn(20, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    without_cls = Recorded(states, TokenLayout(0, 0))
    (result,) = study_models([without_cls], pictures, [[2, 2]], options())
    assert result["skipped"]["class_basins"] == "it needs a cls token, and this model has none"
    for name in ("self_correction", "layer_swap"):
        assert "not known" in result["skipped"][name]
    assert list(result["convergence"]) == ["patches"]
    assert {"phase_contrast", "linear_modes"} < set(result)
    judged = judge(CLAIMS, {"no cls": result})
    seen = {claim["sentence"]: claim["verdicts"]["no cls"]["seen"] for claim in judged}
    assert seen["Classes end in angular basins"] is None
    assert seen["Directions converge: γ rises to 1"] is not None
    dict(draw_study([result]))
    (result,) = study_models([without_cls], pictures, [], options())
    assert "give --phases_file" in result["skipped"]["phase_contrast"]
    # ten images a class: 20 of 2 are enough, 20 of 3 are not
    for classes, skipped in ((2, False), (3, True)):
        pictures.labels = torch.arange(20) % classes
        system = Recorded(states, TokenLayout(1, 0))
        (result,) = study_models([system], pictures, [[2, 2]], options())
        assert ("class_basins" in result["skipped"]) == skipped


@pytest.mark.parametrize(
    ("partitions", "changed", "word"),
    [
        ([[2, 3]], {}, "sum to 6"),
        ([[6, 0]], {}, "sum to 6"),
        ([[2, 4]], {"analyses": ["swaps"]}, "swaps"),
    ],
)
def test_bad_options_are_refused(systems, pictures, partitions, changed, word):
    with pytest.raises(ValueError, match=word):
        study_models(systems, pictures, partitions, options(**changed))


def test_bad_states_are_refused(systems, pictures):
    with pytest.raises(ValueError, match="two images"):
        study_models(systems, pictures, PARTITIONS, options(), num_images=1)
    systems[1].model.blocks[1].layer_scale2.fill_(float("nan"))
    with pytest.raises(ValueError, match="raptor_k2 must be finite; from layer 3 on"):
        study_models(systems, pictures, PARTITIONS, options())


def curve(*values):
    return {"mean": list(values), "std": [0.0] * len(values)}


def test_claims_are_judged_by_their_figures():
    claims = {claim.sentence: claim.decide for claim in CLAIMS}
    result = {"depth": 6, "partitions": [[2, 4], [2, 2, 2]]}
    rise = claims["The rise is S-shaped"]
    result["convergence"] = {"cls": curve(0, 0.1, 0.2, 0.8, 0.9, 0.95, 1)}
    assert rise(result) == (True, "steepest: cls at layer 3 of 6")
    result["convergence"] = {"cls": curve(0, 0.8, 0.82, 0.84, 0.9, 0.95, 1)}
    assert rise(result) == (False, "steepest: cls at layer 1 of 6")
    # a push that keeps its length while the norm doubles: half of the angle, growth 1
    push = claims["The angle of a pushed cls token shrinks"]
    result["norm"] = {"cls": curve(1, 1, 1, 1.6, 1.6, 2, 2)}
    result["self_correction"] = {
        "cls": {"0.5": {"0": curve(30, 60)}, "0.1": {"0": curve(6, 3), "3": curve(5, 6)}}
    }
    seen, figures = push(result)
    assert not seen
    assert "left at the end: 50 %, 120 % of the angle; norms alone leave 50 %, 80 %" in figures
    assert figures.endswith("in length it grows × 1.00, 1.50")
    swap = claims["Layers of one phase stand in for each other"]
    assert swap(result) is None
    kinds = {"same_phase": {"3": {"accuracy": curve(0.9, 0.92)}}}
    kinds["other_phase"] = {"3": {"accuracy": curve(0.5, 0.52)}}
    result["layer_swap"] = {"2-4": kinds, "2-2-2": {}}
    seen, figures = swap(result)
    assert seen and "2-4: 0.910 against 0.510 (± 0.014)" in figures
    kinds["other_phase"] = {"3": {"accuracy": curve(0.9, 0.88)}}  # .91 and .89 ± .02
    assert swap(result).seen is None
    kinds["other_phase"] = {"3": {"accuracy": curve(0.95, 0.96)}}
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
    (result,) = study_models(systems[:1], pictures, whole, options())
    assert result["speed"]["cls"]["at_boundaries"]["6"] is None
    assert result["speed"]["cls"]["at_boundaries"]["5-1"]["ratio"] > 0
    assert list(result["layer_swap"]["6"]) == ["same_phase"]
    assert "same_phase" not in result["layer_swap"]["1-1-1-1-1-1"]
    assert result["phase_contrast"]["6"]["contrast"] is None
    assert len(result["linear_modes"]["cls"]) == 8
    for claim in judge(CLAIMS, {"teacher": result}):
        verdict = claim["verdicts"]["teacher"]
        assert verdict["seen"] is None or verdict["figures"]
    assert len(dict(draw_study([result]))) == 2


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A command, and the folder that it wrote."""
    folder = save_models(tmp_path_factory.mktemp("models"))
    out = folder / "out"
    command = [
        "-m", "evaluation.dynamics", "--model", folder / "teacher", f"k2={folder / 'raptor'}",
        "--data", "digits", "--num_images", "110", "--output_dir", out,
        "--teacher_head", folder / "head.safetensors", "--swap_draws", "2",
        "--random_partitions", "5",
    ]  # fmt: skip
    return command, out, run(*ACCELERATE_LAUNCH, *command).stdout


def test_the_program_writes_every_figure(program):
    _, out, printed = program
    study = json.loads((out / "dynamics.json").read_text())
    assert (study["data"], study["split"], study["num_images"]) == ("digits", "test", 110)
    assert [result["model"] for result in study["models"]] == ["teacher", "k2"]
    teacher, raptor = study["models"]
    assert teacher["partitions"] == [[4, 2]]  # the Raptor's
    assert len(teacher["layer_swap"]["4-2"]["same_phase"]["1"]["accuracy"]["mean"]) == 2
    assert len(raptor["more_time"]["held"]["accuracy"]["mean"]) == 13
    assert study["environment"]["transformers"]
    assert "| claim | source | teacher | k2 |" in printed
    assert claims_page(study["models"]).startswith("# What we see\n\n| claim | source |")
    assert {path.stem for path in out.glob("*.png")} == {"trajectories", "self_correction"}


def test_a_finished_study_is_left_alone_and_another_one_refused(program):
    command, out, _ = program
    before = (out / "dynamics.json").stat()
    assert "finished already" in run(sys.executable, *command, "--resume").stdout
    assert (out / "dynamics.json").stat() == before
    refused = run(sys.executable, *command, "--seed", "1", check=False)
    assert refused.returncode == 2 and "seed: made with 0, now asked for 1" in refused.stderr
