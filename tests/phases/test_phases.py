import collections
import itertools
import json
import re

import numpy as np
import pytest
import torch

from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.data import make_processor
from raptor_hf.phases.cuts import (
    check_cut,
    cut_share,
    find_phases,
    max_cut,
    recursive_max_cut,
)
from raptor_hf.phases.distance import layer_distance, load_distance
from tests.programs import ROOT
from training import find_phases as find_phases_program

FIXTURE = ROOT / "tests" / "fixtures" / "dinov2_base_layer_distance.json"
PUBLISHED = json.loads(FIXTURE.read_text())


def random_matrix(layers, seed):
    matrix = np.random.default_rng(seed).random((layers, layers))
    return np.triu(matrix, 1) + np.triu(matrix, 1).T


def partitions(layers, k, min_length=1):
    """All partitions of the layers into k runs, as lists of ranges."""
    for cuts in itertools.combinations(range(1, layers), k - 1):
        runs = [range(*ends) for ends in itertools.pairwise([0, *cuts, layers])]
        if min(map(len, runs)) >= min_length:
            yield runs


def cut_weight(distance, runs):
    return sum(
        distance[i, j] for a, b in itertools.combinations(runs, 2) for i in a for j in b
    )  # fmt: skip


def test_published_matrix_gives_the_published_phases():
    for threshold, phases in PUBLISHED["recursive_max_cut"].items():
        assert recursive_max_cut(PUBLISHED["distance"], float(threshold)) == phases
        assert find_phases(PUBLISHED["distance"], len(phases)) == phases


def test_the_dynamic_programme_equals_brute_force():
    for seed, (layers, k) in enumerate([(9, 1), (6, 2), (9, 3), (10, 3), (7, 4), (5, 5)]):
        distance = random_matrix(layers, seed)
        runs_of_two = partitions(layers, k, min(2, layers // k))
        best = max(runs_of_two, key=lambda runs: cut_weight(distance, runs))
        assert find_phases(distance, k, "maxcut") == [len(run) for run in best]


def test_random_phases_are_uniform_over_all_partitions():
    distance = random_matrix(6, 0)
    draws = [tuple(find_phases(distance, 3, "random", seed=seed)) for seed in range(2000)]
    counts = collections.Counter(draws)
    assert set(counts) == {tuple(map(len, runs)) for runs in partitions(6, 3)}
    assert len(counts) == 10
    # 200 expected each; chi-squared with 9 degrees of freedom is below 27.9 in 99.9 % of cases
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 27.9
    assert find_phases(distance, 3, "random", seed=5) == list(draws[5])
    assert find_phases(distance, 1, "random") == [6]
    assert find_phases(distance, 6, "random") == [1] * 6
    # and the uniform ones put the longer phases first
    assert find_phases(random_matrix(12, 0), 5, "uniform") == [3, 3, 2, 2, 2]


def test_cut_shares_by_hand():
    # layers 1 and 2 are 1 apart, 3 is 2 and 5 away from them
    distance = np.array([[0.0, 1, 2], [1, 0, 5], [2, 5, 0]])
    assert cut_share(distance, np.array([0, 0, 1])) == 7 / 8
    assert cut_share(distance, np.array([0, 1, 0])) == 6 / 8
    assert cut_share(distance, np.zeros(3)) == 0 and cut_share(distance, np.arange(3)) == 1


def test_max_cut_equals_brute_force():
    rng = np.random.default_rng(0)
    weights = rng.random((7, 7))
    weights = weights + weights.T
    best = max(
        sum(weights[i, j] for i in range(7) for j in range(7) if sides[i] and not sides[j])
        for sides in itertools.product([False, True], repeat=7)
    )
    weight, side = max_cut(weights)
    assert weight == pytest.approx(best)
    assert weight == pytest.approx(weights[np.ix_(side, ~side)].sum())


def test_layer_distance_by_hand():
    # two layers after the embeddings; tokens: cls, one register (ignored), two patches
    states = torch.zeros(1, 3, 4, 2)
    states[:, 0] = 9.0  # layer 0 does not count
    states[0, 1] = torch.tensor([[1.0, 0.0], [5.0, 5.0], [2.0, 0.0], [0.0, 2.0]])
    states[0, 2] = torch.tensor([[0.0, 3.0], [-5.0, 5.0], [1.0, 1.0], [3.0, 3.0]])
    # cls: orthogonal, distance 1; mean patch: (1, 1) and (2, 2), distance 0
    distance = layer_distance([states], TokenLayout(1, 1))
    np.testing.assert_allclose(distance, [[0, 0.5], [0.5, 0]], atol=1e-12)


def test_layer_distance_streams():
    with pytest.raises(ValueError, match="at least one trajectory"):
        layer_distance([], TokenLayout(1, 0))
    states = torch.randn(6, 5, 4, 3)
    whole = layer_distance([states], TokenLayout(1, 0))
    parts = layer_distance([states[:1], states[1:4], states[4:]], TokenLayout(1, 0))
    np.testing.assert_allclose(whole, parts, atol=1e-12)


ALTERNATING = (np.add.outer(np.arange(6), np.arange(6)) % 2).astype(float)


@pytest.mark.parametrize(
    ("word", "distance", "arguments"),
    [
        ("12 layers into 1 … 10 phases; got k=13", PUBLISHED["distance"], [13]),
        ("into 1 … 12 phases; got k=13", PUBLISHED["distance"], [13, "maxcut"]),
        ("k=9 is too large", PUBLISHED["distance"], [9]),
        ("kmeans", PUBLISHED["distance"], [2, "kmeans"]),
        ("shape", np.zeros((2, 3)), [1]),
        ("finite", np.full((4, 4), np.nan), [2]),
        ("symmetric", np.triu(np.ones((4, 4))), [2]),
        ("at most 26 layers", random_matrix(30, 0), [2]),
        (r"layers \[1, 3, 5\] into one group", ALTERNATING, [2]),
    ],
)
def test_what_can_not_be_cut_is_refused(word, distance, arguments):
    with pytest.raises(ValueError, match=word):
        find_phases(distance, *arguments)


def test_the_most_phases_of_the_recursion():
    """Those of a matrix whose last layer is always an outlier."""
    growing = 3.0 ** np.arange(12)
    outliers = np.outer(growing, growing) - np.diag(growing**2)
    assert find_phases(outliers, 10) == [3] + [1] * 9
    with pytest.raises(ValueError, match="3 layers into 1 … 1 phases; got k=2"):
        check_cut(3, 2, "recursive")


@pytest.fixture
def call(capsys):
    """Run a program's main() with flags; what it printed, as (out, err)."""

    def call_main(program, *flags):
        capsys.readouterr()
        program.main([*map(str, flags)])
        return capsys.readouterr()

    return call_main


def test_the_program_gives_the_published_phases(tmp_path, call):
    out = tmp_path / "phases"
    command = [find_phases_program, "--distance", FIXTURE, "--output_dir", out]
    printed = call(*command, "--thresholds", "0.20", "0.10", "0.09")
    assert printed.out.splitlines() == [
        "k=2: phases [7, 5] (threshold 0.2)",
        "k=3: phases [7, 3, 2] (threshold 0.1)",
        "k=4: phases [4, 3, 3, 2] (threshold 0.09)",
    ]
    written = json.loads((out / "phases.json").read_text())
    assert written["phases"] == {"2": [7, 5], "3": [7, 3, 2], "4": [4, 3, 3, 2]}
    assert (written["method"], written["source"]) == ("recursive", {"distance": str(FIXTURE)})
    assert (out / "layer_distance.png").stat().st_size > 500
    # what it writes it reads
    np.testing.assert_array_equal(load_distance(out / "phases.json"), PUBLISHED["distance"])


def test_the_program_measures_any_vision_model(tmp_path, call):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=24, num_hidden_layers=5, num_attention_heads=3, intermediate_size=32,
            image_size=16, patch_size=8,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path / "siglip")
    command = [find_phases_program, "--teacher", tmp_path / "siglip", "--method", "maxcut"]
    command += ["--dataset", "digits", "--num_images", "40", "--batch_size", "16", "--k", "2"]
    with pytest.raises(OSError, match="must bring its image processor .preprocessor_config.json"):
        call(*command, "--output_dir", tmp_path / "none")
    make_processor(16).save_pretrained(tmp_path / "siglip")
    printed = call(*command, "--output_dir", tmp_path / "phases")
    written = json.loads((tmp_path / "phases" / "phases.json").read_text())
    assert printed.out == f"k=2: phases {written['phases']['2']}\n"
    assert "0/40" in printed.err  # the progress bar
    assert written["num_images"] == 40
    assert written["source"]["teacher"]["weights_sha256"]
    assert sum(written["phases"]["2"]) == len(written["distance"]) == 5
    assert "finished already" in call(*command, "--output_dir", tmp_path / "phases").out


def test_the_program_takes_one_source_and_one_way_to_cut(tmp_path, call):
    for flags, message in {
        (): "Give one of --activations, --teacher and --distance; got []",
        ("--teacher", "a", "--distance", "b"): "got ['teacher', 'distance']",
        ("--distance", FIXTURE, "--thresholds", "0.1", "--k", "3"): "leave --k away",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call(find_phases_program, "--output_dir", tmp_path / "phases", *flags)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="under the key 'distance'"):
        load_distance(tmp_path / "other.json")


def test_a_cut_is_refused_before_the_work_or_the_distances_are_kept(tmp_path, call, teacher):
    teacher.save_pretrained(tmp_path / "teacher")
    make_processor(8).save_pretrained(tmp_path / "teacher")
    command = [find_phases_program, "--output_dir", tmp_path / "out"]
    measured = [*command, "--teacher", tmp_path / "teacher", "--dataset", "digits"]
    for flags, word in (
        (["--k", "5"], "into 1 … 4 phases; got k=5"),
        (["--method", "best"], "best"),
    ):
        with pytest.raises(ValueError, match=word):
            call(*measured, *flags)
    assert not (tmp_path / "out").exists()
    # these distances have no phases
    (tmp_path / "none.json").write_text(json.dumps({"distance": ALTERNATING.tolist()}))
    with pytest.raises(ValueError, match=r"The distances are kept: --distance .*phases.json"):
        call(*command, "--distance", tmp_path / "none.json", "--k", "2")
    np.testing.assert_array_equal(load_distance(tmp_path / "out" / "phases.json"), ALTERNATING)
    other = [find_phases_program, "--output_dir", tmp_path / "other"]
    printed = call(*other, "--distance", tmp_path / "out" / "phases.json")
    assert "no 3 phases: Max-cut put the layers" in printed.out  # nobody asked for three
    maxcut = [find_phases_program, "--output_dir", tmp_path / "maxcut", "--method", "maxcut"]
    printed = call(*maxcut, "--distance", tmp_path / "out" / "phases.json")
    assert [line[:4] for line in printed.out.splitlines()] == ["k=2:", "k=3:", "k=4:"]
