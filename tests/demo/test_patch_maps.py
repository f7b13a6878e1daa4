import numpy as np
import pytest

from evaluation.demo.patch_maps import patch_pca_maps, principal_scores, unit_range


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


def test_colours_do_not_depend_on_where_the_channels_point():
    generator = np.random.default_rng(0)
    teacher, raptor = generator.normal(size=(2, 3, 6, 5))
    rotation = np.linalg.qr(generator.normal(size=(5, 5)))[0]
    maps = patch_pca_maps((teacher, raptor), (2, 3))
    turned = patch_pca_maps((teacher @ rotation, raptor @ rotation), (2, 3))
    assert maps.shape == (2, 3, 2, 3, 3)
    for ours, other in zip(maps, turned, strict=True):
        # a sign of the first layer may be the other one, and turns a colour round in all layers
        same = np.isclose(ours, other).all(axis=(0, 1, 2))
        round_about = np.isclose(ours, 1 - other).all(axis=(0, 1, 2))
        assert (same | round_about).all()
    np.testing.assert_allclose(maps.min(axis=(0, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(maps.max(axis=(0, 2, 3)), 1)


def test_rounding_is_grey_not_colour():
    noise = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    states = np.float32(1000) + np.float32(1e-5) * noise
    maps = patch_pca_maps((states[:1], states[1:]), (2, 2))
    assert (maps == 0.5).all()


def test_unit_range():
    scaled = unit_range(np.array([[2.0, 7.0], [4.0, 7.0], [3.0, 7.0]]))
    assert scaled.tolist() == [[0, 0.5], [1, 0.5], [0.5, 0.5]]


def test_shapes_that_do_not_fit_are_refused():
    states = np.zeros((2, 6, 4))
    with pytest.raises(
        ValueError, match=r"\(layers \+ 1, 2 · 2, channels\); got \(2, 6, 4\), \(2, 6, 4\)"
    ):
        patch_pca_maps((states, states), (2, 2))
    with pytest.raises(ValueError, match=r"got \(2, 6, 4\), \(3, 6, 4\)"):
        patch_pca_maps((states, np.zeros((3, 6, 4))), (2, 3))
