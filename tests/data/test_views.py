import io
import resource
import warnings

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from raptor_hf.data import (
    ImageViews,
    ReadingArguments,
    batches,
    keep_batch,
    load_images,
    make_processor,
)
from raptor_hf.data.loading import load_digits
from raptor_hf.data.views import drop_unreadable, skip_corrupt
from tests.helpers import assert_same_outputs


def test_a_view_depends_on_seed_view_and_image_alone(images):
    alone = images[7]["pixel_values"]  # image 2 in view 1
    batch = images.__getitems__([0, 7, 3])
    assert_same_outputs(batch["pixel_values"][1], alone)  # the affine map is a kernel
    assert batch["image_id"].tolist() == [0, 2, 3]
    assert batch["view"].tolist() == [0, 1, 0]
    assert batch["label"].tolist() == [0, 0, 1]
    plain = images[2]["pixel_values"]
    assert not torch.equal(plain, alone)
    images.seed += 1
    assert not torch.equal(images[7]["pixel_values"], alone)
    assert torch.equal(images[2]["pixel_values"], plain)


def test_batches_lie_where_torch_allocates():
    memory = torch.arange(100.0)
    batch = {"apart": memory[1:9], "own": memory}
    kept = keep_batch(batch)
    assert kept["apart"].data_ptr() % 64 == 0 and torch.equal(kept["apart"], batch["apart"])
    assert kept["own"] is memory


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


def photographs(unreadable, number=8):
    """Views of photographs, some of which are no images."""
    rows = []
    for image in range(number):
        file = io.BytesIO()
        Image.new("L", (8, 8), 20 * image).save(file, "png")
        content = b"no image" if image in unreadable else file.getvalue()
        rows.append({"bytes": content, "path": None})
    features = datasets.Features(image=datasets.Image())
    dataset = datasets.Dataset.from_dict({"image": rows}, features=features)
    return ImageViews(dataset, make_processor(8), views=2)


def test_unreadable_images_are_left_out_or_replaced():
    plain, views = photographs([]), photographs([2, 3, 7])
    with pytest.warns(UserWarning, match="left out: image 3 of the dataset can't be decoded"):
        batch = skip_corrupt(views, 3).__getitems__([1, 2, 3, 4])
    assert batch["image_id"].tolist() == [1, 4] and batch["skipped"].tolist() == [2, 3]
    assert torch.equal(batch["pixel_values"], plain.__getitems__([1, 4])["pixel_values"])
    training = skip_corrupt(views, 3, replace=True)
    for _ in range(2):  # found, and known
        with warnings.catch_warnings(record=True):
            batch = training.__getitems__([1, 2, 7, 15])
        assert batch["image_id"].tolist() == [1, 4, 0, 0]  # the last two in the next view
        assert batch["view"].tolist() == [0, 0, 1, 2]
    assert training.class_names is None and len(training) == 16
    assert drop_unreadable(views).image_ids.tolist() == list(range(8))  # not without --skip_corrupt
    assert skip_corrupt(views, 0) is views


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


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_workers_of_a_loader_count_together(num_workers):
    views = skip_corrupt(photographs([0, 3, 6]), 2, replace=True)
    rows = [[1, 0], [2, 3], [4, 5], [7, 6]]
    loader = DataLoader(views, batch_sampler=rows, collate_fn=keep_batch, num_workers=num_workers)
    with pytest.raises(ValueError, match="unreadable images so far: 3 of 8; --skip_corrupt 2"):
        list(loader)


@pytest.mark.filterwarnings("ignore:left out")
def test_unreadable_images_are_dropped_where_their_number_must_be_known():
    views = photographs([2, 5])
    views.reading = ReadingArguments(skip_corrupt=2)
    assert drop_unreadable(views).image_ids.tolist() == [0, 1, 3, 4, 6, 7]
    assert views.__getitems__([2, 5])["image_id"].tolist() == [3, 7]
    nothing = photographs(range(3), 3)
    with pytest.raises(ValueError, match="unreadable images so far: 3 of 3"):
        skip_corrupt(nothing, 9).__getitems__([0, 1, 2])
