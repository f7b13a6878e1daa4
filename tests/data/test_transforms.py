import numpy as np
import pytest
from PIL import Image

from raptor_hf.data.transforms import Augmentation


def picture(height, width):
    """An image whose red channel is its target: column index, and green its row."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels), columns, rows


def test_image_and_target_get_the_same_crop_and_flip():
    image, columns, rows = picture(120, 160)
    augment = Augmentation(size=(60, 80), scale=(0.3, 1.0), flip=0.5)
    flipped = set()
    for seed in range(20):
        for channel, target in ((0, columns), (1, rows)):
            view, moved = augment(image, target, np.random.default_rng(seed))
            shown = np.asarray(view)[..., channel].astype(int)
            assert moved.shape == (60, 80)
            # a smooth ramp: bicubic and nearest agree within a pixel or two
            assert np.abs(shown - moved).max() <= 2
        view, moved = augment(image, columns, np.random.default_rng(seed))
        flipped.add(bool(moved[0, 0] > moved[0, -1]))
    assert flipped == {True, False}


def test_crops_keep_to_scale_and_ratio():
    augment = Augmentation(size=(8, 8), scale=(0.5, 1.0), ratio=(0.75, 1.33))
    rng = np.random.default_rng(0)
    boxes = np.array([augment.draw_box(400, 300, rng) for _ in range(300)])
    left, top, width, height = boxes.T
    assert left.min() >= 0 and top.min() >= 0
    assert (left + width).max() <= 400 and (top + height).max() <= 300
    share, ratio = width * height / 120_000, width / height
    assert 0.49 < share.min() < 0.55 and share.max() > 0.9
    assert ratio.min() > 0.74 and ratio.max() < 1.345
    # twice the area never fits: the whole image
    whole = Augmentation(size=(8, 8), scale=(2.0, 2.0), ratio=(4 / 3, 4 / 3))
    assert whole.draw_box(640, 480, rng) == (0, 0, 640, 480)
    assert whole.draw_box(640, 240, rng) == (160, 0, 320, 240)


def test_the_whole_image_at_its_own_size_is_unchanged():
    image, columns, _ = picture(12, 16)
    augment = Augmentation(size=(12, 16), scale=(2, 2), ratio=(4 / 3, 4 / 3), flip=0)
    view, target = augment(image, columns, np.random.default_rng(0))
    assert np.array_equal(np.asarray(view), np.asarray(image))
    assert np.array_equal(target, columns)


@pytest.mark.parametrize("kind", range(4))
def test_colours_change_as_asked_and_the_target_does_not(kind):
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    image.putpixel((0, 0), (20, 40, 90))
    jitter = [0.0] * 4
    jitter[kind] = 0.2
    plain = Augmentation(size=(4, 4), scale=(2, 2), ratio=(1, 1), flip=0)
    jittered = Augmentation(size=(4, 4), scale=(2, 2), ratio=(1, 1), flip=0, jitter=tuple(jitter))
    target = np.arange(16).reshape(4, 4)
    same, _ = plain(image, target, np.random.default_rng(0))
    other, moved = jittered(image, target, np.random.default_rng(0))
    assert np.array_equal(np.asarray(same), np.asarray(image))
    assert np.array_equal(moved, target)
    change = np.asarray(other).astype(int) - np.asarray(image)
    assert 0 < np.abs(change).max() <= 130
    again, _ = jittered(image, target, np.random.default_rng(0))
    assert np.array_equal(np.asarray(again), np.asarray(other))


def test_hue_turns_the_colour_circle():
    augment = Augmentation(size=(1, 1), jitter=(0, 0, 0, 1 / 3))

    class Largest:
        def permutation(self, n):
            return np.arange(n)

        def uniform(self, low, high):
            return high

    red = Image.new("RGB", (1, 1), (255, 0, 0))
    assert augment.change_colours(red, Largest()).getpixel((0, 0)) == (0, 255, 0)
