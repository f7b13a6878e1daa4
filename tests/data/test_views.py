import io
import resource
import warnings

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from raptor_hf.data import (
    ImageViews,
    ReadingArguments,
    batches,
    load_images,
    make_processor,
)
from raptor_hf.data.loading import load_digits
from tests.helpers import assert_same_outputs


def test_digits_are_split_without_overlap():
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1437, 360)
    pixels = [{image.tobytes() for image in split["image"]} for split in (train, test)]
    assert not pixels[0] & pixels[1]
    counts = torch.bincount(torch.tensor(test["label"]))
    assert counts.min() >= 34
    assert counts.max() <= 38  # stratified
    with pytest.raises(ValueError, match="'train' and 'test'; got 'validation'"):
        load_images("digits", "validation")


def photographs(unreadable=(), **options):
    """Views of eight photographs, some of which are no images."""
    rows = []
    for image in range(8):
        file = io.BytesIO()
        Image.new("L", (8, 8), 20 * image).save(file, "png")
        content = b"no image" if image in unreadable else file.getvalue()
        rows.append({"bytes": content, "path": None})
    features = datasets.Features(image=datasets.Image())
    dataset = datasets.Dataset.from_dict({"image": rows}, features=features)
    reading = ReadingArguments(**options)
    return ImageViews(dataset, make_processor(8), views=2, reading=reading)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_image_takes_the_place_of_an_unreadable_one(num_workers):
    with pytest.raises(ValueError, match="image 3 of the dataset can't be decoded"):
        photographs([3]).__getitems__([1, 3])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        views = photographs([2, 3, 7], skip_corrupt=True)
        read = list(batches(views, 4, None, rows=[1, 2, 4, 7, 10, 11, 15], num_workers=num_workers))
    if not num_workers:  # each is said once, and remembered
        texts = sorted(str(warning.message)[:7] for warning in warned)
        assert texts == ["image 2", "image 3", "image 3", "image 7"]
    found = {name: torch.cat([batch[name] for batch in read]) for name in read[0]}
    assert found["image_id"].tolist() == [1, 4, 4, 0, 4, 4, 0]
    assert found["view"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    expected = photographs().__getitems__([1, 4, 4, 0, 12, 12, 8])["pixel_values"]
    assert_same_outputs(found["pixel_values"], expected)
    with pytest.warns(), pytest.raises(ValueError, match="None of the 8 images can be read"):
        photographs(range(8), skip_corrupt=True).__getitems__([0])


class NoSharedMemory(Dataset):
    """Rows that a worker can't hand over: no file can grow, as where /dev/shm is full."""

    def __len__(self):
        return 4

    def __getitems__(self, rows):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        return {"row": torch.tensor(rows)}


def test_a_worker_that_can_not_hand_over_a_batch_ends():
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(batches(NoSharedMemory(), 2, None, num_workers=1))
