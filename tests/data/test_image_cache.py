"""A cache of decoded images gives the pixels that the files give."""

import multiprocessing

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from raptor_hf.data import ImageViews, ReadingArguments, list_images, load_images, make_processor
from raptor_hf.data.arguments import CropArguments
from raptor_hf.data.decoding import read_pixels, shrink
from raptor_hf.data.transforms import Augmentation


def photograph(number, size=(61, 40)):
    """A smooth image, as JPEG likes it."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    for number in range(5):
        path = tmp_path / "photos" / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number).save(path)
    return tmp_path / "photos"


def views_of(folder, **reading):
    reading = ReadingArguments(**reading)
    crops = Augmentation.of(CropArguments(), (14, 14))
    dataset = load_images(str(folder), "train", reading)
    return ImageViews(dataset, make_processor(14), views=2, crops=crops, reading=reading)


@pytest.mark.parametrize("shorter_side", [0, 24])
def test_cached_images_are_the_same_images(folder, tmp_path, shorter_side, monkeypatch):
    plain = views_of(folder, shorter_side=shorter_side)
    rows = list(range(len(plain)))
    expected, open_file = plain.__getitems__(rows), Image.open
    options = {"shorter_side": shorter_side, "image_cache": str(tmp_path / "cache")}
    for decoder in (open_file, None):  # written, and read again without a decoder
        monkeypatch.setattr(Image, "open", decoder)
        cached = views_of(folder, **options)
        found = cached.__getitems__(rows)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert cached.classes == plain.classes
        assert cached.public_path(3) == plain.public_path(3) == "train/b/1.jpg"
        files = [list_images(str(folder), views.cells).digest for views in (cached, plain)]
        assert files[0] == files[1]
    monkeypatch.setattr(Image, "open", open_file)
    (file,) = (tmp_path / "cache").iterdir()
    stored = datasets.Dataset.from_file(str(file))  # a plain dataset, for anyone
    width, height = stored[4]["image"].size
    assert min(width, height) == (shorter_side or 40)
    assert stored.features["label"].names == ["a", "b"]


def write_cache(folder, cache):
    views_of(folder, image_cache=cache)


def test_jobs_that_make_the_same_cache_do_not_meet(folder, tmp_path):
    cache = str(tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=write_cache, args=(folder, cache)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    cached = views_of(folder, image_cache=cache).__getitems__([3, 9])["pixel_values"]
    assert torch.equal(cached, views_of(folder).__getitems__([3, 9])["pixel_values"])


def test_a_folder_may_be_spelt_in_several_ways(folder, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    monkeypatch.chdir(folder)
    digests = set()
    for name in (str(folder), ".", "../photos", "../photos/"):
        views = views_of(name, image_cache=cache)
        digests.add(list_images(name, views.cells).digest)
    assert len(digests) == 1 and len(list((tmp_path / "cache").iterdir())) == 1


def test_changed_images_get_a_new_cache(folder, tmp_path):
    options = {"image_cache": str(tmp_path / "cache")}
    views_of(folder, **options)
    changed = folder / "train" / "a" / "0.jpg"
    photograph(7).save(changed)
    found = views_of(folder, **options).__getitems__([0])["pixel_values"]
    assert torch.equal(found, views_of(folder).__getitems__([0])["pixel_values"])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_cannot_be_read_is_told_when_it_is_read(folder, tmp_path):
    (folder / "train" / "a" / "2.jpg").write_bytes(b"no image")
    views = views_of(folder, image_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"a/2\.jpg can't be decoded"):
        views.__getitems__([1])


def test_large_jpegs_are_decoded_small(tmp_path):
    """At a quarter of 640×480, and shrunk: near what comes of the whole, never too small."""
    photograph(0, (640, 480)).save(tmp_path / "large.jpg", quality=95)
    cell, options = {"path": str(tmp_path / "large.jpg"), "bytes": None}, {"name": ""}
    with Image.open(cell["path"]) as image:
        expected = np.asarray(shrink(image.convert("RGB"), 60)).astype(int)
    found = read_pixels(cell, **options, shorter_side=60)
    assert found.shape == expected.shape == (60, 80, 3)
    assert 0 < np.abs(found - expected).mean() < 1
    assert read_pixels(cell, **options, shorter_side=700).shape == (480, 640, 3)
