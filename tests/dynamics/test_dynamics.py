"""Measures of trajectories, worked out by hand or on systems whose behaviour is known."""

import numpy as np
import pytest
import torch

from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.data import ReadingArguments, load_images, make_processor
from raptor_hf.dynamics.measures import (
    angles,
    coherence,
    directions,
    effective_rank,
    measure,
)
from raptor_hf.dynamics.systems import load_inputs
from tests.helpers import save_models, tiny_teacher


class LinearSystem:
    """x_{ℓ+1} = A x_ℓ."""

    layout = TokenLayout(1, 0)

    def __init__(self, matrix, depth):
        self.matrix, self.depth = matrix, depth

    def run(self, states, *, start=0, swapped=None):
        run = [states]
        for _ in range(start, self.depth):
            run.append(run[-1] @ self.matrix.T)
        return torch.stack(run, dim=1)


def batch_of(number):
    """Which images states are of."""
    return {"image_id": torch.arange(number), "view": torch.zeros(number, dtype=torch.long)}


def test_angles_worked_out_by_hand():
    states = torch.tensor(
        [[1.0, 0], [2, 0], [0, 3], [-1, 0], [1, 0], [1, 1e-9]], dtype=torch.float64
    )
    turns = angles(states[:-1], states[1:])
    torch.testing.assert_close(
        turns,
        torch.tensor([0, 90, 90, 180, np.degrees(1e-9)], dtype=torch.float64),
        rtol=1e-12,
        atol=0,
    )
    assert directions(torch.zeros(2)).tolist() == [0, 0]


def test_a_linear_system_converges_to_its_attractor():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    matrix = torch.from_numpy(basis @ np.diag([2.0, 1, 1, 1, 1]) @ basis.T)
    linear = LinearSystem(matrix, depth=12)
    start = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = linear.run(start)
    found = measure(states, linear.layout)
    gamma = found["convergence", "patches"]
    assert (gamma.diff(dim=1) > 0).all() and (1 - gamma[:, 11]).max() < 1e-4
    torch.testing.assert_close(found["norm", "cls"], states[:, :, 0].norm(dim=-1))


def test_speeds_are_the_angles_between_layers():
    turns = np.deg2rad([30, 0, 10])
    phi = np.concatenate([[0], np.cumsum(turns)])
    path = torch.from_numpy(np.stack([np.cos(phi), np.sin(phi)], axis=1))  # 4 layers
    lengths = torch.tensor([1.0, 3, 2, 5])[:, None]
    states = (path * lengths)[None, :, None].expand(2, 4, 3, 2)
    found = measure(states, TokenLayout(1, 0))
    for group in ("cls", "patches"):
        torch.testing.assert_close(
            found["speed", group], torch.tensor([[30.0, 0, 10]] * 2).double(), atol=1e-9, rtol=0
        )
    torch.testing.assert_close(
        found["convergence", "cls"][0],
        torch.cos(torch.tensor([40.0, 10, 10, 0]).double().deg2rad()),
    )


def test_updates_of_rank_r_have_rank_r():
    left = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 7)))[0]
    right = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    for rank in (1, 3, 5):
        update = torch.from_numpy(4 * left[:, :rank] @ right[:rank])[None]
        for shaped in (update, update.transpose(1, 2)):
            assert effective_rank(shaped).item() == pytest.approx(rank, abs=1e-5)
    # σ = 2, 1: exp(H(2/3, 1/3))
    found = effective_rank(torch.tensor([[[2.0, 0, 0], [0, 1, 0]]]))
    assert found.item() == pytest.approx(3 / 2 ** (2 / 3))
    assert effective_rank(torch.zeros(1, 2, 3)).isnan().all()


def test_coherence_of_identical_and_of_orthogonal_patches():
    same = torch.tensor([1.0, 2, 3, 4]).expand(2, 9, 4) * torch.arange(1, 10)[:, None]
    torch.testing.assert_close(coherence(same), torch.ones(2))
    torch.testing.assert_close(coherence(3 * torch.eye(4)[None]), torch.tensor([0.5]))


def test_models_that_are_not_of_one_kind_are_refused(plain_teacher, tmp_path):
    folders = save_models(tmp_path)
    plain_teacher.save_pretrained(tmp_path / "plain")
    make_processor(8).save_pretrained(tmp_path / "plain")
    images = load_images("digits", "test")
    pair = [str(folders / "teacher"), str(tmp_path / "plain")]
    message = r"'teacher': \(6, 24, 1, 2\), 'plain': \(6, 24, 1, 0\)"
    with pytest.raises(ValueError, match=message):
        load_inputs(pair, images)
    other = tiny_teacher()
    other.embeddings.cls_token += 0.1
    other.save_pretrained(tmp_path / "other")
    make_processor(8).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="raptor was made from another teacher than other"):
        load_inputs([str(tmp_path / "other"), str(folders / "raptor")], images)
    with pytest.raises(ValueError, match="Give --model"):
        load_inputs([], images)


def test_a_study_at_another_resolution(tmp_path):
    reading = ReadingArguments(resolution=[12])
    teacher = str(save_models(tmp_path) / "teacher")
    _, images = load_inputs([teacher], load_images("digits", "test"), reading)
    assert images.__getitems__([0])["pixel_values"].shape == (1, 3, 12, 12)
