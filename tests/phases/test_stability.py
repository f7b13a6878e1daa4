"""Bootstrap stability, on distances made by hand."""

import numpy as np
import pytest

from raptor_hf.phases.stability import (
    boundaries,
    cut_stability,
    partition_agreement,
    resampled_distances,
)


def two_blocks(images, noise, layers=8, first=5, seed=0):
    """Layers 1 … 5 are alike, and so are 6 … 8; every image adds noise of its own."""
    side = np.arange(layers) >= first
    clean = (side[:, None] != side[None, :]).astype(float)
    added = noise * np.random.default_rng(seed).standard_normal((images, layers, layers))
    return clean + (added + added.transpose(0, 2, 1)) / 2


def stability(distances, k, method, resamples=60):
    mean = distances.mean(axis=0)
    np.fill_diagonal(mean, 0)
    return cut_stability(mean, resampled_distances(distances, resamples), k, method)


@pytest.mark.parametrize("method", ["recursive", "maxcut", "ncut"])
def test_two_clear_blocks_are_always_cut_between(method):
    found = stability(two_blocks(20, 0.05), 2, method)
    assert (found["method"], found["phases"]) == (method, [5, 3])
    assert (found["same"], found["agreement"]) == (1, 1)
    assert found["boundaries"] == [0, 0, 0, 0, 1, 0, 0] and found["no_partition"] == 0
    assert "reason" not in found


def test_resamples_without_phases_are_counted():
    alternating = np.array([[float((i + j) % 2) for j in range(8)] for i in range(8)])
    distances = np.concatenate([two_blocks(1, 0)] * 2 + [alternating[None]] * 2)
    found = stability(distances, 2, "recursive", resamples=200)
    assert 0.2 < found["no_partition"] < 0.8
    assert sum(found["boundaries"]) == pytest.approx(1 - found["no_partition"])
    none = stability(alternating[None], 2, "recursive")
    assert none["phases"] is None and none["no_partition"] == 1
    assert "not a run of layers" in " ".join(none["reason"].split())
    assert none["same"] is none["agreement"] is None
    assert stability(two_blocks(3, 0), 7, "recursive")["no_partition"] == 1  # too many for it


def test_agreement_by_hand():
    assert boundaries([7, 3, 2]) == [7, 10] and boundaries([12]) == []
    assert partition_agreement([7, 3, 2], [7, 3, 2]) == 1
    assert partition_agreement([7, 5], [7, 3, 2]) == 1 / 2
    assert partition_agreement([4, 3, 3, 2], [7, 3, 2]) == 2 / 3
    assert partition_agreement([6, 6], [7, 5]) == 0
    assert partition_agreement([12], [12]) == 1 and partition_agreement([12], [6, 6]) == 0


@pytest.mark.parametrize(
    ("word", "call"),
    [
        ("sum to 12", lambda images: partition_agreement([6, 6], [6, 5])),
        ("positive", lambda images: partition_agreement([0, 12], [6, 6])),
        ("finite", lambda images: resampled_distances(images * np.nan)),
    ],
)
def test_bad_input_is_refused(word, call):
    with pytest.raises(ValueError, match=word):
        call(two_blocks(3, 0))
