"""Similarities measured several ways, and phases against nulls, on processes that are known."""

import json

import numpy as np
import pytest

from evaluation.recurrence.nulls import measure_phases
from raptor_hf.phases import find_phases, nulls
from raptor_hf.phases.similarity import (
    centred_cosines,
    debiased_cka,
    half_samples,
    image_cosines,
)
from tests.programs import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "dinov2_base_layer_distance.json"
IMAGES, LAYERS, CHANNELS = 100, 12, 48
THREE = np.repeat(np.arange(3), 4)  # the phases of three blocks of four layers


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def ornstein_uhlenbeck(seed, memory=0.9, images=IMAGES):
    steps = noise(seed, LAYERS, images, CHANNELS)
    states = [steps[0]]
    for step in steps[1:]:
        states.append(memory * states[-1] + np.sqrt(1 - memory**2) * step)
    return np.stack(states, axis=1)


def great_circle(seed):
    first, second = noise(seed, 2, IMAGES, 1, CHANNELS)
    angle = np.linspace(0, 2.2, LAYERS)[:, None]
    return np.cos(angle) * first + np.sin(angle) * second


def blocks(seed, strength, images=IMAGES):
    """A walk that is drawn to a state of its own in each of three phases of four layers."""
    centres = noise(seed + 100, images, 3, CHANNELS)
    return ornstein_uhlenbeck(seed, images=images) + strength * centres[:, THREE]


def answers(states, measure="centred cosine"):
    """Phases and verdict by k."""
    cuts = measure_phases({"cls": states}, measure, 40, 0)["cls"]["cuts"]
    return {k: (cut["phases"], cut["seen"]) for k, cut in cuts.items()}


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
    values = 10.0 - nulls.straight_line(6)  # near layers are alike, phases add nothing
    within, across = nulls.matched_means(values, [2, 4])
    assert within == pytest.approx(across)
    values[:2, :2] += 1
    within, across = nulls.matched_means(values, [2, 4])
    assert within - across == pytest.approx(2 / 14)  # 2 of 14 ordered pairs within
    assert np.isnan(nulls.matched_means(values, [6])).all()


@pytest.mark.parametrize(
    ("k", "recursive", "exact"),
    [(2, [7, 5], [7, 5]), (3, [7, 3, 2], [5, 4, 3]), (4, [4, 3, 3, 2], [4, 3, 3, 2])],
)
def test_published_phases_are_those_of_neighbours_alone(k, recursive, exact):
    distance = np.array(json.loads(FIXTURE.read_text())["distance"])
    turns = 1 - np.diagonal(distance, 1)
    null = 1 - nulls.independent_turns(turns)
    for matrix in (distance, null):
        found = [find_phases(matrix, k, method) for method in ("recursive", "maxcut")]
        assert found == [recursive, exact]
    pairs = np.triu_indices(12, 2)
    assert np.corrcoef(distance[pairs], null[pairs])[0, 1] == pytest.approx(0.977, abs=1e-3)

    # steps in random order often cut as much
    orders = nulls.reordered_turns(turns, 200)
    shares = np.array([nulls.best_cut_share(1 - order, k) for order in orders])
    assert (shares >= nulls.best_cut_share(distance, k)).mean() > 0.2


@pytest.mark.parametrize("strength", [0.5, 1])
def test_planted_blocks_are_told_from_drift(strength):
    found = answers(blocks(0, strength))
    assert found["3"] == ([4, 4, 4], True)
    assert found["2"][1] is False  # two phases would join blocks


def test_weak_blocks_and_few_images_can_not_be_told():
    assert answers(blocks(0, 0.1))["3"][1] is not True
    assert answers(blocks(0, 0.5, images=8))["3"][1] is not False


@pytest.mark.parametrize("seed", range(3))
def test_drift_has_no_phases(seed):
    walk = np.cumsum(noise(seed, IMAGES, LAYERS, CHANNELS), axis=1)
    for states in (ornstein_uhlenbeck(seed), walk, great_circle(seed)):
        assert all(seen is not True for _, seen in answers(states).values())
    # neither has noise that every layer adds on its own
    noisy = walk + 1.5 * noise(seed + 50, IMAGES, LAYERS, CHANNELS)
    assert all(seen is not True for _, seen in answers(noisy).values())
