"""Spectral radii of maps whose answers linear algebra knows, and of a Raptor."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from raptor_hf.dynamics.fixed_points import apply_again, held_block, spectral_radius
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.teachers import trajectory
from tests.helpers import LAYOUT, randomised, tiny_raptor, tiny_teacher

STATES = torch.randn(3, 2, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def rotation(radius):
    """A map of 4 channels with eigenvalues ± i · radius and two smaller ones."""
    matrix = torch.diag(torch.tensor([0.0, 0, 0.2, -0.1], dtype=torch.double))
    matrix[0, 1], matrix[1, 0] = -radius, radius
    basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.double))[0]
    return basis @ matrix @ basis.T


@pytest.mark.parametrize("radius", [0.8, 1.3])
def test_the_radius_of_a_complex_pair(radius):
    torch.manual_seed(1)
    matrix = rotation(radius)
    found = spectral_radius(lambda x: x @ matrix.T + 7, STATES)
    torch.testing.assert_close(found, torch.full((3,), radius).double(), rtol=1e-3, atol=0)


def test_the_held_block_of_a_raptor_and_its_jacobian(pixel_values):
    teacher = randomised(tiny_teacher())
    raptor = randomised(tiny_raptor(teacher)).double()
    system = DepthSystem("raptor", raptor, LAYOUT, image_size=(8, 8))
    states = trajectory(raptor, pixel_values.double())[:1, -1]
    step = held_block(system, states)
    expected = raptor.blocks[-1](states, torch.tensor([6]))
    torch.testing.assert_close(apply_again(step, states, 1)[:, 1], expected)
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(step, states)
    size = states.numel()
    largest = torch.linalg.eigvals(jacobian.reshape(size, size)).abs().max()
    found = spectral_radius(step, states, iterations=400)
    assert float(found) == pytest.approx(float(largest), rel=0.02)
