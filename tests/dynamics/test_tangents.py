"""Tangents against finite differences and singular values; networks as nulls; floors of R²."""

import numpy as np
import pytest
import torch

from raptor_hf.dynamics.measures import angles
from raptor_hf.dynamics.nulls import r2_baselines, shuffle_layers, untrained
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.dynamics.tangents import random_directions, tangent_growth
from raptor_hf.teachers import trajectory
from tests.dynamics.test_dynamics import LinearSystem, batch_of
from tests.helpers import LAYOUT, randomised, tiny_raptor, tiny_teacher

PIXELS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher():
    return randomised(tiny_teacher())


@pytest.mark.parametrize("kind", ["teacher", "raptor"])
@pytest.mark.parametrize("group", ["cls", "patches"])
def test_tangents_are_the_limit_of_pushes(teacher, kind, group):
    model = teacher if kind == "teacher" else tiny_raptor(teacher)
    system = DepthSystem("model", model.double(), LAYOUT, image_size=(8, 8))
    states = trajectory(system.model, PIXELS.double())
    figures = tangent_growth(system, states, batch_of(3), group=group, start=2)
    assert figures["growth"].shape == (3, 5)
    # the same push, of a millionth of the state
    tokens, start = LAYOUT.groups()[group], states[:, 2].clone()
    pushes = random_directions(batch_of(3), tuple(start[0, tokens].shape), 0)
    start[:, tokens] += 1e-6 * start[:, tokens].norm(dim=-1, keepdim=True) * pushes
    left = angles(system.run(start, start=2)[:, :, tokens], states[:, 2:, tokens]).mean(dim=-1)
    torch.testing.assert_close(figures["angle"], left / left[:, :1], rtol=1e-3, atol=1e-4)


def test_growth_of_a_linear_map_against_its_singular_values():
    torch.manual_seed(0)
    matrix = torch.randn(6, 6, dtype=torch.double)
    system = LinearSystem(matrix, 40)
    states = system.run(torch.randn(2000, 1, 6, dtype=torch.double))
    figures = tangent_growth(system, states, batch_of(2000), group="cls")
    # one layer: the mean square of a random direction's growth is that of the singular values
    squares = (2 * figures["growth"][:, 1]).exp().mean()
    assert squares == pytest.approx(float(torch.linalg.svdvals(matrix).square().mean()), rel=0.05)
    # many layers: the exponent comes from the largest eigenvalue
    exponent = (figures["growth"][:, -1] / 40).mean()
    largest = torch.linalg.eigvals(matrix).abs().max().log()
    assert exponent == pytest.approx(float(largest), abs=0.05)


def test_a_push_that_nothing_corrects_leaves_what_norms_leave():
    system = LinearSystem(2 * torch.eye(4, dtype=torch.double), 3)
    system.run = lambda states, start=0: torch.stack([states + n for n in range(4 - start)], dim=1)
    states = system.run(torch.full((5, 1, 4), 1.0, dtype=torch.double))
    figures = tangent_growth(system, states, batch_of(5), group="cls")
    torch.testing.assert_close(figures["growth"], torch.zeros(5, 4, dtype=torch.double))
    torch.testing.assert_close(figures["norms_alone"][0], 1 / torch.arange(1.0, 5.0).double())
    torch.testing.assert_close(figures["angle"], figures["norms_alone"])


def test_a_shuffled_network_has_the_layers_of_its_teacher(teacher):
    shuffled = shuffle_layers(teacher, seed=1)
    order = np.random.default_rng(1).permutation(6)
    assert order.tolist() != list(range(6))
    swapped = {layer + 1: int(other) + 1 for layer, other in enumerate(order)}
    system = DepthSystem("teacher", teacher, LAYOUT, image_size=(8, 8))
    expected = system.run(trajectory(teacher, PIXELS)[:, 0], swapped=swapped)
    torch.testing.assert_close(trajectory(shuffled, PIXELS), expected)
    own = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert {parameter.data_ptr() for parameter in shuffled.parameters()} == own


def test_an_untrained_network_depends_on_its_seed_alone(teacher):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (untrained(teacher, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    states = [trajectory(model, PIXELS) for model in (first, again, other, teacher)]
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[0], states[2]) and not torch.allclose(states[0], states[3])


def test_floors_of_r2_know_what_they_are_given():
    torch.manual_seed(0)
    start, position = torch.randn(80, 1, 7, 4), torch.randn(1, 1, 7, 4)
    first = start + 5 * position  # the update is the same for every image
    second = start @ torch.randn(4, 4) + 1  # an affine map, the same for every token
    states = torch.cat([start, first, second], dim=1)
    scores = r2_baselines(states[:40], states[40:], LAYOUT)
    patches = {name: score["layers"]["patches"] for name, score in scores.items()}
    assert patches["constant"] == pytest.approx([0, 0], abs=0.05)
    assert patches["a_0 + mean update"][0] > 0.99 > patches["copy of a_0"][0]
    assert patches["affine map of a_0"][1] == pytest.approx(1, abs=1e-4)
    assert 0.5 < patches["mean of each position"][0] < 0.99
