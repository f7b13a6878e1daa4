import numpy as np
import pytest
import torch
from PIL import Image

from raptor_hf.data import ImageViews, load_images, make_processor
from raptor_hf.data.arguments import CropArguments
from raptor_hf.data.decoding import look_up
from raptor_hf.data.transforms import Augmentation
from tests.helpers import noise


def picture(height, width):
    """The bytes of an image whose red channel is its target: column index, and green its row."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)
    return pixels, columns, rows


def test_image_and_target_get_the_same_crop_and_flip():
    image, columns, rows = picture(120, 160)
    augment = Augmentation(CropArguments(crop_scale=[0.3, 1.0], flip=0.5), (60, 80))
    flipped = set()
    for seed in range(20):
        for channel, target in ((0, columns), (1, rows)):
            view, moved = augment(image, target, np.random.default_rng(seed))
            shown = view[..., channel].astype(int)
            assert moved.shape == (60, 80)
            # a smooth ramp: bicubic and nearest agree within a pixel or two
            assert np.abs(shown - moved).max() <= 2
        view, moved = augment(image, columns, np.random.default_rng(seed))
        flipped.add(bool(moved[0, 0] > moved[0, -1]))
    assert flipped == {True, False}


def test_crops_keep_to_scale_and_ratio():
    crops = CropArguments(crop_scale=[0.5, 1.0], crop_ratio=[0.75, 1.33])
    augment = Augmentation(crops, (8, 8))
    rng = np.random.default_rng(0)
    boxes = np.array([augment.draw_box(400, 300, rng) for _ in range(300)])
    left, top, width, height = boxes.T
    assert left.min() >= 0 and top.min() >= 0
    assert (left + width).max() <= 400 and (top + height).max() <= 300
    share, ratio = width * height / 120_000, width / height
    assert 0.49 < share.min() < 0.55 and share.max() > 0.9
    assert ratio.min() > 0.74 and ratio.max() < 1.345
    # twice the area never fits: the whole image
    crops = CropArguments(crop_scale=[2.0, 2.0], crop_ratio=[4 / 3, 4 / 3])
    whole = Augmentation(crops, (8, 8))
    assert whole.draw_box(640, 480, rng) == (0, 0, 640, 480)
    assert whole.draw_box(640, 240, rng) == (160, 0, 320, 240)


@pytest.fixture
def photographs(tmp_path):
    """Four photographs in a folder without labels."""
    (tmp_path / "photos" / "train").mkdir(parents=True)
    for number in range(4):
        noise(0, (30, 40 + number)).save(tmp_path / "photos" / "train" / f"{number}.png")
    return load_images(str(tmp_path / "photos"), "train")


def test_a_view_is_what_pillow_makes_by_hand(photographs):
    """Crop, resize, flip, normalise: with numbers drawn from (seed, view, image) alone."""
    processor = make_processor(14)
    crops = Augmentation.of(CropArguments(crop_scale=[0.2, 0.6], flip=0.5), (14, 14))
    views = ImageViews(photographs, processor, views=3, seed=5, crops=crops)
    rows = [0, 5, 2, 11, 9]  # of four images: (view, image) (0, 0), (1, 1), (0, 2), (2, 3), (2, 1)
    batch, flipped = views.__getitems__(rows)["pixel_values"], set()
    assert batch.dtype == torch.uint8
    found = look_up(batch, views.table)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    for row, pixels in zip(rows, found, strict=True):
        view, image_id = divmod(row, 4)
        image = noise(0, (30, 40 + image_id))
        if view == 0:
            expected = processor(image, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(pixels, expected)
            continue
        rng = np.random.default_rng((5, view, image_id))
        left, top, width, height = crops.draw_box(*image.size, rng)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((14, 14), Image.Resampling.BICUBIC)
        mirrored = rng.random() < 0.5
        flipped.add(mirrored)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
        expected = (np.asarray(image) / 255 - mean) / std
        np.testing.assert_allclose(pixels.permute(1, 2, 0), expected, atol=2.01 / 255 / min(std))
        assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).mean() < 0.02 / 255
        assert 0.15 < width * height / (30 * (40 + image_id)) < 0.65
    assert flipped == {True, False}


def test_views_do_not_depend_on_the_batch_and_differ_by_seed(photographs):
    processor = make_processor(14)
    crops = Augmentation.of(CropArguments(), (14, 14))
    views = ImageViews(photographs, processor, views=3, seed=5, crops=crops)
    together = views.__getitems__([6, 1, 7])["pixel_values"]
    for row, expected in zip([6, 1, 7], together, strict=True):
        assert torch.equal(views.__getitems__([row])["pixel_values"][0], expected)
    others = ImageViews(photographs, processor, views=3, seed=6, crops=crops)
    random, plain = others.__getitems__([6, 1])["pixel_values"]
    assert not torch.equal(random, together[0])
    assert torch.equal(plain, together[1])  # view 0 is the image itself


def test_crops_that_make_no_sense_are_refused():
    for values, word in (
        ({"crop_scale": [], "flip": 0.5}, "flip belongs to random crops"),
        ({"crop_scale": [0.5]}, "crop_scale takes two numbers"),
        ({"crop_ratio": [2.0, 1.0]}, "crop_ratio takes two numbers, the smaller one first"),
        ({"flip": 1.5}, "--flip must lie in"),
    ):
        with pytest.raises(ValueError, match=word):
            CropArguments(**values)
