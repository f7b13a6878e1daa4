import numpy as np
import pytest

from evaluation.demo.patch_maps import patch_pca_maps, principal_scores


def test_two_patches_differ_along_one_component_only():
    # at layer 0 both models hold 0 and 4 in channel 1; the teacher's layer 1 spans twice as far
    teacher = np.array([[[1.0, 0, 0], [1, 4, 0]], [[0, 0, 8], [0, 0, 0]]])
    raptor = np.array([[[1.0, 0, 0], [1, 4, 0]], [[0, 0, 4], [0, 0, 0]]])
    maps = patch_pca_maps((teacher, raptor), (1, 2))
    grey = [0.5, 0.5]  # nothing varies along a second or third component
    np.testing.assert_allclose(maps[0, 0], [[[0, *grey], [1, *grey]]])
    np.testing.assert_allclose(maps[1, 0], [[[0, *grey], [1, *grey]]])
    # one scale for both: the Raptor goes half as far. The sign makes the second patch the larger
    # one, as at layer 0: channel 2 enters with −1
    np.testing.assert_allclose(maps[0, 1], [[[0, *grey], [1, *grey]]])
    np.testing.assert_allclose(maps[1, 1], [[[0.5, *grey], [1, *grey]]])


def test_components_come_in_the_order_of_their_spread():
    # the corners of a box of 4 × 3 × 2 × 1, whose axes are the components, each entering positively
    corners = np.array(np.meshgrid([0, 1], [0, 1], [0, 1], [0, 1])).reshape(4, -1).T
    tokens = corners * [2, 4, 1, 3] + 10
    scores = principal_scores(tokens)
    np.testing.assert_allclose(scores, (corners - 0.5)[:, [1, 3, 0]] * [4, 3, 2], atol=1e-12)


def test_first_layer_has_its_largest_entry_positive():
    direction = np.array([0.6, -0.8])
    tokens = np.array([[-1.0], [0], [1]]) * direction
    for sign in (1, -1):
        scores = principal_scores(sign * tokens)
        np.testing.assert_allclose(scores[:, 0], [sign, 0, -sign], atol=1e-12)
    # it follows the layer before where there is one
    np.testing.assert_allclose(principal_scores(tokens, -scores), -scores, atol=1e-12)
    assert not scores[:, 1:].any()


def test_rounding_is_grey_not_colour():
    noise = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    states = np.float32(1000) + np.float32(1e-5) * noise
    maps = patch_pca_maps((states[:1], states[1:]), (2, 2))
    assert (maps == 0.5).all()


def test_shapes_that_do_not_fit_are_refused():
    states = np.zeros((2, 6, 4))
    with pytest.raises(
        ValueError, match=r"\(layers \+ 1, 2 · 2, channels\); got \(2, 6, 4\), \(2, 6, 4\)"
    ):
        patch_pca_maps((states, states), (2, 2))
    with pytest.raises(ValueError, match=r"got \(2, 6, 4\), \(3, 6, 4\)"):
        patch_pca_maps((states, np.zeros((3, 6, 4))), (2, 3))
