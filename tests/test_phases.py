import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.phases import find_phases, layer_distance, max_cut, recursive_max_cut

PUBLISHED = json.loads(
    (Path(__file__).parent / "fixtures" / "dinov2_base_layer_distance.json").read_text()
)


def test_published_matrix_gives_the_published_phases():
    for threshold, phases in PUBLISHED["recursive_max_cut"].items():
        assert recursive_max_cut(PUBLISHED["distance"], float(threshold)) == phases
        assert find_phases(PUBLISHED["distance"], len(phases)) == phases


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
    states = torch.randn(6, 5, 4, 3)
    whole = layer_distance([states], TokenLayout(1, 0))
    parts = layer_distance([states[:1], states[1:4], states[4:]], TokenLayout(1, 0))
    np.testing.assert_allclose(whole, parts, atol=1e-12)


def test_bad_input_is_refused_in_words():
    distance = np.array(PUBLISHED["distance"])
    with pytest.raises(ValueError, match="between 1 and the number of layers, 12; got 13"):
        find_phases(distance, 13)
    with pytest.raises(ValueError, match="k=9 is too large"):
        find_phases(distance, 9)
    with pytest.raises(ValueError, match="method must be 'recursive'; got 'kmeans'"):
        find_phases(distance, 2, method="kmeans")
    with pytest.raises(ValueError, match=r"square; got the shape \(2, 3\)"):
        find_phases(np.zeros((2, 3)), 1)
    with pytest.raises(ValueError, match="NaN"):
        find_phases(distance * np.nan, 2)
    with pytest.raises(ValueError, match="at least one trajectory"):
        layer_distance([], TokenLayout(1, 0))


def test_groups_that_are_not_runs_are_refused():
    side = np.array([0, 1, 0, 1, 0, 1])  # every other layer is like the next but one
    distance = (side[:, None] != side[None]).astype(float)
    with pytest.raises(ValueError, match=r"layers \[1, 3, 5\] into one group"):
        find_phases(distance, 2)
