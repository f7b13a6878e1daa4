import numpy as np
import pytest

from raptor_hf.tasks.digit_scenes import CLASSES, digit_scenes, draw_scene

GROUND = CLASSES.index("ground")


def columns(dataset, name):
    return np.stack([np.asarray(image) for image in dataset[name]])


def test_scenes_are_the_same_every_time_and_differ_between_splits():
    first, again = digit_scenes("train", 5), digit_scenes("train", 5)
    for name in ("image", "mask", "depth"):
        assert np.array_equal(columns(first, name), columns(again, name))
    test = digit_scenes("test", 5)
    assert not np.array_equal(columns(first, "mask"), columns(test, "mask"))
    assert columns(first, "image").shape == (5, 48, 64)
    with pytest.raises(ValueError, match="'train' and 'test'; got 'val'"):
        digit_scenes("val")


def test_the_ground_recedes_and_a_digit_has_one_depth():
    # one digit that is all ink: a square of 40 / z pixels that stands where the ground is z away
    ones = np.ones((1, 8, 8))
    scene = draw_scene(ones, np.array([7]), np.random.default_rng(0))
    metres = scene["depth"] / 1000
    assert set(np.unique(scene["mask"])) == {7, GROUND}
    assert (metres[:17][scene["mask"][:17] == GROUND] == 10).all()
    bottom = scene["mask"][47] == GROUND
    assert np.allclose(metres[47][bottom], 48 / 31, atol=1e-3)
    digits = np.unique(metres[scene["mask"] == 7])
    assert 1 <= len(digits) <= 5 and digits.min() >= 1.5 and digits.max() <= 3
    nearest = metres == digits.min()
    rows = np.flatnonzero((nearest & (scene["mask"] == 7)).any(axis=1))
    assert rows[-1] - rows[0] + 1 == pytest.approx(40 / digits.min(), abs=1)
    assert rows[-1] + 1 == pytest.approx(min(48, 16 + 48 / digits.min()), abs=1)
    assert scene["image"][scene["mask"] == 7].min() > scene["image"][scene["mask"] == GROUND].max()
