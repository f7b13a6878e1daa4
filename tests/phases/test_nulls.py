"""Similarities measured several ways, and phases against nulls, on processes that are known."""

import json

import numpy as np
import pytest

from evaluation.recurrence.nulls import gathering
from evaluation.recurrence.nulls_page import GATHER
from evaluation.recurrence.nulls_power import power_table, processes, published_phases
from evaluation.verdicts import judge
from raptor_hf.phases import nulls
from raptor_hf.phases.similarity import (
    centred_cosines,
    debiased_cka,
    half_samples,
    image_cosines,
)
from tests.programs import ROOT

MEASURE, DRIFT = "centred cosine", "Ornstein-Uhlenbeck walk"


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def compared(name, images=200, seed=0):
    """The cuts of a process, and the figures of its claim."""
    states = dict(processes(images, seed))[name]
    cuts = nulls.compare_with_turns({"cls": states}, MEASURE, draws=20)["all"]["cuts"]
    return cuts, gathering(MEASURE, cuts, images)


def seen(figures, drifts):
    result = {"figures": figures, "nulls": {"drift": drifts}}
    ((_, verdicts),) = judge([GATHER[MEASURE]], {"process": result})
    return verdicts["process"].seen


@pytest.fixture(scope="module")
def drifts():
    return [compared(DRIFT, seed=seed)[1] for seed in range(10, 15)]


def test_measures_by_hand():
    states = noise(0, 7, 3, 5)
    first, second = states[2, 0], states[2, 1]
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert image_cosines(states)[2, 0, 1] == pytest.approx(cosine)
    # a mean that all images share hides what they do
    shared = states + 100
    assert image_cosines(shared).min() > 0.99
    np.testing.assert_allclose(centred_cosines(shared), centred_cosines(states))


def test_debiased_cka_by_the_formula_of_its_authors():
    states, n = noise(1, 9, 2, 30), 9

    def hsic(first, second):
        k, m = (x @ x.T for x in (first, second))
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        parts = np.trace(k @ m) + k.sum() * m.sum() / (n - 1) / (n - 2)
        return (parts - 2 / (n - 2) * (k @ m).sum()) / n / (n - 3)

    x, y = states[:, 0], states[:, 1]
    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert debiased_cka(states)[0, 1] == pytest.approx(expected)


def test_cka_sees_no_basis_and_no_likeness_of_noise():
    states = noise(2, 40, 1, 60)
    rotation = np.linalg.qr(noise(3, 60, 60))[0]
    turned = np.concatenate([states, 3 * states @ rotation], axis=1)
    np.testing.assert_allclose(debiased_cka(turned), 1)
    others = [debiased_cka(noise(seed, 40, 2, 60))[0, 1] for seed in range(20)]
    assert abs(np.mean(others)) < 0.02  # without the correction .6
    with pytest.raises(ValueError, match="four images"):
        debiased_cka(states[:3])


def test_halves_of_a_mean_spread_as_its_error():
    values = noise(4, 400)
    means = [values[half].mean() for half in half_samples(400, 500)]
    assert np.std(means) == pytest.approx(values.std() / 20, rel=0.1)


def test_turns_by_hand():
    turns = np.cos(np.deg2rad([60, 90, 60]))
    independent = nulls.independent_turns(turns)
    np.testing.assert_allclose(independent[0], [1, 0.5, 0, 0], atol=1e-12)
    straight = np.rad2deg(np.arccos(nulls.straight_turns(turns)[0]))
    np.testing.assert_allclose(straight, [0, 60, 150, 180], atol=1e-5)
    for order in nulls.reordered_turns(turns, 5):
        np.testing.assert_allclose(np.sort(np.diagonal(order, 1)), np.sort(turns))


def test_pairs_are_compared_at_equal_distance():
    values = 10.0 - abs(
        np.subtract.outer(range(6), range(6))
    )  # near layers are alike, phases add nothing
    within, across = nulls.matched_means(values, [2, 4])
    assert within == pytest.approx(across)
    values[:2, :2] += 1
    within, across = nulls.matched_means(values, [2, 4])
    assert within - across == pytest.approx(2 / 14)  # 2 of 14 ordered pairs within
    assert np.isnan(nulls.matched_means(values, [6])).all()


def test_the_published_phases_are_those_of_neighbours_alone():
    found = published_phases()
    observed = {k: cut["observed"] for k, cut in found.items()}
    assert observed == {
        "2": [[7, 5], [7, 5]], "3": [[7, 3, 2], [5, 4, 3]], "4": [[4, 3, 3, 2], [4, 3, 3, 2]]
    }  # fmt: skip
    assert {k: cut["neighbours"] for k, cut in found.items()} == observed
    # the same steps in random order often cut as much
    assert min(cut["orders_that_cut_as_much"] for cut in found.values()) > 0.2
    stored = json.loads((ROOT / "evaluation/results/nulls_power.json").read_text())
    assert stored["published"] == found


def test_planted_blocks_are_told_from_drift():
    drifts = [compared(DRIFT, 400, seed)[1] for seed in range(10, 15)]
    cuts, figures = compared("three blocks, 1", 400)
    assert cuts["3"]["phases"]["maxcut"] == [4, 4, 4] and cuts["3"]["same"] == 1
    assert seen(figures, drifts)
    assert not seen(compared(DRIFT, 400)[1], drifts)


def test_weak_blocks_and_few_images_can_not_be_told(drifts):
    assert seen(compared("three blocks, 0.25")[1], drifts) is not True
    assert seen(compared("three blocks, 1", images=8)[1], drifts) is None


@pytest.mark.parametrize(
    "name",
    ["Ornstein-Uhlenbeck walk", "random walk", "great circle", "random walk, noise in every layer"],
)
def test_drift_has_no_phases(name, drifts):
    for seed in (0, 1):
        assert seen(compared(name, seed=seed)[1], drifts) is not True


def test_power_is_read_by_its_table():
    counts = {"16": {"walk": 0, "blocks": 3}}
    page = power_table({"draws": 6, "seen": {"centred cosine": counts}})
    assert "| blocks | 3 |" in page and "centred cosine, 16 images" in page
