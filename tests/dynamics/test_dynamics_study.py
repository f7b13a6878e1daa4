"""All analyses in one pass: streamed as at once, what is left out and said, memory, claims."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.benchmarks.timing import peak_memory
from evaluation.dynamics.arguments import ANALYSES, StudyArguments
from evaluation.dynamics.claims import CLAIMS, evaluate_claims
from evaluation.dynamics.figures import draw_study
from evaluation.dynamics.report import claims_page
from evaluation.dynamics.study import study_models
from raptor_hf import make_raptor
from raptor_hf.activations.store import StoredActivations, load_activations
from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.dynamics.systems import DepthSystem, StoredSystem
from raptor_hf.runs.files import read_json
from tests.helpers import LAYOUT, randomised
from tests.programs import ROOT

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


def options(**changed):
    return StudyArguments(**{"swap_draws": 3, "extra_applications": 2, "push_layers": [0, 4],
                             "random_partitions": 5, **changed})  # fmt: skip


def same(first, second, path=""):
    """Equal up to rounding, every number of both."""
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


def test_streamed_equals_all_at_once(systems, images, tmp_path):
    runs = [
        study_models(systems, images, PARTITIONS, options(), folder=tmp_path, batch_size=batch_size)
        for batch_size in (5, 2)
    ]
    teacher, raptor = runs[0]
    for name in ("convergence", "norm", "speed", "coherence", "update_rank"):
        assert name in teacher and name in raptor
    assert set(ANALYSES) - set(teacher) == {"more_time"}
    assert set(ANALYSES) - set(raptor) == {"layer_swap"}
    assert list(teacher["phase_contrast"]) == ["2-4", "2-2-2"]
    assert list(raptor["phase_contrast"]) == ["2-4"]
    assert list(teacher["linear_modes"]["cls"]) == ["1-2", "3-4", "3-6", "5-6"]
    assert teacher["class_basins"]["num_images"] == teacher["num_images"] == 5
    for both in zip(*runs, strict=True):
        for result in both:  # eigenvalues near 0 are as they come
            for group in result["linear_modes"].values():
                for found in group.values():
                    del found["eigenvalues"]
        same(*both)


def test_a_study_of_stored_states_is_that_of_the_model(systems, images, store, tmp_path):
    stored = load_activations(store)
    wanted = options(analyses=["class_basins", "phase_contrast", "linear_modes"])
    alone = StoredSystem("teacher", stored.depth, stored.layout)
    (from_store,) = study_models([alone], stored, PARTITIONS, wanted, folder=tmp_path)
    (from_model,) = study_models(systems[:1], images, PARTITIONS, wanted, folder=tmp_path)
    for name in ("convergence", "speed"):
        for group in LAYOUT.groups():
            np.testing.assert_allclose(
                from_store[name][group]["mean"], from_model[name][group]["mean"], rtol=0.01,
                atol=2e-3,
            )  # fmt: skip
    everything = options(analyses=list(ANALYSES))
    (result,) = study_models([alone], stored, PARTITIONS, everything, folder=tmp_path)
    assert "not known" in result["left_out"]["self_correction"]
    assert "not known" in result["left_out"]["layer_swap"]
    assert dict(draw_study([result]))  # what there is can be drawn


def test_what_needs_a_cls_token_says_so_and_the_rest_is_made(tmp_path):
    states = torch.randn(6, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    system = StoredSystem("no cls", 4, TokenLayout(0, 0))
    (result,) = study_models(
        [system], Stored(states, torch.arange(6) % 2), [[2, 2]], options(), folder=tmp_path
    )
    assert result["left_out"]["class_basins"] == ("it needs a cls token, and this model has none")
    assert "group cls" in result["left_out"]["self_correction of cls"]
    assert list(result["convergence"]) == ["patches"]
    assert {"phase_contrast", "linear_modes"} < set(result)
    claims = evaluate_claims([result])
    verdicts = {claim["sentence"]: claim["verdicts"]["no cls"]["seen"] for claim in claims}
    assert verdicts["Classes end in angular basins"] is None
    assert verdicts["Directions converge: γ rises to 1"] is not None
    dict(draw_study([result]))
    (result,) = study_models(
        [system], Stored(states, torch.arange(6) % 2), [], options(), folder=tmp_path
    )
    assert "give --phases_file" in result["left_out"]["phase_contrast"]


class Stored(StoredActivations):
    """States in memory, or drawn when they are asked for, as an activation dataset gives them."""

    def __init__(self, states, labels):
        self.given, self.scalars = states, {"label": labels, "view": torch.zeros_like(labels)}

    def __len__(self):
        return len(self.scalars["label"])

    def __getitems__(self, rows):
        rows = torch.as_tensor(rows)
        states = self.given(rows) if callable(self.given) else self.given[rows]
        view = torch.zeros_like(rows)
        return {
            "states": states,
            "label": self.scalars["label"][rows],
            "image_id": rows,
            "view": view,
        }


@pytest.mark.parametrize(
    ("partitions", "changed", "message"),
    [
        ([[2, 3]], {}, r"sum to 6; got \[2, 3\]"),
        ([[6, 0]], {}, r"positive and sum to 6; got \[6, 0\]"),
        ([[2, 4]], {"epsilons": [0.1, -1.0]}, r"--epsilons must be a number > 0; got 0.1 -1.0"),
        ([[2, 4]], {"analyses": ["swaps"]}, "--analyses are class_basins, .*; got swaps"),
        ([[2, 4]], {"swap_draws": 0}, "--swap_draws must be a number > 0; got 0"),
        ([[2, 4]], {"push_layers": [6]}, r"0 … 5; got \[6\]"),
    ],
)
def test_bad_options_are_refused(systems, images, tmp_path, partitions, changed, message):
    with pytest.raises(ValueError, match=message):
        study_models(systems, images, partitions, options(**changed), folder=tmp_path)


def test_fewer_images_than_classes_are_refused(systems, images, tmp_path):
    images.labels = torch.arange(5)
    with pytest.raises(ValueError, match="got 4 images of 5 classes, .* leave class_basins out"):
        study_models(systems, images, PARTITIONS, options(), folder=tmp_path, num_images=4)
    without = options(analyses=["phase_contrast"])
    study_models(systems, images, PARTITIONS, without, folder=tmp_path, num_images=4)
    with pytest.raises(ValueError, match="two images at least; got 1"):
        study_models(systems, images, PARTITIONS, without, folder=tmp_path, num_images=1)


def test_nan_states_stop_the_study(systems, images, tmp_path):
    systems[1].model.blocks[1].layer_scale2.fill_(float("nan"))
    with pytest.raises(ValueError, match="raptor_k2 must be finite; from layer 3 on"):
        study_models(systems, images, PARTITIONS, options(), folder=tmp_path)


def analyse_random_states(number):
    """The work whose memory is watched: trajectories are drawn as they are asked for."""
    import tempfile

    def draw(rows):
        generator = torch.Generator().manual_seed(int(rows[0]))
        return torch.randn(len(rows), 13, 3, 512, generator=generator)

    images = Stored(draw, torch.arange(number) % 10)
    system = StoredSystem("random", 12, TokenLayout(1, 0))
    with tempfile.TemporaryDirectory() as folder:
        study_models([system], images, [[6, 6]], options(), folder=folder)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images():
    """Trajectories of 1,400 images more are 110 MB, their cls tokens alone 37 MB."""
    few, many = (peak_memory(analyse_random_states, number) for number in (200, 1600))
    assert abs(many / few - 1) < 0.05


def curve(*values):
    return {"mean": list(values), "std": [0.0] * len(values)}


def test_claims_are_judged_by_their_figures(systems, images, tmp_path):
    results = study_models(systems, images, PARTITIONS, options(), folder=tmp_path)
    claims = {claim.sentence: claim.decide for claim in CLAIMS}
    result = results[1]
    rise = claims["The rise is S-shaped"]
    result["convergence"] = {"cls": curve(0, 0.1, 0.2, 0.8, 0.9, 0.95, 1)}
    assert rise(result) == (True, "steepest: cls at layer 3 of 6")
    result["convergence"] = {"cls": curve(0, 0.8, 0.82, 0.84, 0.9, 0.95, 1)}
    assert rise(result) == (False, "steepest: cls at layer 1 of 6")
    push = claims["A pushed cls token bends back"]
    result["self_correction"] = {"cls": {"0.5": {"0": curve(30, 60)}, "0.1": {"0": curve(6, 3)}}}
    assert push(result) == (True, "of a push of 0.1 after layer 0 is left at the end: 50 %")
    swap = claims["Layers of one phase stand in for each other"]
    kinds = {"same_phase": {"3": {"accuracy": curve(0.9, 0.92)}}}
    kinds["other_phase"] = {"3": {"accuracy": curve(0.5, 0.52)}}
    results[0]["layer_swap"] = {"2-4": kinds, "2-2-2": {}}
    seen, figures = swap(results[0])
    assert seen and "2-4: 0.910 against 0.510 (± 0.014)" in figures
    kinds["other_phase"] = {"3": {"accuracy": curve(0.9, 0.88)}}
    assert swap(results[0])[0] is False
    assert swap(result) is None
    contrast = claims["Phases are tighter than random ones"]
    result["phase_contrast"] = {"2-4": {"contrast": 0.5, "random": [0.1, 0.6], "shuffled": [0.0]}}
    seen, figures = contrast(result)
    assert not seen and "beats 50 % of random runs, 100 % of shuffled" in figures
    page = claims_page(evaluate_claims(results))
    assert page.startswith("# What we see\n\n| claim | of | teacher | raptor_k2 |")
    assert "- raptor_k2: not seen. steepest: cls at layer 1 of 6" in page


def test_what_was_seen_on_the_digits_follows_from_the_figures_in_git():
    folder = ROOT / "evaluation" / "results" / "digits" / "dynamics"
    claims = evaluate_claims(read_json(folder / "dynamics.json")["models"])
    assert claims_page(claims) == (folder / "what_we_see.md").read_text()


def test_one_phase_and_phases_of_one_layer(systems, images, tmp_path):
    whole = [[6], [1, 1, 1, 1, 1, 1], [5, 1]]
    (result,) = study_models(systems[:1], images, whole, options(), folder=tmp_path)
    assert result["speed"]["cls"]["at_boundaries"]["6"] is None
    assert result["speed"]["cls"]["at_boundaries"]["5-1"]["ratio"] > 0
    assert list(result["layer_swap"]["6"]) == ["same_phase"]
    assert "same_phase" not in result["layer_swap"]["1-1-1-1-1-1"]
    assert result["phase_contrast"]["6"]["contrast"] is None
    assert len(result["linear_modes"]["cls"]) == 8
    assert all(verdict["figures"] for claim in evaluate_claims([result]) for verdict in
               claim["verdicts"].values() if verdict["seen"] is not None)  # fmt: skip
    assert len(dict(draw_study([result]))) == 8


def test_all_figures_are_drawn_and_results_are_json(systems, images, tmp_path):
    results = study_models(systems, images, PARTITIONS, options(), folder=tmp_path)
    json.dumps(results)
    figures = dict(draw_study(results))
    assert len(figures) == 9
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=30)
    titles = [axis.get_title() for axis in figures["layer_swap"].axes]
    assert titles == ["teacher 2-4", "teacher 2-2-2"]
